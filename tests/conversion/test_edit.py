"""Within a pool: removal equals masking, what merging computes, and k changed afterwards."""

import copy
import math
from itertools import permutations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from modmoe import (
    AttentionRouter,
    BaseAssignmentRouter,
    ConvExpert,
    CosineRouter,
    DeepSeekV2Router,
    DeepSeekV3Router,
    DenseRouter,
    ExpertChoiceRouter,
    ExpertPool,
    GaussianRouter,
    GShardRouter,
    HashRouter,
    LoryRouter,
    MLPExpert,
    MoELayer,
    NoisyTopKRouter,
    ReLURouter,
    SmearRouter,
    SoftRouter,
    StickRouter,
    SwiGLUExpert,
    SwitchRouter,
    TopKRouter,
    grow,
    sync_optimizer,
)
from modmoe.conversion import change_top_k, measure_load, merge_experts, prune_unused
from modmoe.growable import RowSpec

D, H = 4, 6
KINDS = [
    MLPExpert(D, H, 3, activation="tanh"),
    MLPExpert(D, H, activation="gelu_tanh", bias=False),
    SwiGLUExpert(D, H, 3),
    SwiGLUExpert(D, H, bias=True),
]


def make_layer(router, kind=None, num_experts=4, seed=0) -> MoELayer:
    """Float64, with gate rows that differ enough to matter."""
    torch.manual_seed(seed)
    layer = MoELayer(ExpertPool(kind or MLPExpert(D, H), num_experts), router).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def set_row(layer, namespace, name, expert_id, value):
    """Write one live expert's row; the values are broadcast."""
    with torch.no_grad():
        for tensor, rows, _ in layer.pool.growable(namespace, name).banks():
            for index, row in enumerate(rows):
                if row.owner == expert_id:
                    tensor[index] = torch.as_tensor(value, dtype=tensor.dtype)


def copy_expert(layer, source, target, namespaces=("expert",)):
    """Give one expert the rows of another."""
    for namespace in namespaces:
        for name, row in layer.pool.namespace(namespace, [source]).items():
            set_row(layer, namespace, name, target, row[0].detach().clone())


# -- removing an expert is masking it ----------------------------------------------------------------------------------

ALIKE = {
    "top-2": lambda: TopKRouter(D, 2),
    "top-1": lambda: TopKRouter(D, 1),
    "top-1 renormalised": lambda: TopKRouter(D, 1, renormalize=True),
    "softmax before top-2": lambda: TopKRouter(D, 2, order="softmax_topk", renormalize=False),
    "dense": lambda: DenseRouter(D),
    "switch": lambda: SwitchRouter(D, capacity=None),
    "gshard": lambda: GShardRouter(D, capacity=None),
    "noisy": lambda: NoisyTopKRouter(D, 2),
    "cosine": lambda: CosineRouter(D, top_k=2),
    "deepseek v2": lambda: DeepSeekV2Router(D, 2),
    "deepseek v3": lambda: DeepSeekV3Router(D, 2),
    "attention": lambda: AttentionRouter(D, 2),
    "relu": lambda: ReLURouter(D),
    "base": lambda: BaseAssignmentRouter(D),
    "soft": lambda: SoftRouter(D, 2),
    "smear": lambda: SmearRouter(D),
    "lory": lambda: LoryRouter(D, 2),
}


@pytest.mark.parametrize("name", ALIKE)
def test_pruning_an_expert_equals_its_logit_at_minus_infinity(name):
    layer = make_layer(ALIKE[name]()).eval()
    x = torch.randn(3, 7, D, dtype=torch.float64)
    open_experts = torch.tensor([True, False, True, True])
    whole, masked = layer(x), layer(x, expert_mask=open_experts)
    assert not torch.allclose(whole, masked)  # expert 1 mattered
    load = torch.tensor([9, 0, 1, 3])
    assert prune_unused(layer, load) == [1]
    assert layer.pool.ids == (0, 2, 3)
    assert_close(layer(x), masked, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["top-2", "dense"])
def test_it_also_equals_a_gate_row_that_scores_minus_infinity(name):
    # with a constant feature the removed expert's score can be pushed down by hand
    layer = make_layer(ALIKE[name]())
    x = torch.randn(20, D, dtype=torch.float64)
    x[:, 0] = 1.0
    set_row(layer, "gate", "weight", 1, [-1e9, 0.0, 0.0, 0.0])
    low = layer(x)
    layer.remove([1])
    assert_close(layer(x), low, atol=1e-12, rtol=1e-12)


