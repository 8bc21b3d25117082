"""Pruning and merging: what is measured, what goes, what stays, and what cannot be made one."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from modmoe import (
    AutoencoderRouter,
    ExpertPool,
    GaussianRouter,
    MLPExpert,
    MoELayer,
    PPCARouter,
    PrototypeRouter,
    StickRouter,
    sync_optimizer,
)
from modmoe.continual import (
    PoolClassifier,
    RedundantPair,
    measure_usage,
    merge_experts,
    prune_experts,
    redundant_experts,
)
from modmoe.growable import RowSpec

D = 4


def make(classes, router=None, samples=None, frozen=True, dtype=torch.float64):
    """One expert for each entry of ``classes``, whose gate has observed ``samples`` of them at a place of its own."""
    torch.manual_seed(0)
    model = PoolClassifier(MLPExpert(D, 5, 3), router or GaussianRouter(D), 6).to(dtype)
    for number, owned in enumerate(classes):
        n = 20 if samples is None else samples[number]
        expert_id = model.begin_task(owned, task=number)
        labels = torch.tensor(owned)[torch.arange(n) % len(owned)]
        model.observe(expert_id, torch.randn(n, D, dtype=dtype) + 2 * number, labels)
        if frozen:
            model.pool.freeze([expert_id])
    return model


def set_rows(model, namespace, name, expert_id, values):
    """Write one live expert's trainable rows: one value for each, or one for all."""
    growable = model.pool.growable(namespace, name)
    places = sorted(
        (r.number, bank, i)
        for bank, rows in enumerate(t for _, t in growable.live())
        for i, r in enumerate(rows)
        if r.owner == expert_id
    )
    for index, (_, bank, place) in enumerate(places):
        growable.live()[bank][0].data[place] = values if isinstance(values, float) else values[index]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- numbers by hand ---------------------------------------------------------------------------------------------------


def test_agreement_by_hand():
    model = make([[0, 1], [0, 1], [0, 2]], frozen=False, samples=[20, 30, 20])
    for expert_id, bias in ((0, [0.0, math.log(3)]), (1, [0.0, 0.0])):
        set_rows(model, "head", "weight", expert_id, 0.0)
        set_rows(model, "head", "bias", expert_id, bias)
    # whatever x is, expert 0 says (1/4, 3/4) and expert 1 (1/2, 1/2)
    # sum_c min(p_0(c), p_1(c)) = 1/4 + 1/2 = 3/4; expert 2 has other classes; expert 1 has observed more
    x = torch.randn(7, D, dtype=torch.float64)
    (pair,) = redundant_experts(model, x, min_agreement=0.7)
    assert pair == RedundantPair(keep=1, drop=0, agreement=pytest.approx(0.75))
    assert redundant_experts(model, x, min_agreement=0.8) == []


def test_merged_gaussian_by_hand():
    x = torch.tensor([[0.0], [2.0], [6.0]])
    router = GaussianRouter(1, regularization=1.0)
    layer = MoELayer(ExpertPool(MLPExpert(1, 2), 2), router)
    layer.observe(0, x[:2], torch.tensor([3, 3]))  # n = 2, mean 1, scatter 1 + 1 = 2
    layer.observe(1, x[2:], torch.tensor([3]))  # n = 1, mean 6, scatter 0
    rows = [layer.pool.namespace("gate", [i]) for i in (0, 1)]
    merged = router.merged_rows(*({name: row[name] for name in row} for row in rows))
    # n = 3, mean 8/3, scatter 2 + 0 + (6 - 1)^2 * 2 * 1 / 3 = 56/3; whiten = (scatter / 3 + 1)^(-1/2) = (65/9)^(-1/2)
    assert merged["label"].tolist() == [3]
    assert merged["count"].tolist() == [3]
    assert_close(merged["mean"], torch.tensor([[8 / 3]]))
    assert_close(merged["scatter"], torch.tensor([[[56 / 3]]]))
    assert_close(merged["whiten"], torch.tensor([[[math.sqrt(9 / 65)]]]))


