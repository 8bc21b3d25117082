"""MMoE and the one-gate mixture: by hand, against the layer, against the shared bottom, and while they grow."""

import copy
import math

import pytest
import torch
from torch import nn

from modmoe import DenseRouter, MoELayer, count_parameters, sync_optimizer
from modmoe.multitask import FeatureFront, LayerExpert, MMoE, OneGateMoE, SharedBottom

REGRESSIONS = {"a": "regression", "b": "regression"}


@pytest.fixture
def constant_experts(set_rows):
    """Two experts that give 1 and 3 whatever they read, and towers that pass it on."""

    def build(cls):
        model = cls(FeatureFront(1), REGRESSIONS, LayerExpert(1, 1), 2)
        set_rows(model.pool, "expert", "weight", [[[0.0]], [[0.0]]])
        set_rows(model.pool, "expert", "bias", [[1.0], [3.0]])
        for name in REGRESSIONS:
            model.towers[name] = nn.Identity()
        return model

    return build


def test_two_constant_experts_by_hand(constant_experts, set_rows):
    model = constant_experts(MMoE)
    for name in REGRESSIONS:
        set_rows(model.pool, f"gate_{name}", "weight", [[0.0], [0.0]])
    set_rows(model.pool, "gate_a", "bias", [0.0, math.log(3)])  # weights 1/4 and 3/4: 1/4 * 1 + 3/4 * 3 = 2.5
    set_rows(model.pool, "gate_b", "bias", [math.log(4), 0.0])  # weights 4/5 and 1/5: 4/5 * 1 + 1/5 * 3 = 1.4
    outputs = model(torch.tensor([[7.0], [-2.0]]))
    assert outputs["a"].tolist() == pytest.approx([2.5, 2.5])
    assert outputs["b"].tolist() == pytest.approx([1.4, 1.4])


def test_one_gate_gives_both_tasks_one_mixture(constant_experts, set_rows):
    model = constant_experts(OneGateMoE)
    set_rows(model.pool, "gate", "weight", [[0.0], [math.log(3)]])  # at x = 1 the weights are 1/4 and 3/4
    outputs = model(torch.ones(1, 1))
    assert outputs["a"].item() == pytest.approx(2.5)
    assert outputs["b"].item() == pytest.approx(2.5)


def test_gradcheck(mmoe_of):
    model = mmoe_of(2).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    parameters = list(model.parameters())

    def function(x, *values):
        named = dict(zip((name for name, _ in model.named_parameters()), values, strict=True))
        return tuple(torch.func.functional_call(model, named, (x,)).values())

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *parameters))


def test_each_gate_is_a_layer_on_the_pool(mmoe_of):
    """The experts are computed once for all gates; the layer of one gate, by the slow backend, gives the same."""
    model, x = mmoe_of(3), torch.randn(6, 4)
    reference = copy.deepcopy(model)
    mixed = model.mix(x)
    sum(y.square().sum() for y in mixed.values()).backward()
    total = torch.zeros(())
    for name in REGRESSIONS:
        layer = reference.level.gate(name)
        layer.backend = "reference"
        y = layer(x)
        torch.testing.assert_close(mixed[name], y)
        total = total + y.square().sum()
    total.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert len(gradients) == 6  # weight and bias of the experts and of two gates
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name])


def test_one_task_is_a_moe_layer_with_a_tower(mmoe_of):
    model, x = mmoe_of(3, tasks={"a": "binary"}), torch.randn(6, 4)
    layer = MoELayer(copy.deepcopy(model.pool), DenseRouter(4), namespace="again")
    for name in ("weight", "bias"):
        layer.pool.growable("again", name).live()[0][0].data.copy_(model.pool.namespace("gate_a")[name])
    torch.testing.assert_close(model(x)["a"], model.towers["a"](layer(x)).squeeze(1))


@pytest.mark.parametrize("cls", [MMoE, OneGateMoE])
def test_one_expert_equals_the_shared_bottom(cls):
    x, front = torch.randn(6, 4), FeatureFront(4)
    model = cls(front, REGRESSIONS, LayerExpert(4, 5), 1)
    bottom = SharedBottom(front, REGRESSIONS, 5)
    bottom.towers.load_state_dict(model.towers.state_dict())
    rows = model.pool.namespace("expert")
    bottom.bottom.load_state_dict({"0.weight": rows["weight"][0].T, "0.bias": rows["bias"][0]})
    for name, y in bottom(x).items():
        torch.testing.assert_close(model(x)[name], y)


def test_copied_experts_leave_the_predictions_and_the_optimizer_alone(mmoe_of):
    model, x = mmoe_of(2), torch.randn(6, 4)
    optimizer = torch.optim.Adam(model.parameters())
    sum(y.square().sum() for y in model(x).values()).backward()
    optimizer.step()
    before = model(x)
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    assert model.add_experts(1, init="copy") == {"level.pool": [2]}
    sync_optimizer(optimizer, model)
    for name, y in model(x).items():
        torch.testing.assert_close(y, before[name])
    named = dict(model.named_parameters())
    assert all(torch.equal(optimizer.state[named[name]]["exp_avg"], moment) for name, moment in moments.items())


def train(model, x, targets, steps=20):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(x)
        torch.stack([(outputs[name] - target).square().mean() for name, target in targets.items()]).sum().backward()
        optimizer.step()


