"""Scores by hand: what is averaged over what, and how differences are paired."""

import math

import pytest
import torch

from modmoe.analysis import MethodRecord
from modmoe.errors import NonFiniteError
from modmoe.experiments.meta.families import add_differences
from modmoe.experiments.meta.figures import expert_curves
from modmoe.experiments.meta.scores import averages, paired_difference, score, score_in_chunks
from modmoe.experiments.meta.training import CALIBRATION, EVALUATION, TRAINING, Schedule, fit, generator_of
from modmoe.meta import FunctionMixture, PointMixture, TaskBatch


def two_points():
    """One task, two targets, N(0, 1) each: y = 0 and y = 2."""
    return PointMixture(torch.zeros(1, 1, 2, 1, 1), torch.ones(1, 1, 2, 1, 1)), torch.tensor([[[0.0], [2.0]]])


def test_scores_of_a_task_by_hand():
    predictive, y = two_points()
    found = score(predictive, y, y_scale=3.0)
    # -ln N(0) = .9189, -ln N(2) = .9189 + 2; independent points, so the joint divided by 2 is the mean
    assert found["nll_marginal"].item() == pytest.approx(0.5 * math.log(2 * math.pi) + 1)
    assert found["nll_joint"].item() == pytest.approx(found["nll_marginal"].item())
    assert found["mse"].item() == pytest.approx(9 * (0 + 4) / 2)


def test_chunks_give_the_same():
    y = torch.randn(7, 3, 1)
    x = torch.zeros(7, 3, 1)
    batch = TaskBatch(x[:, :0], y[:, :0], x, y)

    def answer(rows):
        return PointMixture(y[rows].unsqueeze(1).unsqueeze(3) * 0, torch.ones(len(y[rows]), 1, 3, 1, 1))

    whole, parts = score_in_chunks(answer, batch), score_in_chunks(answer, batch, chunk=3)
    for metric in whole:
        assert torch.equal(whole[metric], parts[metric])


FIRST = {"mse": {("a", "3"): [1.0, 3.0], ("a", "5"): [3.0, 5.0], ("b", "3"): [2.0, 2.0], ("b", "5"): [0.0, 2.0]}}
SECOND = {"mse": {("a", "3"): [1.0, 1.0], ("a", "5"): [1.0, 1.0], ("b", "3"): [1.0, 2.0], ("b", "5"): [1.0, 2.0]}}


def as_scores(numbers):
    return {metric: {c: torch.tensor(v) for c, v in of.items()} for metric, of in numbers.items()}


def test_averages_by_hand():
    found = averages(as_scores(FIRST))
    # tasks of (a): 2 and 4; of (b): 1 and 2
    assert found == {
        "mse": 2.25,
        "mse/a": 3.0,
        "mse/b": 1.5,
        "mse/a/3": 2.0,
        "mse/a/5": 4.0,
        "mse/b/3": 2.0,
        "mse/b/5": 1.0,
    }


def test_paired_differences_by_hand():
    first, second = as_scores(FIRST), as_scores(SECOND)
    # (a): 2 - 1 = 1 and 4 - 1 = 3; (b): 1 - 1 = 0 and 2 - 2 = 0. Mean 1, s^2 = (0 + 4 + 1 + 1) / 3 = 2,
    # t(.975, 3) = 3.1824
    found = paired_difference(first, second, "mse")
    assert found.mean == pytest.approx(1.0)
    assert found.half_width == pytest.approx(3.18245 * math.sqrt(2) / 2, rel=1e-5)
    # (a) alone: mean 2, s = sqrt 2, t(.975, 1) = 12.7062
    found = paired_difference(first, second, "mse", "a")
    assert (found.mean, found.half_width) == pytest.approx((2.0, 12.7062), rel=1e-5)


def test_differences_go_into_the_first_record():
    scores = {"maml_routed": as_scores(FIRST), "maml": as_scores(SECOND)}
    records = {name: MethodRecord({}) for name in scores}
    add_differences(records, scores)
    assert records["maml"].metrics == {}
    assert set(records["maml_routed"].metrics) == {
        "difference/maml_routed-maml/mse",
        "half_width/maml_routed-maml/mse",
    }
    assert records["maml_routed"].metrics["difference/maml_routed-maml/mse"] == pytest.approx(1.0)


def test_curves_of_components_and_of_whole_functions():
    means = torch.tensor([1.0, 3.0, 10.0, 30.0]).view(1, 2, 1, 2, 1)  # two draws of two components at one point
    gates = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log().view(1, 2, 1, 2)
    curves, weights = expert_curves(PointMixture(means, torch.ones_like(means), gates))
    assert curves.flatten().tolist() == pytest.approx([5.5, 16.5])
    assert weights.flatten().tolist() == pytest.approx([0.7, 0.3])
    functions = PointMixture(
        means[:, :, :, :1], torch.ones(1, 2, 1, 1, 1), log_weights=torch.tensor([[0.2, 0.8]]).log()
    )
    curves, weights = expert_curves(functions, latents_are_experts=True)
    assert curves.flatten().tolist() == [1.0, 10.0]
    assert weights.flatten().tolist() == pytest.approx([0.2, 0.8])
    with pytest.raises(TypeError, match="experts of a FunctionMixture are not known"):
        expert_curves(FunctionMixture(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.zeros(1, 1)))


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_schedule_by_hand():
    schedule = Schedule(100, 1, 0.5, 1.0)
    assert schedule.rate(0) == pytest.approx(0.5 / 50)  # a fiftieth, at the top of the cosine
    assert schedule.rate(50) == pytest.approx(0.25)  # half way, warm
    assert schedule.rate(99) == pytest.approx(0.5 * 0.02)


def test_fit_finds_a_minimum_and_leaves_single_bad_steps_out():
    model = torch.nn.Linear(1, 1, bias=False)

    def loss(iteration):
        value = (model.weight - 2).square().sum()
        return value * math.nan if iteration == 150 else value

    assert fit(model, Schedule(300, 1, 0.1, 10.0), loss) >= 0
    assert model.weight.item() == pytest.approx(2, abs=0.01)
    assert not model.training
    with pytest.raises(NonFiniteError, match="10 of 10 gradients of a Linear were not finite"):
        fit(model, Schedule(10, 1, 0.1, 1.0), lambda _: (model.weight * math.nan).sum())


def test_no_two_purposes_share_a_stream():
    purposes = (TRAINING, EVALUATION, CALIBRATION)
    seeds = [generator_of(p, s, n).initial_seed() for p in purposes for s in range(50) for n in range(100)]
    assert len(set(seeds)) == len(seeds)