def test_average_by_hand():
    model = make([[0, 1], [1, 2]], samples=[30, 10], frozen=False)
    for expert_id, value in ((0, 1.0), (1, 3.0)):
        set_rows(model, "expert", "w_in", expert_id, value)
        set_rows(model, "head", "weight", expert_id, value)
    merged = merge_experts(model, 0, 1, weights="average")
    state = model.pool.expert_state(merged)
    # 30/40 * 1 + 10/40 * 3 = 1.5; classes 0 and 2 have one head row each, 1 and 3; class 1 has the mean of two
    assert torch.equal(state["expert.w_in"], torch.full((1, D, 5), 1.5, dtype=torch.float64))
    assert state["head.label"].tolist() == [0, 1, 2]
    assert state["head.weight"][:, 0].tolist() == [1.0, 1.5, 3.0]


def test_pruning_by_hand():
    model = make([[0, 1]] * 4)
    # shares .90, .03, .02, .05: below .04 are experts 2 and 1, the least used first; 3 is in training
    assert prune_experts(model, {0: 90, 1: 3, 2: 2, 3: 5}, min_share=0.04) == [2, 1]
    assert model.pool.ids == (0, 3)


# -- usage and pruning -------------------------------------------------------------------------------------------------


def test_usage_counts_what_the_gate_chooses_and_changes_nothing():
    model = make([[0, 1], [2, 3], [4, 5]])
    x = torch.cat([torch.zeros(5, D), torch.full((3, D), 2.0)]).double()
    before = copy.deepcopy(model.state_dict())
    assert measure_usage(model, x) == {0: 5, 1: 3, 2: 0}
    assert same(before, model.state_dict())


def test_pruning_leaves_the_others_bit_identical():
    model = make([[0, 1], [0, 1], [2, 3]])
    states = {i: model.pool.expert_state(i) for i in (0, 2)}
    x = torch.randn(9, D, dtype=torch.float64)
    scores = {i: model.layer.expert_score(i, x) for i in (0, 2)}
    assert prune_experts(model, {0: 60, 1: 0, 2: 40}) == [1]
    assert model.pool.ids == (0, 2)
    for expert_id in (0, 2):
        assert same(states[expert_id], model.pool.expert_state(expert_id))
        assert torch.equal(scores[expert_id], model.layer.expert_score(expert_id, x))


def test_who_is_never_pruned():
    unused = {0: 0, 1: 0, 2: 0, 3: 1}
    model = make([[0, 1], [0, 1], [2, 3], [0, 1]])
    assert prune_experts(copy.deepcopy(model), unused) == [0, 1]  # 2 is the only owner of its classes
    assert prune_experts(copy.deepcopy(model), unused, keep=[0]) == [1]
    assert prune_experts(copy.deepcopy(model), unused, lose_classes=True) == [0, 1, 2]
    model.training_id = 0
    assert prune_experts(copy.deepcopy(model), unused) == [1]


def test_of_two_unused_owners_of_a_class_one_stays():
    model = make([[0, 1], [0, 1], [2, 3]])
    assert prune_experts(model, {0: 1, 1: 2, 2: 997}) == [0]


def test_the_last_expert_stays_even_if_nobody_is_in_training():
    model = make([[0, 1], [0, 1]])
    model.pool.remove([1])
    assert prune_experts(model, {0: 1}, min_share=1.0, lose_classes=True) == []


@pytest.mark.parametrize(
    ("usage", "options", "message"),
    [
        ({0: 1}, {}, r"usage must name the experts \[0, 1\], it names \[0\]"),
        ({0: 1, 1: -1}, {}, "must not be negative"),
        ({0: 0, 1: 0}, {}, "positive somewhere"),
        ({0: 1, 1: 0}, {"min_share": 1.5}, r"min_share must be in \[0, 1\]"),
        ({0: 1, 1: 0}, {"keep": [7]}, r"no experts with ids \[7\]"),
    ],
)
def test_pruning_refuses(usage, options, message):
    model = make([[0, 1], [0, 1]])
    with pytest.raises(ValueError, match=message):
        prune_experts(model, usage, **options)
    assert model.pool.ids == (0, 1)