def test_a_capacity_counts_the_experts_that_are_there():
    # C = ceil(T factor / E): with 8 tokens 2 for each of 4 experts, and 3 for each of 3 (8/3 = 2.67)
    layer = make_layer(SwitchRouter(D), num_experts=4).eval()
    layer.router.capacity = type(layer.router.capacity)(1.0)
    for expert_id in range(4):
        set_row(layer, "gate", "weight", expert_id, [float(expert_id == 0), 0.0, 0.0, 0.0])
    x = torch.ones(8, D, dtype=torch.float64)
    assert layer.route(x).load.tolist() == [2, 0, 0, 0]
    prune_unused(layer, torch.tensor([2, 1, 1, 0]))
    assert layer.route(x).load.tolist() == [3, 0, 0]


def test_prune_by_hand():
    shares = torch.tensor([90, 3, 2, 5])  # of 100; below .05 are 2 and 1, the least used first
    layer = make_layer(TopKRouter(D, 1))
    states = {i: layer.pool.expert_state(i) for i in (0, 3)}
    assert prune_unused(layer, shares, min_share=0.05) == [2, 1]  # a share of just the minimum stays
    assert layer.pool.ids == (0, 3)
    for expert_id, state in states.items():
        assert all(torch.equal(row, state[name]) for name, row in layer.pool.expert_state(expert_id).items())
    layer = make_layer(TopKRouter(D, 1))
    assert prune_unused(layer, shares, min_share=0.04, keep=[2]) == [1]
    assert prune_unused(layer, torch.tensor([90, 2, 5]), min_share=0.01) == []
    assert layer.pool.ids == (0, 2, 3)


@pytest.mark.parametrize(("router", "removed"), [(TopKRouter(D, 3), [3]), (TopKRouter(D, 1), [3, 2, 1])])
def test_as_many_stay_as_the_router_needs(router, removed):
    layer = make_layer(router)
    assert prune_unused(layer, torch.tensor([10, 3, 2, 1]), min_share=0.5) == removed
    assert layer.pool.num_experts == 4 - len(removed)


def test_pruning_by_measured_load():
    layer = make_layer(TopKRouter(D, 1))
    set_row(layer, "gate", "weight", 2, [-1e9, 0.0, 0.0, 0.0])
    x = torch.randn(50, D, dtype=torch.float64).abs()
    model = nn.Sequential(layer)
    routing = layer.route(x)
    unused = [expert_id for expert_id in range(4) if not (routing.choices == expert_id).any()]
    chosen = layer.compute(x, routing)
    for name, load in measure_load(model, [x]).items():
        assert prune_unused(model.get_submodule(name), load, min_share=1e-6) == unused
    assert 2 in unused
    assert_close(layer.compute(x, layer.route(x)), chosen, atol=1e-12, rtol=1e-12)


