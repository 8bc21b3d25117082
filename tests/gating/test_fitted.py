"""The base of gates fitted to data: scores by class shares, what observe takes and refuses, selection."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modmoe import ExpertPool, MLPExpert, MoELayer
from modmoe.gating.classwise import SINGLE_CLASS, ClasswiseRouter
from modmoe.gating.fitted import class_generator, sum_by_owner
from modmoe.growable import RowSpec
from modmoe.rows import Rows


class MeanRouter(ClasswiseRouter):
    """The smallest gate there is: s_c(x) = -|x - m_c|, with a running mean in one row."""

    def row_specs(self) -> dict[str, RowSpec]:
        return {**super().row_specs(), "mean": RowSpec((self.in_features,), trainable=False, count=0)}

    def class_score(self, x: Tensor, rows: Rows) -> Tensor:
        return -(x.unsqueeze(1) - rows["mean"]).norm(dim=2)

    def fit_class(self, old: dict[str, Tensor] | None, x: Tensor, label: int) -> dict[str, Tensor]:
        seen = old["count"] if old else torch.zeros(())
        total = seen + len(x)
        mean = old["mean"] if old else torch.zeros(self.in_features)
        return {"count": total, "mean": mean + (x - mean).sum(0) / total}


class OnceRouter(MeanRouter):
    streaming = False


def layer_of(router: MeanRouter, num_experts: int = 2) -> MoELayer:
    return MoELayer(ExpertPool(MLPExpert(router.in_features, 4), num_experts), router)


def observe(layer: MoELayer, expert_id: int, x: Tensor, labels: Tensor | None = None) -> None:
    assert isinstance(layer.router, ClasswiseRouter)
    layer.router.observe(layer.pool, layer.namespace, expert_id, x, labels)


def test_score_by_hand():
    layer = layer_of(MeanRouter(1))
    observe(layer, 0, torch.tensor([[0.0], [0.0], [0.0], [1.0]]), torch.tensor([4, 4, 4, 7]))
    observe(layer, 1, torch.tensor([[3.0]]), torch.tensor([5]))
    rows = layer.pool.namespace("gate")
    # expert 0 at x = 2: 3/4 of the samples at distance 2, 1/4 at distance 1; expert 1: all at distance 1
    expected = [math.log(0.75 * math.exp(-2) + 0.25 * math.exp(-1)), -1.0]
    assert_close(layer.router.score(torch.tensor([[2.0]]), rows), torch.tensor([expected]))
    # the gate as a classifier: log n_c + s_c
    joint, labels = layer.router.class_log_joint(torch.tensor([[2.0]]), rows)
    assert labels.tolist() == [4, 7, 5]
    assert_close(joint, torch.tensor([[math.log(3) - 2, math.log(1) - 1, math.log(1) - 1]]))


def test_selection_by_hand():
    layer = layer_of(MeanRouter(1, top_k=2), 3)
    for expert_id, place in enumerate((0.0, 1.0, 5.0)):
        observe(layer, expert_id, torch.tensor([[place]]), torch.tensor([expert_id]))
    routing = layer.route(torch.tensor([[0.25]]))
    # scores -.25, -.75, -4.75: experts 0 and 1, with weights 1 / (1 + e^-.5) and 1 / (1 + e^.5)
    assert routing.choices.tolist() == [[0, 1]]
    assert_close(routing.weight, torch.tensor([1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.5))]))
    assert layer.route(torch.tensor([[0.25]]), top_k=1).weight.tolist() == [1.0]
    assert layer.router.num_active(1) == 1


def test_sum_by_owner_by_hand():
    joint = torch.tensor([[math.log(2.0), math.log(3.0), math.log(5.0)]])
    total = sum_by_owner(joint, torch.tensor([2, 0, 2]), 3, torch.zeros(1, 1))
    assert_close(total, torch.tensor([[math.log(3.0), -math.inf, math.log(7.0)]]))


def test_without_classes_there_is_one_row():
    layer = layer_of(MeanRouter(1, per_class=False))
    observe(layer, 0, torch.tensor([[0.0], [4.0]]))
    rows = layer.pool.namespace("gate", [0])
    assert rows["label"].tolist() == [SINGLE_CLASS]
    assert rows["mean"].tolist() == [[2.0]]


def test_streaming_does_not_depend_on_the_parts():
    x, labels = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    whole, parts = layer_of(MeanRouter(3)), layer_of(MeanRouter(3))
    observe(whole, 0, x, labels)
    for part in torch.arange(20).split(7):
        observe(parts, 0, x[part], labels[part])
    for name, tensor in whole.pool.namespace("gate").items():
        assert_close(parts.pool.namespace("gate")[name], tensor)


def test_a_gate_that_is_not_streaming_takes_one_call():
    layer = layer_of(OnceRouter(1))
    observe(layer, 0, torch.zeros(1, 1), torch.tensor([0]))
    before = layer.pool.expert_state(0)
    with pytest.raises(ValueError, match="expert 0 has been fitted: OnceRouter needs all of its data in one call"):
        observe(layer, 0, torch.ones(1, 1), torch.tensor([0]))
    assert all(torch.equal(layer.pool.expert_state(0)[name], tensor) for name, tensor in before.items())


def test_nothing_observed_changes_nothing():
    layer = layer_of(OnceRouter(1))
    observe(layer, 0, torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))
    assert len(layer.pool.namespace("gate")["label"]) == 0


def test_unfitted_experts_are_chosen_only_alone():
    layer = layer_of(MeanRouter(1))
    assert layer.router.scored_experts(layer.pool.namespace("gate")) is None
    assert layer.route(torch.zeros(2, 1)).choices.tolist() == [[0], [0]]
    observe(layer, 1, torch.full((1, 1), 100.0), torch.tensor([0]))
    assert layer.route(torch.zeros(1, 1)).choices.tolist() == [[1]]
    only_first = torch.tensor([True, False])
    assert layer.route(torch.zeros(1, 1), expert_mask=only_first).choices.tolist() == [[0]]


def test_a_frozen_expert_is_not_written():
    layer = layer_of(MeanRouter(1))
    observe(layer, 0, torch.zeros(1, 1), torch.tensor([0]))
    layer.pool.freeze([0])
    with pytest.raises(ValueError, match="expert 0 is frozen: its statistics are never written"):
        observe(layer, 0, torch.ones(1, 1), torch.tensor([0]))
    assert layer.pool.expert_state(0)["gate.mean"].tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), r"shape \(n, 1\) are needed, got \(2, 2\)"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), r"shape \(n, 1\) are needed, got \(2,\)"),
        (torch.tensor([[torch.nan]]), torch.zeros(1, dtype=torch.int64), "hold NaN or infinity"),
        (torch.zeros(2, 1), None, "one integer label for each of the 2 rows"),
        (torch.zeros(2, 1), torch.zeros(1, dtype=torch.int64), "one integer label for each of the 2 rows"),
        (torch.zeros(2, 1), torch.zeros(2), "one integer label for each of the 2 rows"),
    ],
)
def test_bad_observations(x: Tensor, labels: Tensor | None, message: str):
    layer = layer_of(MeanRouter(1))
    with pytest.raises(ValueError, match=message):
        observe(layer, 0, x, labels)
    assert len(layer.pool.namespace("gate")["label"]) == 0


def test_bad_settings():
    with pytest.raises(ValueError, match="in_features and top_k must be at least 1, got 0 and 1"):
        MeanRouter(0)
    with pytest.raises(ValueError, match="in_features and top_k must be at least 1, got 3 and 0"):
        MeanRouter(3, top_k=0)
    with pytest.raises(ValueError, match="top_k=3 experts cannot be chosen out of 2"):
        layer_of(MeanRouter(1)).route(torch.zeros(1, 1), top_k=3)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        layer_of(MeanRouter(1)).route(torch.zeros(1, 1), top_k=0)


def test_generators_differ_by_seed_and_label():
    draws = {torch.rand(1, generator=class_generator(seed, label)).item() for seed in (0, 1) for label in (-1, 0, 5)}
    assert len(draws) == 6
    assert torch.rand(1, generator=class_generator(3, 2)) == torch.rand(1, generator=class_generator(3, 2))