# -- merging -----------------------------------------------------------------------------------------------------------

MERGEABLE = {
    "gaussian": lambda: GaussianRouter(D),
    "gaussian per expert": lambda: GaussianRouter(D, per_class=False),
    "prototype": lambda: PrototypeRouter(D),
}
OTHERS = {
    "ppca": lambda: PPCARouter(D, components=2, rank=2),
    "autoencoder": lambda: AutoencoderRouter(D, hidden_features=3, epochs=1),
    "autoencoder per expert": lambda: AutoencoderRouter(D, hidden_features=3, epochs=1, per_class=False),
}


@pytest.mark.parametrize("router", MERGEABLE.values(), ids=MERGEABLE.keys())
def test_the_gate_is_that_of_an_expert_that_has_observed_both(router):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, D, generator=generator, dtype=torch.float64) + torch.arange(60).unsqueeze(1) / 20
    y = torch.arange(60) % 2
    whole = MoELayer(ExpertPool(MLPExpert(D, 5, 3)), router()).double()
    whole.observe(0, x, y)
    model = PoolClassifier(MLPExpert(D, 5, 3), router(), 6).double()
    for part in (slice(0, 23), slice(23, 60)):
        model.observe(model.begin_task([0, 1]), x[part], y[part])
    merged = merge_experts(model, 0, 1)
    expected, got = whole.pool.expert_state(0), model.pool.expert_state(merged)
    for name in expected:
        if name.startswith("gate."):
            assert_close(got[name], expected[name], atol=1e-12, rtol=1e-12)
    assert_close(model.layer.expert_score(merged, x), whole.expert_score(0, x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("router", (MERGEABLE | OTHERS).values(), ids=(MERGEABLE | OTHERS).keys())
def test_classes_that_one_has_observed_are_taken_over_bit_by_bit(router):
    layer = MoELayer(ExpertPool(MLPExpert(D, 5, 3), 2), router())
    for expert_id in (0, 1):
        layer.observe(expert_id, torch.randn(20, D), torch.full((20,), expert_id))
    rows = [{name: tensor.clone() for name, tensor in layer.pool.namespace("gate", [i]).items()} for i in (0, 1)]
    if not layer.router.per_class:
        for number in (0, 1):  # a whole expert's density has one label: make them two
            rows[number]["label"].fill_(number)
    merged = layer.router.merged_rows(*rows)
    assert merged["label"].tolist() == [0, 1]
    assert all(torch.equal(merged[name], torch.cat([rows[0][name], rows[1][name]])) for name in merged)


def test_the_merged_expert_computes_what_the_kept_one_did():
    model = make([[0, 1], [0, 1], [2, 3]])
    x = torch.randn(9, D, dtype=torch.float64)
    kept, survivor = model.pool.expert_state(1), model.pool.expert_state(2)
    output, score = model.layer.expert_output(1, x), model.layer.expert_score(2, x)
    merged = merge_experts(model, keep=1, drop=0)
    assert merged == 3
    assert model.pool.ids == (2, 3)
    assert model.pool.frozen_ids == (2, 3)
    assert model.classes_of() == {2: [2, 3], 3: [0, 1]}
    state = model.pool.expert_state(merged)
    for name in kept:
        if not name.startswith("gate."):
            assert torch.equal(state[name], kept[name])
    assert torch.equal(model.layer.expert_output(merged, x), output)
    assert same(survivor, model.pool.expert_state(2))
    assert torch.equal(model.layer.expert_score(2, x), score)


def test_the_kept_expert_may_know_more_classes():
    model = make([[0, 1, 2], [1]])
    merged = merge_experts(model, keep=0, drop=1)
    assert model.classes_of() == {merged: [0, 1, 2]}
    state = model.pool.expert_state(merged)
    assert state["gate.label"].tolist() == [0, 1, 2]
    assert state["gate.count"].tolist() == [7, 7 + 20, 6]


def test_frozen_task_and_training_of_the_merged_expert():
    model = make([[0, 1]] * 3, frozen=False)
    model.pool.freeze([0, 1])
    model.pool.assign_task(1, 0)
    merged = merge_experts(model, keep=1, drop=2)  # one was live, and in training; tasks 0 and 2
    assert merged not in model.pool.frozen_ids
    assert model.training_id == merged
    assert model.pool.record(merged).task is None
    model.pool.assign_task(merged, 0)
    model.pool.freeze([merged])
    again = merge_experts(model, keep=0, drop=merged)
    assert model.pool.frozen_ids == (again,)
    assert model.pool.record(again).task == 0
    assert model.begin_task([4]) == again + 1


def test_experts_of_other_sizes_keep_theirs():
    model = make([[0, 1]])
    model.pool.add_experts(1, hidden_features=9)
    model.add_classes(1, [0, 1])
    model.training_id = 1
    merged = merge_experts(model, keep=1, drop=0)
    assert model.pool.record(merged).sizes == {"hidden_features": 9}
    assert model.pool.expert_state(merged)["expert.w_in"].shape == (1, D, 9)


def test_save_and_load_afterwards():
    model = make([[0, 1], [0, 1], [2, 3], [2, 3]])
    merge_experts(model, 0, 1)
    prune_experts(model, {2: 0, 3: 1, 4: 1})
    fresh = make([])
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(9, D, dtype=torch.float64)
    assert torch.equal(model.eval()(x), fresh.eval()(x))
    assert fresh.pool.ids == (3, 4)
    assert fresh.pool.frozen_ids == (3, 4)
    assert fresh.begin_task([5]) == model.begin_task([5]) == 5


def test_a_loaded_model_goes_on_with_the_merged_expert():
    model = make([[2, 3], [0, 1], [0, 1]], frozen=False)
    merge_experts(model, 1, 2)
    fresh = make([])
    fresh.load_state_dict(model.state_dict())
    assert fresh.training_id == model.training_id == 3


@pytest.mark.parametrize(
    "consolidate", [lambda model: merge_experts(model, 1, 2), lambda model: model.layer.remove([1])]
)
def test_the_optimizer_keeps_the_survivors_state_and_nothing_else(consolidate):
    model = make([[0, 1], [0, 1], [0, 1]], frozen=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for expert_id in model.pool.ids:
        model.training_id = expert_id
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            model.train()(torch.randn(8, D, dtype=torch.float64)), torch.ones(8).long()
        ).backward()
        optimizer.step()

    def moments():
        growable = model.pool.growable("expert", "w_in")
        ((tensor, index),) = [(t, i) for t, rows in growable.live() for i, r in enumerate(rows) if r.owner == 0]
        return optimizer.state[tensor]["exp_avg"][index].clone()

    model.training_id, before = 2, moments()
    consolidate(model)
    sync_optimizer(optimizer, model)
    assert before.abs().max() > 0
    assert torch.equal(moments(), before)
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    live = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(listed) == len(live)
    assert set(listed) == live
    assert {id(p) for p in optimizer.state} <= live


def test_an_average_of_experts_from_one_start_is_as_good():
    """Two halves of one task, learned from the same weights: the mean of both still solves it."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    x = torch.randn(400, D, generator=generator) + 2.0 * y.unsqueeze(1)
    torch.manual_seed(0)
    model = PoolClassifier(MLPExpert(D, 8, 8), GaussianRouter(D), 2)
    model.begin_task([0, 1])
    model.add_classes(model.pool.add_experts(1)[0], [0, 1])
    for name, row in model.pool.expert_state(0).items():
        if name.startswith("expert.") or name in ("head.weight", "head.bias"):
            set_rows(model, *name.split("."), 1, row)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for expert_id, part in ((0, slice(0, 150)), (1, slice(150, 200))):
        model.training_id = expert_id
        model.observe(expert_id, x[part], y[part])
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(x[part]), y[part]).backward()
            optimizer.step()

    def accuracy():
        return float((model.eval()(x[200:]).argmax(1) == y[200:]).double().mean())

    before = accuracy()
    merge_experts(model, 0, 1, weights="average")
    assert before > 0.9
    assert accuracy() >= before - 0.01


# -- what cannot be merged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (
            lambda: PPCARouter(D, components=2, rank=2),
            "PPCARouter cannot combine two fits of class 0: only the samples",
        ),
        (lambda: AutoencoderRouter(D, 3, epochs=1), "AutoencoderRouter cannot combine two fits of class 0: only the"),
        (lambda: AutoencoderRouter(D, 3, epochs=1, per_class=False), "cannot combine two fits of whole experts"),
    ],
)
def test_a_gate_that_cannot_tell_refuses(router, message):
    model = make([[0, 1], [0, 1]], router())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        merge_experts(model, 0, 1)
    assert same(before, model.state_dict())


def test_a_gate_whose_experts_depend_on_each_other_refuses():
    model = make([[0, 1], [2, 3]], StickRouter(D, 6))
    model.pool.unfreeze([0])
    model.add_classes(0, [2, 3])
    with pytest.raises(ValueError, match="StickRouter cannot merge experts: an expert's rows depend on what other"):
        merge_experts(model, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "two experts are needed, got 0 twice"),
        ((0, 9), r"no experts with ids \[9\]"),
        ((0, 1, "mean"), "weights is 'keep' or 'average', got 'mean'"),
        ((0, 2), "experts 0 and 2 have no class in common: merging would destroy"),
        ((0, 2, "average"), "experts 0 and 2 have no class in common"),
        ((0, 1), r"expert 0 does not own the classes \[2\] of expert 1: they would be lost"),
        ((3, 1, "average"), "have no average"),
    ],
)
def test_merging_refuses(arguments, message):
    model = make([[0, 1], [1, 2], [4]])
    model.pool.add_experts(1, hidden_features=9)
    model.add_classes(3, [1, 2])
    model.pool.freeze([3])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        merge_experts(model, *arguments)
    assert same(before, model.state_dict())


def test_merging_beside_the_expert_in_training():
    model = make([[0, 1], [0, 1]])
    training = model.begin_task([2, 3])
    model.pool.unfreeze([0])
    with pytest.raises(ValueError, match=f"expert {training} is in training, and a model that is loaded goes on with"):
        merge_experts(model, 0, 1)
    model.pool.freeze([0])
    merged = merge_experts(model, 0, 1)
    assert model.training_id == training
    loaded = make([[0]])
    loaded.load_state_dict(model.state_dict())
    assert list(loaded.pool.ids) == [training, merged]
    assert loaded.training_id == training


def test_merging_refuses_rows_without_a_rule_and_averages_without_counts():
    model = make([[0, 1], [0, 1]], samples=[0, 0])
    with pytest.raises(ValueError, match="the gate has observed neither 0 nor 1: no counts"):
        merge_experts(model, 0, 1, weights="average")
    model.pool.declare("usage", {"seen": RowSpec((), trainable=False)})
    with pytest.raises(ValueError, match=r"nothing says how the rows of \['usage'\] are merged"):
        merge_experts(model, 0, 1)


def test_redundancy_refuses():
    model = make([[0, 1], [0, 1]])
    with pytest.raises(ValueError, match="x is empty"):
        redundant_experts(model, torch.empty(0, D, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"min_agreement must be in \(0, 1\]"):
        redundant_experts(model, torch.randn(2, D, dtype=torch.float64), min_agreement=0)