def test_refused_pruning_changes_nothing():
    layer = make_layer(TopKRouter(D, 1))
    for arguments, message in (
        ((torch.ones(3),), r"a load of each of 4 experts is needed, got \(3,\)"),
        ((torch.tensor([1, 0, -1, 1]),), "must not be negative"),
        ((torch.zeros(4),), "positive somewhere"),
        ((torch.tensor([1, 0, 0, 1]), 1.5), r"min_share must be in \[0, 1\], got 1.5"),
        ((torch.tensor([1, 0, 0, 1]), 0.1, [7]), r"no experts with ids \[7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_unused(layer, *arguments)
    assert layer.pool.ids == (0, 1, 2, 3)


# -- merging: the experts ----------------------------------------------------------------------------------------------


def test_merge_by_hand():
    layer = make_layer(TopKRouter(D, 1), num_experts=3)
    for expert_id, value in ((0, 1.0), (1, 5.0)):
        for name in layer.pool.namespace("expert"):
            set_row(layer, "expert", name, expert_id, value)
        set_row(layer, "gate", "weight", expert_id, value)
    halves, loads = copy.deepcopy(layer), copy.deepcopy(layer)
    merge_experts(halves, 0, 1)
    merge_experts(loads, 0, 1, weights=(30, 10))
    # (1 + 5) / 2 = 3; (30 * 1 + 10 * 5) / 40 = 2
    for merged, value in ((halves, 3.0), (loads, 2.0)):
        assert merged.pool.ids == (0, 2)
        assert all(torch.equal(row, torch.full_like(row, value)) for row in merged.pool.expert_state(0).values())
        other = layer.pool.expert_state(2)
        assert all(torch.equal(row, other[name]) for name, row in merged.pool.expert_state(2).items())


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_merging_with_a_permuted_copy_gives_the_expert_back(kind):
    layer = make_layer(DenseRouter(D), kind)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    copy_expert(layer, 1, 2)
    for name, spec in layer.pool.specs("expert").items():
        if H in layer.pool.expert_state(2)[f"expert.{name}"].shape[1:]:
            axis = spec.shape.index("hidden_features")
            row = layer.pool.expert_state(1)[f"expert.{name}"][0]
            set_row(layer, "expert", name, 2, row.index_select(axis, order))
    x = torch.randn(9, D, dtype=torch.float64)
    output = layer.expert_output(1, x)
    assert_close(layer.expert_output(2, x), output, atol=1e-12, rtol=1e-12)  # the same function
    before = layer.pool.expert_state(1)
    plain = copy.deepcopy(layer)
    merge_experts(layer, 1, 2, align=True)
    assert all(
        torch.equal(row, before[name]) for name, row in layer.pool.expert_state(1).items() if name.startswith("expert")
    )
    merge_experts(plain, 1, 2)
    assert (plain.expert_output(1, x) - output).abs().max() > 0.1  # without it the average is another function


def test_alignment_is_the_closest_order():
    # a hidden size of 4: all 24 orders tried one by one
    layer = make_layer(DenseRouter(D), MLPExpert(D, 4, 2), num_experts=2, seed=5)
    first, second = (
        {name.removeprefix("expert."): row[0] for name, row in layer.pool.expert_state(i).items() if "expert." in name}
        for i in (0, 1)
    )

    def reorder(order):
        order = list(order)
        return {
            "w_in": second["w_in"][:, order],
            "b_in": second["b_in"][order],
            "w_out": second["w_out"][order],
            "b_out": second["b_out"],
        }

    def distance(order):
        return sum((first[name] - row).square().sum() for name, row in reorder(order).items())

    best = reorder(min(permutations(range(4)), key=distance))
    merge_experts(layer, 0, 1, align=True)
    for name, row in best.items():
        assert_close(layer.pool.expert_state(0)[f"expert.{name}"][0], (first[name] + row) / 2)


# -- merging: the gates ------------------------------------------------------------------------------------------------


def test_a_dense_gate_by_hand():
    layer = make_layer(DenseRouter(D), num_experts=3)
    for expert_id, weight, bias in ((0, 1.0, math.log(2)), (1, 3.0, math.log(6))):
        set_row(layer, "gate", "weight", expert_id, weight)
        set_row(layer, "gate", "bias", expert_id, bias)
    merge_experts(layer, 0, 1, weights=(3, 1))
    state = layer.pool.expert_state(0)
    # weights (3 * 1 + 1 * 3) / 4 = 1.5; bias log(2 + 6) = log 8
    assert_close(state["gate.weight"], torch.full((1, D), 1.5, dtype=torch.float64))
    assert state["gate.bias"].item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("make_router", [DenseRouter, ReLURouter, SmearRouter], ids=lambda r: r.__name__)
def test_equal_experts_merge_without_a_trace(make_router):
    layer = make_layer(make_router(D))
    copy_expert(layer, 1, 3, ("expert", "gate"))
    if make_router is not ReLURouter:
        set_row(layer, "gate", "bias", 3, -0.7)  # equal gate weights suffice
    x = torch.randn(2, 9, D, dtype=torch.float64)
    before = layer(x)
    merge_experts(layer, 1, 3)
    assert_close(layer(x), before, atol=1e-12, rtol=1e-12)


def test_a_cosine_gate_takes_directions():
    layer = make_layer(CosineRouter(D, 2))
    set_row(layer, "gate", "embedding", 0, [10.0, 0.0])
    set_row(layer, "gate", "embedding", 1, [0.0, 0.1])
    merge_experts(layer, 0, 1, weights=(1, 3))
    # (1, 0) and (0, 1) with weights 1/4 and 3/4
    assert_close(layer.pool.expert_state(0)["gate.embedding"], torch.tensor([[0.25, 0.75]], dtype=torch.float64))


def test_slots_are_merged_by_direction():
    layer = make_layer(SoftRouter(D, 2))
    set_row(layer, "gate", "phi", 0, torch.tensor([[2.0, 0, 0, 0], [0, 2.0, 0, 0]]))
    set_row(layer, "gate", "phi", 1, torch.tensor([[0, 0, 5.0, 0], [0, 9.0, 0, 0]]))
    merge_experts(layer, 0, 1)
    expected = torch.tensor([[[0.5, 0, 0.5, 0], [0, 1.0, 0, 0]]], dtype=torch.float64)
    assert_close(layer.pool.expert_state(0)["gate.phi"], expected)


@pytest.mark.parametrize(
    "make_router",
    [
        lambda: NoisyTopKRouter(D, 2),
        lambda: DeepSeekV3Router(D, 2),
        lambda: AttentionRouter(D, 2),
        lambda: ExpertChoiceRouter(D),
        lambda: BaseAssignmentRouter(D),
    ],
)
def test_other_linear_gates_take_the_mean(make_router):
    layer = make_layer(make_router())
    if isinstance(layer.router, DeepSeekV3Router):
        layer.pool.growable("gate", "selection_bias").write(0, torch.tensor([8.0], dtype=torch.float64))
    states = [layer.pool.expert_state(i) for i in (0, 2)]
    merge_experts(layer, 0, 2, weights=(1, 3))
    for name, row in layer.pool.expert_state(0).items():
        assert_close(row, (states[0][name] + 3 * states[1][name]) / 4, atol=1e-12, rtol=1e-12)
    assert layer(torch.randn(2, 6, D, dtype=torch.float64)).shape == (2, 6, D)


def test_a_gate_fitted_to_data_has_seen_what_both_have():
    x = torch.randn(30, D, dtype=torch.float64)
    y = torch.tensor([0, 1, 2])[torch.arange(30) % 3]
    layer, whole = (make_layer(GaussianRouter(D), num_experts=2) for _ in range(2))
    layer.observe(0, x[y < 2][:10], y[y < 2][:10])
    layer.observe(1, x[y < 2][10:], y[y < 2][10:])
    layer.observe(1, x[y == 2], y[y == 2])  # a class that only one has
    whole.observe(0, x, y)
    merge_experts(layer, 0, 1)
    assert layer.pool.expert_state(0)["gate.label"].tolist() == [0, 1, 2]
    test = torch.randn(5, D, dtype=torch.float64)
    assert_close(layer.expert_score(0, test), whole.expert_score(0, test), atol=1e-10, rtol=1e-10)


# -- merging: the books ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tasks", "merged"), [(("a", "a"), "a"), (("a", "b"), None), (("a", None), None)])
def test_the_task_of_the_merged_expert(tasks, merged):
    layer = make_layer(DenseRouter(D), num_experts=3)
    for expert_id, task in enumerate(tasks):
        layer.pool.assign_task(expert_id, task)
    layer.freeze([1])  # what is removed may be frozen
    merge_experts(layer, 0, 1)
    assert (layer.pool.record(0).task, layer.pool.record(0).frozen) == (merged, False)


def test_a_merged_layer_trains_saves_and_loads():
    layer = make_layer(TopKRouter(D, 2))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    x = torch.randn(8, D, dtype=torch.float64)

    def step():
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()

    step()
    moments = optimizer.state[layer.pool.growable("expert", "w_in").banks()[0][0]]["exp_avg"].clone()
    merge_experts(layer, 1, 3)
    sync_optimizer(optimizer, layer)
    assert torch.equal(
        optimizer.state[layer.pool.growable("expert", "w_in").banks()[0][0]]["exp_avg"], moments[[0, 1, 2]]
    )
    step()
    fresh = make_layer(TopKRouter(D, 2), seed=3)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.pool.ids == (0, 1, 2)
    assert torch.equal(fresh(x), layer(x))


def test_refused_merging_changes_nothing():
    def refuses(layer, message, *arguments, **options):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match=message):
            merge_experts(layer, *arguments, **options)
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())

    layer = make_layer(TopKRouter(D, 2))
    layer.freeze([3])
    refuses(layer, "two experts are needed, got 1 twice", 1, 1)
    refuses(layer, r"no experts with ids \[9\]", 1, 9)
    refuses(layer, "expert 3 is frozen, and merging would change it", 3, 1)
    refuses(layer, r"weights must not be negative, and positive somewhere, got \(0, 0\)", 0, 1, weights=(0, 0))
    refuses(layer, r"got \(2, -1\)", 0, 1, weights=(2, -1))
    layer.add_experts(1, hidden_features=9)
    refuses(layer, r"experts of sizes {'hidden_features': 6} and {'hidden_features': 9} have no average", 0, 4)
    layer.pool.declare("usage", {"count": RowSpec((), trainable=False)})
    refuses(layer, r"nothing says how the rows of \['usage'\] are merged", 0, 1)
    refuses(make_layer(TopKRouter(D, 4)), "top_k=4 experts cannot be chosen out of 3", 0, 1)
    refuses(make_layer(HashRouter(D)), "nothing says how the gate rows of HashRouter are merged", 0, 1)
    refuses(make_layer(StickRouter(D, 3)), "StickRouter cannot merge experts", 0, 1)
    conv = make_layer(DenseRouter(16), ConvExpert((1, 4, 4), (2,)))
    refuses(conv, "an MLPExpert or a SwiGLUExpert has hidden units to align, got ConvExpert", 0, 1, align=True)


