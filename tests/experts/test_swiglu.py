"""SwiGLUExpert: by hand, against torch's own layers, and on a growing pool (backends: tests/kernels)."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from modmoe import DenseRouter, ExpertPool, MoELayer, SwiGLUExpert, TopKRouter, sync_optimizer
from modmoe.kernels.reference import LoopOps


def test_by_hand():
    expert = SwiGLUExpert(2, 2, 1)
    rows = {
        "w_gate": torch.tensor([[1.0, 0.0], [0.0, -1.0]]),
        "w_in": torch.tensor([[2.0, 1.0], [1.0, 1.0]]),
        "w_out": torch.tensor([[1.0], [10.0]]),
    }
    # x = (ln 3, 0): gate logits (ln 3, 0); silu = ln 3 * 3/4 and 0; x W_in = (2 ln 3, ln 3); y = 1.5 (ln 3)^2 + 0
    y = expert.compute(torch.tensor([[math.log(3), 0.0]]), LoopOps(rows))
    assert y.item() == pytest.approx(1.5 * math.log(3) ** 2, abs=1e-6)
    with_bias = {**rows, "b_gate": torch.tensor([0.0, 0.0]), "b_in": torch.tensor([2.0, 1.0]), "b_out": torch.ones(1)}
    # the first hidden unit is .75 ln 3 (2 ln 3 + 2); + 1
    y = SwiGLUExpert(2, 2, 1, bias=True).compute(torch.tensor([[math.log(3), 0.0]]), LoopOps(with_bias))
    assert y.item() == pytest.approx(1.5 * math.log(3) * (math.log(3) + 1) + 1, abs=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_one_expert_equals_torch_s_layers(bias):
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(SwiGLUExpert(6, 10, 4, bias=bias), 1), DenseRouter(6))
    gate, up, down = nn.Linear(6, 10, bias), nn.Linear(6, 10, bias), nn.Linear(10, 4, bias)
    rows = {name: layer.pool.growable("expert", name).banks()[0][0] for name in layer.pool.specs("expert")}
    assert sorted(rows) == (["b_gate", "b_in", "b_out"] if bias else []) + ["w_gate", "w_in", "w_out"]
    with torch.no_grad():
        for name, linear in (("gate", gate), ("in", up), ("out", down)):
            rows["w_" + name].copy_(linear.weight.T[None])
            if bias:
                rows["b_" + name].copy_(linear.bias[None])
    x = torch.randn(11, 6, requires_grad=True)
    y, expected = layer(x), down(F.silu(gate(x)) * up(x))
    assert_close(y, expected, atol=1e-6, rtol=1e-6)
    inputs = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (y, expected)]
    assert_close(*inputs, atol=1e-5, rtol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name, linear in (("gate", gate), ("in", up), ("out", down)):
        assert_close(rows["w_" + name].grad, linear.weight.grad.T[None], atol=1e-5, rtol=1e-5)


def test_growth_freezing_and_loading_leave_outputs_alone():
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(SwiGLUExpert(4, 6), 2), TopKRouter(4, 2))
    optimizer = torch.optim.AdamW(layer.parameters())
    x = torch.randn(5, 4)
    layer(x).square().sum().backward()
    optimizer.step()
    moments = optimizer.state[layer.pool.growable("expert", "w_gate").banks()[0][0]]["exp_avg"][1].clone()
    before = [layer.expert_output(i, x) for i in (0, 1)]
    layer.freeze([0])
    layer.add_experts(1, hidden_features=9)
    sync_optimizer(optimizer, layer)
    assert all(torch.equal(layer.expert_output(i, x), before[i]) for i in (0, 1))
    (survivor,) = (t for t, rows in layer.pool.growable("expert", "w_gate").live() if rows[0].owner == 1)
    assert torch.equal(optimizer.state[survivor]["exp_avg"][0], moments)
    optimizer.zero_grad()
    layer(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.expert_output(0, x), before[0])
    assert not torch.equal(layer.expert_output(1, x), before[1])
    fresh = MoELayer(ExpertPool(SwiGLUExpert(4, 6)), TopKRouter(4, 1))
    fresh.router.top_k = 2
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert fresh.pool.record(2).sizes == {"hidden_features": 9}


def test_the_output_has_the_size_of_the_input_unless_told():
    assert SwiGLUExpert(3, 5).out_features == 3
    assert repr(SwiGLUExpert(3, 5, 2)) == "SwiGLUExpert(3, 5, 2, bias=False)"


@pytest.mark.parametrize("sizes", [(0, 4, 4), (4, 0, 4), (4, 4, 0)])
def test_sizes_below_one(sizes):
    with pytest.raises(ValueError, match="every size of an expert must be at least 1"):
        SwiGLUExpert(*sizes)
