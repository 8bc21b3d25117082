"""The pool: ids, freezing, copies, books, and errors that change nothing."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from modmoe import (
    DenseRouter,
    ExpertPool,
    GaussianRouter,
    GrowableBuffer,
    MLPExpert,
    MoELayer,
    ReLURouter,
    RowSpec,
    TopKRouter,
    sync_optimizer,
)
from modmoe.catalog import example_experts, layer_class

D, H = 3, 4
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
}


def make_pool(num_experts: int = 3, **kwargs) -> ExpertPool:
    torch.manual_seed(0)
    return ExpertPool(MLPExpert(D, H), num_experts, **kwargs)


def make_layer(num_experts: int = 3, router=None) -> MoELayer:
    return MoELayer(make_pool(num_experts), router or DenseRouter(D))


def snapshot(module: nn.Module) -> tuple[dict, list[int]]:
    """All values with the books, and which tensor objects hold the parameters."""
    return {key: value.clone() for key, value in module.state_dict().items()}, [id(p) for p in module.parameters()]


def assert_unchanged(module: nn.Module, before: tuple[dict, list[int]]) -> None:
    values, identities = snapshot(module)
    assert values.keys() == before[0].keys()
    assert all(torch.equal(values[key], before[0][key]) for key in values)
    assert identities == before[1]


def assert_same_state(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for key in want:
        assert torch.equal(got[key], want[key]), key


# -- the book --------------------------------------------------------------------------------------


def test_ids_by_hand():
    pool = make_pool(2, task="a")
    assert pool.ids == (0, 1)
    assert pool.add_experts(3, task=7) == [2, 3, 4]
    pool.freeze([3, 0])
    pool.remove([4, 1])
    assert pool.add_experts() == [5]  # 4 is gone, its id is not used again
    assert pool.ids == (0, 2, 3, 5)
    assert pool.frozen_ids == (0, 3)
    assert pool.tasks() == ("a", 7, 7, None)
    assert pool.num_experts == 4
    pool.assign_task(5, "z")
    assert pool.record(5).task == "z"
    pool.unfreeze([3, 0, 3])
    assert pool.frozen_ids == ()


def test_rows_of_an_expert_by_hand():
    pool = make_pool(1)
    pool.add_experts(1, hidden_features=6)
    shapes = {name: tuple(value.shape) for name, value in pool.expert_state(1).items()}
    assert shapes == {
        "expert.w_in": (1, 3, 6),
        "expert.b_in": (1, 6),
        "expert.w_out": (1, 6, 3),
        "expert.b_out": (1, 3),
    }
    assert [group.ids for group in pool.groups()] == [(0,), (1,)]
    assert pool.record(1).sizes == {"hidden_features": 6}


def test_groups_join_live_cohorts_and_read_frozen_banks_in_place():
    pool = make_pool(2)
    pool.add_experts(2)
    pool.add_experts(1, hidden_features=6)
    pool.freeze([1])
    groups = {(group.ids, group.positions, group.frozen) for group in pool.groups()}
    assert groups == {((2, 3, 0), (2, 3, 0), False), ((1,), (1,), True), ((4,), (4,), False)}
    frozen = next(group for group in pool.groups() if group.frozen)
    assert frozen.tensors["w_in"] is pool.growable("expert", "w_in").frozen_3x4


def test_namespace_declared_late_gives_every_expert_its_rows():
    pool = make_pool(2)
    pool.add_experts(1, hidden_features=6)
    pool.freeze([0])
    pool.declare(
        "late", {"weight": RowSpec((2,)), "count": RowSpec((), trainable=False), "head": RowSpec((5,), count=0)}
    )
    state = pool.expert_state(0)
    assert state["late.weight"].shape == (1, 2)
    assert "late.head" not in state
    weight = pool.growable("late", "weight")
    # one cohort for each bank of experts, (2), (1), (0); the last one was frozen at once
    assert {name for name, _ in weight.named_parameters()} == {"c0", "c1"}
    assert weight.frozen_2.shape == (1, 2)
    assert isinstance(pool.growable("late", "count"), GrowableBuffer)
    with pytest.raises(ValueError, match="has a namespace 'late' already"):
        pool.declare("late", {})


def test_add_rows_belong_to_the_expert():
    pool = make_pool(2)
    pool.declare("head", {"weight": RowSpec((2,), count=0), "label": RowSpec((), trainable=False, count=0)})
    pool.add_rows("head", 1, {"weight": torch.ones(2, 2), "label": torch.tensor([3.0, 4.0])})
    pool.add_rows("head", 0, {"weight": torch.zeros(1, 2), "label": torch.tensor([5.0])})
    pool.add_rows("head", 1, {"weight": torch.ones(1, 2), "label": torch.tensor([6.0])})
    assert pool.expert_state(1)["head.label"].tolist() == [3, 4, 6]
    rows = pool.namespace("head")
    assert rows["label"].tolist() == [5, 3, 4, 6]
    assert rows.owner("label").tolist() == [0, 1, 1, 1]
    pool.freeze([1])
    assert rows["label"].tolist() == [5, 3, 4, 6]
    pool.remove([1])
    assert pool.namespace("head")["label"].tolist() == [5]


# -- what freezing promises ------------------------------------------------------------------------


class TwoGates(nn.Module):
    """A dense layer and a density layer on one pool."""

    def __init__(self):
        super().__init__()
        pool = make_pool(2)
        self.dense = MoELayer(pool, DenseRouter(D))
        self.density = MoELayer(pool, GaussianRouter(D))

    def forward(self, x):
        return self.dense(x) + self.density(x)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_frozen_experts_are_bit_identical_after_four_more_tasks(make):
    model = TwoGates()
    pool = model.dense.pool
    optimizer = make(model.parameters())
    ids, frozen = list(pool.ids), {}
    scores = {}
    probe = torch.randn(7, D)
    for task in range(5):
        torch.manual_seed(task)
        x = torch.randn(30, D) + task
        y = torch.randn(30, D)
        start = {expert_id: pool.expert_state(expert_id) for expert_id in ids}
        for expert_id in ids:
            model.density.observe(expert_id, x, torch.arange(30) % 2)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        for expert_id in ids:
            now = pool.expert_state(expert_id)
            assert all(not torch.equal(now[name], start[expert_id][name]) for name in start[expert_id])
        for expert_id, state in frozen.items():
            assert_same_state(pool.expert_state(expert_id), state)
            position = pool.ids.index(expert_id)
            for layer in (model.dense, model.density):
                column = layer.router.score(probe, pool.namespace(layer.namespace))[:, position]
                assert_close(column, scores[expert_id, layer.namespace], rtol=1e-6, atol=1e-6)
        # freeze between backward and step as well: what is left in .grad must not reach frozen rows
        (model(x) - y).square().mean().backward()
        pool.freeze(ids)
        for expert_id in ids:
            frozen[expert_id] = pool.expert_state(expert_id)
            assert {"gate.weight", "gate.bias", "gate_2.mean", "gate_2.scatter"} <= frozen[expert_id].keys()
            for layer in (model.dense, model.density):
                column = layer.router.score(probe, pool.namespace(layer.namespace))[:, pool.ids.index(expert_id)]
                scores[expert_id, layer.namespace] = column.detach()
        optimizer.step()
        ids = pool.add_experts(2)
        sync_optimizer(optimizer, model)
    assert len(frozen) == 10


def test_frozen_statistics_refuse_more_data():
    model = TwoGates()
    pool = model.dense.pool
    model.density.observe(0, torch.randn(6, D), torch.arange(6) % 2)
    pool.freeze([0])
    before = snapshot(model)
    with pytest.raises(ValueError, match="expert 0 is frozen"):
        model.density.observe(0, torch.randn(6, D), torch.arange(6) % 3)
    assert_unchanged(model, before)


def test_eval_changes_nothing():
    model = TwoGates()
    model.density.observe(1, torch.randn(6, D), torch.arange(6) % 2)
    model.dense.pool.freeze([0])
    model.eval()
    before = snapshot(model)
    for _ in range(3):
        model(torch.randn(9, D))
    assert_unchanged(model, before)


# -- growth that keeps the function ----------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("source", [None, 0])
@pytest.mark.parametrize("router", [DenseRouter(D), TopKRouter(D, top_k=1, renormalize=True)], ids=["dense", "top1"])
def test_a_copy_keeps_every_output(router, source, n):
    layer = make_layer(3, copy.deepcopy(router))
    layer.freeze([1])
    x = 3 * torch.randn(50, D)
    before = layer(x)
    new = layer.add_experts(n, init="copy", source=source)
    assert_close(layer(x), before, rtol=0, atol=1e-6)
    assert new == list(range(3, 3 + n))
    original = layer.pool.expert_state(2 if source is None else source)
    for expert_id in new:
        assert_same_state(layer.pool.expert_state(expert_id), original)


def test_the_split_by_hand():
    layer = make_layer(1)
    layer.add_experts(3, init="copy")
    # one expert's bias 0 becomes four of -log 4: 4 exp(-log 4) = exp(0)
    assert layer.pool.namespace("gate")["bias"].tolist() == pytest.approx([-math.log(4)] * 4)


def test_a_copy_splits_in_every_dense_gate_of_the_pool():
    pool = make_pool(2)
    layers = [MoELayer(pool, DenseRouter(D)), MoELayer(pool, DenseRouter(D))]
    x = torch.randn(20, D)
    before = [layer(x) for layer in layers]
    pool.add_experts(1, init="copy")
    for layer, want in zip(layers, before, strict=True):
        assert_close(layer(x), want, rtol=0, atol=1e-6)


def test_a_copy_has_the_rows_of_its_source_in_order():
    pool = make_pool(2)
    pool.declare("head", {"weight": RowSpec((), count=0)}, preserving="tie")
    pool.add_rows("head", 1, {"weight": torch.tensor([3.0, 4.0])})
    pool.add_rows("head", 1, {"weight": torch.tensor([5.0])})
    pool.add_experts(2, init="copy")
    for expert_id in (1, 2, 3):
        assert pool.expert_state(expert_id)["head.weight"].tolist() == [3, 4, 5]
    pool.add_experts(1, init="copy", source=0)  # which has none
    assert "head.weight" not in pool.expert_state(4)


@pytest.mark.parametrize("kind", example_experts(16).values(), ids=example_experts(16).keys())
def test_experts_without_output_change_nothing_in_a_relu_gate_and_learn(kind):
    torch.manual_seed(0)
    layer = layer_class(kind)(ExpertPool(kind, 2), ReLURouter(16))
    layer.freeze([0])
    x = torch.randn(3, 20, 16)
    before = layer(x)
    new = layer.add_experts(2, init="zero")
    y = layer(x)
    assert_close(y, before, rtol=0, atol=1e-6)
    assert layer.routing.load[2:].min() > 0  # they are asked, and say nothing yet
    (y - 1).square().sum().backward()
    for name in kind.output_rows:
        rows = layer.pool.namespace("expert", new)[name]
        assert rows.abs().max() == 0
        (cohort,) = (t for t, r, _ in layer.pool.growable("expert", name).banks() if r[0].owner == new[0])
        assert cohort.grad.abs().max() > 0


@pytest.mark.parametrize("router", [DenseRouter(D), TopKRouter(D, top_k=1, renormalize=True), TopKRouter(D)])
def test_no_experts_without_output_where_they_would_take_weight(router):
    layer = make_layer(2, router)
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"init='zero' cannot keep .* \['gate'\] .* \(a ReLU gate does\)"):
        layer.add_experts(1, init="zero")
    assert_unchanged(layer, before)


def test_no_zero_expert_of_a_kind_that_does_not_know_its_output_rows():
    class Unknown(MLPExpert):
        output_rows = ()

    with pytest.raises(ValueError, match="does not know which rows"):
        ExpertPool(Unknown(D, 4)).add_experts(1, init="zero")


# -- errors ----------------------------------------------------------------------------------------

ERRORS = {
    "n": (lambda p: p.add_experts(0), "n must be at least 1, got 0"),
    "negative n": (lambda p: p.add_experts(-2), "n must be at least 1"),
    "size": (lambda p: p.add_experts(1, width=3), "unknown size 'width'"),
    "size value": (lambda p: p.add_experts(1, hidden_features=0), "hidden_features must be at least 1"),
    "task": (lambda p: p.add_experts(1, task=("a",)), "a task is a str, an int or None"),
    "init": (lambda p: p.add_experts(1, init="clone"), "init is 'fresh', 'zero' or 'copy'"),
    "source of fresh": (lambda p: p.add_experts(1, source=1), "init is 'fresh', 'zero' or 'copy'"),
    "frozen source": (lambda p: p.add_experts(1, init="copy", source=0), "expert 0, which is frozen"),
    "unknown source": (lambda p: p.add_experts(1, init="copy", source=9), r"no experts with ids \[9\]"),
    "copy with sizes": (lambda p: p.add_experts(1, init="copy", hidden_features=5), "takes the sizes of its source"),
    "freeze": (lambda p: p.freeze([1, 9]), r"no experts with ids \[9\], the pool has \[0, 1, 2\]"),
    "unfreeze": (lambda p: p.unfreeze([0, 9]), r"no experts with ids \[9\]"),
    "remove": (lambda p: p.remove([1, 9]), r"no experts with ids \[9\]"),
    "remove all": (lambda p: p.remove([2, 1, 0]), "keeps at least one expert"),
    "state": (lambda p: p.expert_state(9), r"no experts with ids \[9\]"),
    "assign": (lambda p: p.assign_task(9, "a"), r"no experts with ids \[9\]"),
    "namespace": (lambda p: p.namespace("none"), "no namespace 'none'"),
    "rows": (lambda p: p.growable("gate", "none"), "no rows 'none' in 'gate'"),
    "frozen owner": (lambda p: p.add_rows("head", 0, {"a": torch.ones(1), "b": torch.ones(1)}), "expert 0 is frozen"),
    "unknown owner": (lambda p: p.add_rows("head", 9, {"a": torch.ones(1), "b": torch.ones(1)}), "no experts with ids"),
    "missing name": (lambda p: p.add_rows("head", 1, {"a": torch.ones(1)}), r"needs rows \['a', 'b'\], got \['a'\]"),
    "unequal": (lambda p: p.add_rows("head", 1, {"a": torch.ones(1), "b": torch.ones(2)}), "same number of rows"),
    "row shape": (lambda p: p.add_rows("head", 1, {"a": torch.ones(1), "b": torch.ones(1, 2)}), "rows of shape"),
    "scalar": (lambda p: p.add_rows("head", 1, {"a": torch.ones(()), "b": torch.ones(())}), "rows of shape"),
}


@pytest.mark.parametrize(("act", "match"), ERRORS.values(), ids=ERRORS.keys())
def test_a_refusal_changes_nothing(act, match):
    layer = make_layer(3)
    layer.pool.declare("head", {"a": RowSpec((), count=0), "b": RowSpec((), trainable=False, count=0)}, "tie")
    layer.freeze([0])
    before = snapshot(layer)
    with pytest.raises(ValueError, match=match):
        act(layer.pool)
    assert_unchanged(layer, before)
    assert layer.add_experts() == [3]  # no id was lost


@pytest.mark.parametrize("router", [TopKRouter(D, top_k=2), TopKRouter(D, top_k=1), GaussianRouter(D)])
def test_no_copy_where_the_router_knows_no_way(router):
    layer = make_layer(2, router)
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"the rows of \['gate'\] know no such growth"):
        layer.add_experts(1, init="copy")
    assert_unchanged(layer, before)


def test_no_copy_without_a_live_source():
    layer = make_layer(2)
    layer.freeze()
    before = snapshot(layer)
    with pytest.raises(ValueError, match="every expert is frozen"):
        layer.add_experts(1, init="copy")
    assert_unchanged(layer, before)


def test_a_pool_needs_an_expert():
    with pytest.raises(ValueError, match="num_experts must be at least 1"):
        ExpertPool(MLPExpert(D, H), 0)


# -- saving and loading ----------------------------------------------------------------------------


def grown(router=None) -> MoELayer:
    layer = make_layer(3, router)
    layer.freeze([1])
    layer.add_experts(2, task="b", hidden_features=6)
    layer.freeze([0, 4])
    layer.remove([0])
    layer.add_experts(1)
    layer.unfreeze([1])
    return layer


@pytest.mark.parametrize("num_experts", [1, 3, 9])
def test_load_into_a_fresh_model_of_another_size(num_experts):
    saved = grown()
    torch.manual_seed(num_experts)
    fresh = MoELayer(ExpertPool(MLPExpert(D, H), num_experts), DenseRouter(D))
    fresh.load_state_dict(saved.state_dict())
    x = torch.randn(80, D)
    assert torch.equal(fresh(x), saved(x))
    for expert_id in saved.pool.ids:
        assert fresh.pool.record(expert_id) == saved.pool.record(expert_id)
        assert_same_state(fresh.pool.expert_state(expert_id), saved.pool.expert_state(expert_id))
    assert fresh.pool.ids == saved.pool.ids == (1, 2, 3, 4, 5)
    assert fresh.pool.frozen_ids == (4,)
    assert fresh.add_experts() == saved.add_experts() == [6]
    assert fresh.state_dict().keys() == saved.state_dict().keys()
    assert torch.equal(fresh.pool.get_extra_state(), saved.pool.get_extra_state())


def test_load_converts_to_the_modules_dtype():
    saved = grown()
    fresh = make_layer(1).double()
    fresh.load_state_dict(saved.state_dict())
    assert {p.dtype for p in fresh.parameters()} == {torch.float64}
    assert torch.equal(fresh.pool.expert_state(4)["expert.w_in"], saved.pool.expert_state(4)["expert.w_in"].double())


def test_state_dict_holds_plain_tensors_that_share_no_memory():
    state = grown().state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    pointers = [value.untyped_storage().data_ptr() for value in state.values() if value.numel()]
    assert len(set(pointers)) == len(pointers)


def edited(state: dict, key: str, change) -> dict:
    book = json.loads(bytes(state[key].tolist()))
    change(book)
    return {**state, key: torch.tensor(list(json.dumps(book).encode()), dtype=torch.uint8)}


def without(state: dict, *keys: str) -> dict:
    assert all(key in state for key in keys)
    return {name: value for name, value in state.items() if name not in keys}


BOOK, W_OUT = "pool._extra_state", "pool.rows.expert.w_out._extra_state"
CORRUPT = {
    "pool's format": (lambda s: edited(s, BOOK, lambda b: b.update(version=99)), "has format 99"),
    "rows' format": (lambda s: edited(s, W_OUT, lambda b: b.update(version=99)), "has format 99"),
    "pool's book": (lambda s: {**s, BOOK: torch.ones(3, dtype=torch.uint8)}, "cannot be read"),
    "rows' book": (lambda s: {**s, W_OUT: torch.ones(3, dtype=torch.uint8)}, "cannot be read"),
    "no experts": (lambda s: edited(s, BOOK, lambda b: b.update(experts=[])), "cannot be read"),
    "record": (lambda s: edited(s, BOOK, lambda b: b["experts"][0].pop("task")), "cannot be read"),
    "next id": (lambda s: edited(s, BOOK, lambda b: b.pop("next_id")), "cannot be read"),
    "unknown expert": (lambda s: edited(s, BOOK, lambda b: b["experts"].pop()), "do not agree with the pool's book"),
    "frozen or not": (
        lambda s: edited(s, BOOK, lambda b: b["experts"][0].update(frozen=True)),
        "do not agree with the pool's book",
    ),
    "expert without rows": (
        lambda s: edited(s, BOOK, lambda b: b["experts"].append({**b["experts"][0], "id": 77})),
        "need one row each",
    ),
    "bank": (lambda s: without(s, "pool.rows.gate.bias.frozen_"), "names the bank 'pool.rows.gate.bias.frozen_'"),
    "shape": (lambda s: {**s, "pool.rows.gate.bias.frozen_": torch.ones(1, 2)}, r"rows of shape \(\) are needed"),
    "no pool book": (lambda s: without(s, BOOK), "no book 'pool._extra_state'"),
    "no rows' book": (lambda s: without(s, "pool.rows.gate.bias._extra_state"), "the state dict has the rows"),
    "other rows": (lambda s: {**s, "pool.rows.gate_2.weight._extra_state": s[W_OUT]}, "the state dict has the rows"),
    "in_features": (
        lambda s: MoELayer(ExpertPool(MLPExpert(D + 1, H)), DenseRouter(D + 1)).state_dict(),
        r"rows of shape \(3, None\) are needed, got \(4, 4\)",
    ),
    "other gate": (lambda s: make_layer(2, TopKRouter(D)).state_dict(), "the state dict has the rows"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("corrupt", "match"), CORRUPT.values(), ids=CORRUPT.keys())
def test_a_state_dict_that_does_not_fit_changes_nothing(corrupt, match, strict):
    layer = make_layer(2)
    layer.freeze([1])
    before = snapshot(layer)
    with pytest.raises(ValueError, match=match):
        layer.load_state_dict(corrupt(dict(grown().state_dict())), strict=strict)
    assert_unchanged(layer, before)
    assert layer.pool.frozen_ids == (1,)
    assert layer(torch.ones(2, D)).shape == (2, D)


def test_a_state_dict_without_the_pool_is_torchs_business():
    layer = make_layer(2)
    before = snapshot(layer)
    assert BOOK in layer.load_state_dict({}, strict=False).missing_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})
    assert_unchanged(layer, before)


def test_copies_belong_to_their_source_s_task_and_no_other():
    pool = ExpertPool(MLPExpert(4, 3), 1, task="a")
    layer = MoELayer(pool, DenseRouter(4))
    x = torch.randn(5, 4)
    before = layer(x, task_ids="a")
    layer.add_experts(1, init="copy")
    assert pool.tasks() == ("a", "a")
    torch.testing.assert_close(layer(x, task_ids="a"), before, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="only within the source's task 'a'"):
        layer.add_experts(1, init="copy", task="b")
    assert pool.num_experts == 2


def test_an_expert_s_weights_take_no_more_rows():
    pool = ExpertPool(MLPExpert(4, 3), 1)
    with pytest.raises(ValueError, match="add experts instead"):
        pool.add_rows("expert", 0, dict(pool.namespace("expert").items()))
