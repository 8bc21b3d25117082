"""What MoELayer refuses, and that nothing is changed then."""

import pytest
import torch
from torch import Tensor, nn

from modmoe import (
    ExpertPool,
    GaussianRouter,
    MLPExpert,
    MoELayer,
    NonFiniteError,
    TopKRouter,
)

D = 4


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


NAN = torch.zeros(2, 3, D).index_fill(1, torch.tensor([1]), torch.nan)

REFUSED = {
    "feature_size": (torch.zeros(2, 3, D + 1), {}, r"x of shape \(..., 4\) is needed, got \(2, 3, 5\)"),
    "scalar": (torch.tensor(1.0), {}, r"x of shape \(..., 4\) is needed, got \(\)"),
    "float64": (torch.zeros(2, 3, D).double(), {}, "x has dtype torch.float64, the experts have torch.float32"),
    "bfloat16": (torch.zeros(2, 3, D).bfloat16(), {}, "x has dtype torch.bfloat16"),
    "integers": (torch.zeros(2, 3, D).long(), {}, "x has dtype torch.int64"),
    "nan": (NAN, {}, "non-finite input at token 1 of 6"),
    "k_0": (None, {"top_k": 0}, "top_k must be at least 1, got 0"),
    "k_negative": (None, {"top_k": -2}, "top_k must be at least 1, got -2"),
    "k_above": (None, {"top_k": 4}, "top_k=4 experts cannot be chosen out of 3"),
    "mask_shape": (None, {"mask": torch.ones(3, 2, dtype=torch.bool)}, r"bool mask of shape \(2, 3\) is needed"),
    "mask_dtype": (None, {"mask": torch.ones(2, 3)}, r"bool mask of shape \(2, 3\) is needed, got torch.float32"),
    "expert_mask_shape": (None, {"expert_mask": torch.ones(4, dtype=torch.bool)}, r"bool expert_mask of shape \(3,\)"),
    "expert_mask_of_entries": (
        None,
        {"expert_mask": torch.ones(2, 3, dtype=torch.bool)},
        r"bool expert_mask of shape \(3,\) or \(2, 3, 3\) is needed",
    ),
    "expert_mask_dtype": (None, {"expert_mask": torch.ones(3)}, "bool expert_mask"),
    "all_masked": (None, {"expert_mask": torch.zeros(3, dtype=torch.bool)}, "every expert is masked for token 0 of 6"),
    "unknown_task": (None, {"task_ids": "zebra"}, r"no expert belongs to task \['zebra'\], the pool has \['a'\]"),
    "unknown_tasks": (None, {"task_ids": ["a", 7]}, r"no expert belongs to task \[7\], the pool has \['a'\]"),
    "task_count": (None, {"task_ids": ["a"] * 5}, r"5 task ids for 2 entries \(6 tokens\)"),
}


@pytest.mark.parametrize(("x", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_input_changes_nothing(x, options, message):
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(D, 8), 3, task="a"), TopKRouter(D, 2))
    good = torch.randn(2, 3, D)
    layer(good)
    before, routing = snapshot(layer), layer.routing
    with pytest.raises(ValueError, match=message) as error:
        layer(good if x is None else x, **options)
    assert isinstance(error.value, NonFiniteError) == message.startswith("non-finite")
    assert_unchanged(layer, before)
    assert layer.routing is routing
    assert layer(good).shape == (2, 3, D)


def test_a_pool_without_experts():
    for num_experts in (0, -1):
        with pytest.raises(ValueError, match=f"num_experts must be at least 1, got {num_experts}"):
            ExpertPool(MLPExpert(D, 8), num_experts)


def test_a_layer_that_does_not_fit_declares_nothing():
    pool = ExpertPool(MLPExpert(D, 8), 3)
    before = snapshot(pool)
    for router, options, message in (
        (TopKRouter(D + 1, 2), {}, "the router takes 5 features, the experts take 4"),
        (TopKRouter(D, 4), {}, "top_k=4 experts cannot be chosen out of 3"),
        (TopKRouter(D, 2), {"backend": "cuda"}, "unknown backend 'cuda', choose one of"),
    ):
        with pytest.raises(ValueError, match=message):
            MoELayer(pool, router, **options)
    assert pool.namespaces == ("expert",)
    assert_unchanged(pool, before)


def test_removing_more_than_k_allows(layer_of):
    layer = layer_of(num_experts=3, top_k=2)
    before = snapshot(layer)
    with pytest.raises(ValueError, match="top_k=2 experts cannot be chosen out of 1"):
        layer.remove([0, 2])
    with pytest.raises(ValueError, match=r"no experts with ids \[9\]"):
        layer.remove([1, 9])
    with pytest.raises(ValueError, match="a pool keeps at least one expert"):
        layer.remove([0, 1, 2])
    assert layer.pool.ids == (0, 1, 2)
    assert_unchanged(layer, before)
    layer.remove([1])
    assert layer(torch.randn(2, D)).shape == (2, D)


def test_a_routing_of_another_batch_or_pool(layer_of):
    layer = layer_of()
    x = torch.randn(5, D)
    routing = layer.route(x)
    with pytest.raises(ValueError, match="the routing is of 5 tokens and 3 experts, got 4 tokens and 3 experts"):
        layer.compute(x[:4], routing)
    layer.add_experts(1)
    with pytest.raises(ValueError, match="the routing is of 5 tokens and 3 experts, got 5 tokens and 4 experts"):
        layer.compute(x, routing)


def test_compute_refuses_another_precision(layer_of):
    layer = layer_of()
    routing = layer.route(torch.randn(5, D))
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64, the experts have torch\.float32"):
        layer.compute(torch.randn(5, D).double(), routing)


def test_a_density_gate_on_tasks_that_have_not_been_observed():
    # A new task is trained before its expert has any statistics, beside experts that have.
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(D, 8), 1, task="a"), GaussianRouter(D))
    layer.observe(0, torch.randn(20, D), torch.zeros(20, dtype=torch.int64))
    layer.freeze([0])
    layer.add_experts(1, task="b")
    layer(torch.randn(4, D), task_ids="b").sum().backward()
    assert layer.routing.choices.tolist() == [[1]] * 4
    assert all(parameter.grad is not None for parameter in layer.parameters())