def test_a_task_added_to_a_frozen_model_learns_and_changes_no_other(mmoe_of):
    model, x = mmoe_of(3), torch.randn(40, 4)
    train(model, x, {"a": x[:, 0], "b": x[:, 1]})
    model.freeze()
    before = model(x)
    model.add_task("c", "regression", num_experts=2)
    assert [model.pool.record(i).task for i in model.pool.ids] == [None] * 3 + ["c"] * 2
    train(model, x, {"c": x[:, 2] * 2}, steps=80)
    after = model(x)
    assert torch.equal(after["a"], before["a"])  # to the last bit
    assert torch.equal(after["b"], before["b"])
    assert (after["c"] - x[:, 2] * 2).square().mean() < 0.5 * (x[:, 2] * 2).square().mean()
    # the new gate weighs the frozen experts itself
    assert model.level.gate("c").router.late_weight.abs().max() > 0.01


def test_a_new_task_on_frozen_experts_alone_chooses_among_them(set_rows):
    model = MMoE(FeatureFront(1), {"a": "regression"}, LayerExpert(1, 1), 2)
    set_rows(model.pool, "expert", "weight", [[[0.0]], [[0.0]]])
    set_rows(model.pool, "expert", "bias", [[0.0], [1.0]])
    model.freeze()
    model.add_task("b", "regression")
    x = torch.ones(8, 1)
    train(model, x, {"b": torch.full((8,), 3.0)}, steps=120)
    assert model.level.gate_weights("b")[0, 1] > 0.75  # from 1/2: only this expert says anything
    assert [p.shape for n, p in model.named_parameters() if "late" in n] == [(2, 1), (2,)]


def test_experts_of_one_task_are_closed_to_the_others(mmoe_of):
    model, x = mmoe_of(2), torch.randn(6, 4)
    before = model(x)
    model.add_experts(2, task="a")
    after = model(x)
    assert torch.equal(after["b"], before["b"])
    assert not torch.allclose(after["a"], before["a"])
    assert (model.level.gate_weights("b")[:, 2:] == 0).all()


@pytest.mark.parametrize("built_with", ["ab", "abc"])
def test_a_grown_and_frozen_model_is_saved_and_loaded(mmoe_of, built_with):
    model, x = mmoe_of(3), torch.randn(6, 4)
    model.freeze()
    model.add_task("c", "regression", num_experts=1)
    train(model, x, {"c": x[:, 0]})
    fresh = mmoe_of(2, tasks=dict.fromkeys(built_with, "regression"), seed=1)
    if built_with == "ab":
        fresh.add_task("c", "regression")
    fresh.load_state_dict(model.state_dict())
    again = copy.deepcopy(fresh)
    for name, y in model(x).items():
        assert torch.equal(fresh(x)[name], y)
        assert torch.equal(again(x)[name], y)
    assert fresh.pool.frozen_ids == (0, 1, 2)


def test_a_gate_without_any_expert_says_so(mmoe_of):
    model = mmoe_of(1)
    model.add_experts(1, task="a")
    model.pool.remove([0])
    with pytest.raises(ValueError, match="no expert is open to the gate 'b': the pool has \\['a'\\]"):
        model(torch.randn(2, 4))


def test_seeded_models_are_equal(mmoe_of):
    x = torch.randn(6, 4)
    assert torch.equal(mmoe_of(seed=3)(x)["a"], mmoe_of(seed=3)(x)["a"])
    assert not torch.equal(mmoe_of(seed=3)(x)["a"], mmoe_of(seed=4)(x)["a"])


def test_parameters_by_hand(mmoe_of):
    # 3 experts of 4 * 5 + 5 = 25; 2 gates of 3 * (4 + 1) = 15; 2 towers of 5 * 3 + 3 + 3 + 1 = 22
    assert count_parameters(mmoe_of(3)).total == 3 * 25 + 2 * 15 + 2 * 22


def test_bad_input(mmoe_of):
    model = mmoe_of()
    with pytest.raises(ValueError, match="has a task 'a' already"):
        model.add_task("a", "regression")
    with pytest.raises(ValueError, match="identifier and not 'shared', got 'shared'"):
        model.add_task("shared", "regression")
    with pytest.raises(ValueError, match=r"got 'a\.b'"):
        model.add_task("a.b", "regression")
    with pytest.raises(ValueError, match="'c' is 'regression' or 'binary', got 'count'"):
        model.add_task("c", "count")
    with pytest.raises(ValueError, match="no task 'z', the model has \\['a', 'b'\\]"):
        model.add_experts(1, task="z")
    with pytest.raises(ValueError, match="at least one task"):
        mmoe_of(tasks={})
    with pytest.raises(ValueError, match="the front gives 4 features, LayerExpert\\(3, 5\\) takes 3"):
        MMoE(FeatureFront(4), REGRESSIONS, LayerExpert(3, 5), 2)
    with pytest.raises(ValueError, match="'a' has not been used yet"):
        model.level.gate_weights("a")
    one = OneGateMoE(FeatureFront(4), REGRESSIONS, LayerExpert(4, 5), 2)
    assert one.add_experts(2) == {"layer.pool": [2, 3]}
    with pytest.raises(ValueError, match="one gate opens every expert to all tasks"):
        one.add_experts(1, task="a")
    with pytest.raises(ValueError, match="contains no ExpertPool"):
        SharedBottom(FeatureFront(4), REGRESSIONS, 5).add_experts()
    with pytest.raises(ValueError, match="tower_features must be at least 1"):
        SharedBottom(FeatureFront(4), REGRESSIONS, 5, tower_features=0)
    with pytest.raises(ValueError, match="bottom_features must be at least 1"):
        SharedBottom(FeatureFront(4), REGRESSIONS, 0)