# -- changing k --------------------------------------------------------------------------------------------------------


def test_another_k_is_the_k_of_every_call():
    layer = make_layer(TopKRouter(D, 1))
    model = nn.Sequential(layer, nn.Tanh(), make_layer(TopKRouter(D, 3), seed=1))
    x = torch.randn(9, D, dtype=torch.float64)
    expected = model[2](layer(x, top_k=2).tanh(), top_k=2)
    assert change_top_k(model, 2) == ["0", "2"]
    assert_close(model(x), expected, atol=1e-12, rtol=1e-12)
    assert layer.routing.choices.shape == (9, 2)
    # the k largest logits by hand, softmax over them
    logits = x @ layer.pool.namespace("gate")["weight"].T
    values, best = logits.sort(descending=True)
    assert torch.equal(layer.routing.choices, best[:, :2])
    assert_close(layer.routing.weight.view(9, 2), values[:, :2].softmax(1))
    assert change_top_k(layer, 4) == [""]
    assert layer.router.num_active(4) == 4


def test_growth_by_copies_is_allowed_where_it_keeps_the_function_and_only_there():
    x = torch.randn(9, D, dtype=torch.float64)
    layer = make_layer(TopKRouter(D, 1, renormalize=True))
    grow(layer, 1, init="copy")
    change_top_k(layer, 2)
    with pytest.raises(ValueError, match="init='copy' cannot keep the layer's function"):
        grow(layer, 1, init="copy")  # the copy would take the place of another expert
    change_top_k(layer, 1)
    before = layer(x)
    grow(layer, 1, init="copy")
    assert_close(layer(x), before, atol=1e-12, rtol=1e-12)
    # with renormalize=None one expert is weighed by its probability, which a copy halves
    plain = make_layer(TopKRouter(D, 2))
    change_top_k(plain, 1)
    with pytest.raises(ValueError, match="init='copy' cannot keep"):
        grow(plain, 1, init="copy")


@pytest.mark.parametrize("make_router", [GaussianRouter, ReLURouter])
def test_other_routers_with_a_k(make_router):
    layer = make_layer(make_router(D))
    change_top_k(layer, 3)
    assert layer.router.top_k == 3
    assert layer.router.num_active(4) == 3
    assert layer(torch.randn(5, D, dtype=torch.float64)).shape == (5, D)


def test_refused_changes_of_k_change_nothing():
    model = nn.ModuleDict({"a": make_layer(TopKRouter(D, 2)), "b": make_layer(TopKRouter(D, 1), num_experts=2)})
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"top_k={k} experts cannot be chosen out of . in '[ab]'"):
            change_top_k(model, k)
    model["c"] = make_layer(DenseRouter(D))
    model["d"] = make_layer(HashRouter(D))
    with pytest.raises(ValueError, match=r"these routers have no top_k: 'c' \(DenseRouter\), 'd' \(HashRouter\)"):
        change_top_k(model, 1)
    with pytest.raises(ValueError, match="Linear contains no MoELayer"):
        change_top_k(nn.Linear(2, 2), 1)
    assert [model[name].router.top_k for name in "ab"] == [2, 1]
