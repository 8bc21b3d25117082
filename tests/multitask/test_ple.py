"""PLE: by hand over two levels, against MMoE, and while it grows."""

import pytest
import torch
from torch import nn

from modmoe import sync_optimizer
from modmoe.multitask import PLE, FeatureFront, LayerExpert

REGRESSIONS = {"a": "regression", "b": "regression"}


def test_two_levels_by_hand(set_rows):
    model = PLE(FeatureFront(1), REGRESSIONS, lambda d: LayerExpert(d, 1), num_shared=1, num_own=1)
    low, high = (level.pool for level in model.levels)
    for pool in (low, high):  # experts: shared, a's, b's; every gate weighs what is open to it equally
        for gate in ("gate_a", "gate_b"):
            set_rows(pool, gate, "weight", [[0.0]] * 3)
    set_rows(low, "gate_shared", "weight", [[0.0]] * 3)
    set_rows(low, "expert", "weight", [[[0.0]]] * 3)
    set_rows(low, "expert", "bias", [[1.0], [5.0], [9.0]])
    set_rows(high, "expert", "weight", [[[1.0]]] * 3)  # passes on what it reads
    set_rows(high, "expert", "bias", [[0.0]] * 3)
    for name in REGRESSIONS:
        model.towers[name] = nn.Identity()
    # level 1: a (1 + 5) / 2 = 3, b (1 + 9) / 2 = 5, shared (1 + 5 + 9) / 3 = 5
    # level 2: a mixes its own expert of 3 and the shared one of 5: 4; b mixes 5 and 5
    outputs = model(torch.zeros(1, 1))
    assert outputs["a"].item() == pytest.approx(4.0)
    assert outputs["b"].item() == pytest.approx(5.0)
    assert "gate_shared" not in high.namespaces  # nothing would read it


def test_gradcheck():
    torch.manual_seed(0)
    model = PLE(FeatureFront(2), REGRESSIONS, lambda d: LayerExpert(d, 2), 1, 1, tower_features=2).double()
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in model.named_parameters()]

    def function(x, *values):
        return tuple(torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,)).values())

    assert torch.autograd.gradcheck(function, (x, *model.parameters()))


def test_the_second_level_equals_the_gates_layer_where_all_read_the_same(ple_of):
    model, x = ple_of(), torch.randn(6, 4)
    level = model.levels[0]
    together = level(x)
    apart = level(dict.fromkeys(("shared", "a", "b"), x))
    for name in ("shared", "a", "b"):
        layer = level.gate(name)
        layer.backend = "reference"
        expected = layer(x, task_ids=None if name == "shared" else name)
        torch.testing.assert_close(together[name], expected)
        torch.testing.assert_close(apart[name], expected)


def test_without_own_experts_one_level_is_an_mmoe(ple_of, mmoe_of):
    x = torch.randn(6, 4)
    for name, y in mmoe_of(3)(x).items():
        assert torch.equal(ple_of(num_shared=3, num_own=0, num_levels=1)(x)[name], y)


def test_with_the_gates_closed_to_own_experts_it_equals_the_mmoe(ple_of, mmoe_of, set_rows):
    model, shared, x = ple_of(num_shared=3, num_own=1, num_levels=1), mmoe_of(3, seed=5), torch.randn(6, 4)
    pool = model.levels[0].pool
    own = range(3, 5)  # a softmax gives exp(-1e4) = 0
    for name in ("weight", "bias"):
        rows = pool.namespace("expert")[name].detach().clone()
        rows[:3] = shared.pool.namespace("expert")[name]
        set_rows(pool, "expert", name, rows)
        for gate in ("gate_a", "gate_b"):
            rows = pool.namespace(gate)[name].detach().clone()
            rows[:3] = shared.pool.namespace(gate)[name]
            if name == "bias":
                rows[list(own)] = -1e4
            set_rows(pool, gate, name, rows)
    model.towers.load_state_dict(shared.towers.state_dict())
    for name, y in shared(x).items():
        torch.testing.assert_close(model(x)[name], y)


def test_a_task_added_to_a_frozen_model_learns_and_changes_no_other(ple_of):
    model, x = ple_of(seed=1), torch.randn(40, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    model.freeze()
    before = model(x)
    model.add_task("c", "regression")
    sync_optimizer(optimizer, model)
    start = (model(x)["c"] - x[:, 2]).square().mean()
    for _ in range(80):
        optimizer.zero_grad()
        loss = (model(x)["c"] - x[:, 2]).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * start
    after = model(x)
    assert torch.equal(after["a"], before["a"])
    assert torch.equal(after["b"], before["b"])


@pytest.mark.parametrize("built_with", ["ab", "abc"])
def test_a_grown_model_is_saved_and_loaded(ple_of, built_with):
    model, x = ple_of(), torch.randn(6, 4)
    model.add_task("c", "regression")
    assert len(model.add_experts(1, task="c")) == 2  # one pool for each level
    fresh = ple_of(tasks=dict.fromkeys(built_with, "regression"), seed=1)
    if built_with == "ab":
        fresh.add_task("c", "regression")
    fresh.load_state_dict(model.state_dict())
    for name, y in model(x).items():
        assert torch.equal(fresh(x)[name], y)


def test_bad_input(ple_of):
    with pytest.raises(ValueError, match="num_own at least 0, got 0, 2 and 1"):
        ple_of(num_shared=0)
    with pytest.raises(ValueError, match="got 2, 0 and 1"):
        ple_of(num_levels=0)
    with pytest.raises(ValueError, match="the front gives 4 features, LayerExpert\\(3, 5\\) takes 3"):
        PLE(FeatureFront(4), REGRESSIONS, lambda d: LayerExpert(3, 5), 1, 1)
