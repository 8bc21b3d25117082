import dataclasses

import pytest
import torch

from modmoe import DenseRouter, ExpertPool, MLPExpert, MoELayer, Routing, TopKRouter
from modmoe.analysis.usage import (
    coefficient_of_variation,
    dead_experts,
    dropped_fraction,
    load,
    max_violation,
    usage_metrics,
)
from modmoe.gating.capacity import Capacity

COUNTS = torch.tensor([6, 1, 1, 0])


def test_load_counts_assignments_and_leaves_out_dropped_ones():
    expert_index = torch.tensor([[0, 2], [-1, 2], [3, 0]])
    assert load(expert_index, 5).tolist() == [2, 0, 2, 1, 0]
    assert load(torch.tensor([-1, -1]), 2).tolist() == [0, 0]
    assert load(torch.empty(0, dtype=torch.int64), 2).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("expert_index", "message"),
    [
        (torch.tensor([0, 3]), r"\[-1, 3\), got 0 to 3"),
        (torch.tensor([-2, 0]), r"\[-1, 3\), got -2 to 0"),
        (torch.tensor([0.0]), "must be integers"),
    ],
)
def test_load_refuses(expert_index, message):
    with pytest.raises(ValueError, match=message):
        load(expert_index, 3)


def test_coefficient_of_variation():
    # mean 8 / 4 = 2; variance (16 + 1 + 1 + 4) / 4 = 5.5; sqrt(5.5) / 2 = 1.172604
    assert coefficient_of_variation(COUNTS) == pytest.approx(1.172604, abs=1e-6)
    assert coefficient_of_variation(torch.tensor([3, 3])) == 0.0
    assert coefficient_of_variation(torch.tensor([5])) == 0.0


def test_max_violation():
    # 6 / 2 - 1 = 2
    assert max_violation(COUNTS) == pytest.approx(2.0)
    assert max_violation(torch.tensor([3, 3])) == 0.0


def test_dead_experts():
    assert dead_experts(COUNTS) == [3]
    assert dead_experts(torch.tensor([0, 2, 0])) == [0, 2]
    assert dead_experts(torch.tensor([1])) == []


@pytest.mark.parametrize("measure", [coefficient_of_variation, max_violation, dead_experts])
@pytest.mark.parametrize(
    ("counts", "message"),
    [([[1, 2]], r"got shape \(1, 2\)"), ([], "non-empty"), ([2, -1], "negative"), ([0, 0], "sums to 0")],
)
def test_bad_counts_are_refused(measure, counts, message):
    with pytest.raises(ValueError, match=message):
        measure(torch.tensor(counts))


def capacity_drops(mask: torch.Tensor | None = None) -> Routing:
    """Experts [0, 0, 0, 1, 0, 1, 2, 0] of four, capacity factor 1.25, through a gate that reads them off one-hot x."""
    experts = torch.tensor([0, 0, 0, 1, 0, 1, 2, 0])
    layer = MoELayer(ExpertPool(MLPExpert(4, 2), 4), TopKRouter(4, 1, capacity=Capacity(1.25)))
    with torch.no_grad():
        layer.pool.growable("gate", "weight").banks()[0][0].copy_(torch.eye(4))
    return layer.route(torch.nn.functional.one_hot(experts, 4).float(), mask)


def test_dropped_fraction():
    # C = ceil(8 * 1.25 / 4) = ceil(2.5) = 3: two of expert 0's five are dropped, 2 / 8
    routing = capacity_drops()
    assert dropped_fraction(routing) == 0.25
    assert routing.load.tolist() == [3, 2, 1, 0]
    # the last two are padding: C = ceil(6 * 1.25 / 4) = 2; two of expert 0's four are dropped, 2 / 6
    assert dropped_fraction(capacity_drops(torch.arange(8) < 6)) == pytest.approx(1 / 3)
    assert dropped_fraction(capacity_drops(torch.zeros(8, dtype=torch.bool))) == 0.0
    # closed experts and padding are no drops where there is no limit
    unlimited = dataclasses.replace(routing, requested=None)
    assert dropped_fraction(unlimited) == 0.0


def test_usage_metrics():
    # L, the logits of which tests/analysis/test_specialization.py has the entropies, through a top-1 gate of one-hots
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, -1.0], [0.0, 2.0, 0.0], [1.0, 1.5, 1.0]])
    layer = MoELayer(ExpertPool(MLPExpert(4, 2), 3), TopKRouter(4, 1))
    with torch.no_grad():
        layer.pool.growable("gate", "weight").banks()[0][0].copy_(logits.T)
    metrics = usage_metrics(layer.route(torch.eye(4)))
    # choices 0, 0, 1, 1: counts (2, 2, 0), mean 4/3, variance (4/9 + 4/9 + 16/9) / 3 = 8/9: CV sqrt(8/9) / (4/3)
    assert metrics == {
        "dropped_fraction": 0.0,
        "load_cv": pytest.approx(0.5**0.5, abs=1e-6),
        "max_violation": pytest.approx(0.5),  # 2 / (4/3) - 1
        "dead_experts": 1.0,
        "token_entropy": pytest.approx(0.849702, abs=1e-5),
        "mean_entropy": pytest.approx(1.001238, abs=1e-5),
        "token_expert_information": pytest.approx(0.151535, abs=1e-5),
    }
    assert "task_expert_information" not in metrics


def test_usage_metrics_with_tasks_leave_out_padding_and_drops():
    routing = Routing.assigned(torch.tensor([2, 0, 0, 1, 1]), 3)
    routing.expert_index = torch.tensor([-1, 0, 0, 1, 1])
    routing.mask = torch.tensor([False, True, True, True, True])
    routing.probs[0] = torch.nan
    metrics = usage_metrics(routing, tasks=torch.tensor([-7, 0, 0, 1, 1]))
    # experts 0 and 1 tell tasks 0 and 1 exactly: ln 2; so do the tokens' certain probabilities of experts: ln 2 - 0
    assert metrics["task_expert_information"] == pytest.approx(0.693147, abs=1e-6)
    assert metrics["token_expert_information"] == pytest.approx(0.693147, abs=1e-6)
    metrics = usage_metrics(routing, tasks=torch.tensor([0, 0, 1, 0, 1]))
    assert metrics["task_expert_information"] == pytest.approx(0.0, abs=1e-9)


def test_usage_metrics_of_a_dense_gate_are_those_of_perfect_balance():
    layer = MoELayer(ExpertPool(MLPExpert(4, 2), 3), DenseRouter(4))
    metrics = usage_metrics(layer.route(torch.randn(6, 4)))
    assert (metrics["load_cv"], metrics["max_violation"], metrics["dead_experts"]) == (0.0, 0.0, 0.0)


def test_usage_metrics_refuse():
    routing = Routing.assigned(torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match=r"a task for each of 2 tokens is needed, got \(3,\)"):
        usage_metrics(routing, torch.tensor([0, 1, 1]))
    routing.expert_index = torch.tensor([-1, -1])
    with pytest.raises(ValueError, match="sums to 0: no token was assigned"):
        usage_metrics(routing)
