"""Shared experts beside routed ones: plain as in DeepSeek, gated as in Qwen2-MoE."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from modmoe import ExpertPool, GatedSharedExpert, MoELayer, SwiGLUExpert, TopKRouter


def ffn() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4))


def test_gate_by_hand():
    shared = GatedSharedExpert(nn.Linear(2, 1), 2)
    with torch.no_grad():
        shared.gate.weight.copy_(torch.tensor([[1.0, 0.0]]))
        shared.expert.weight.copy_(torch.tensor([[2.0, 3.0]]))
        shared.expert.bias.fill_(1.0)
    # x = (ln 3, 0): sigmoid(ln 3) = 3/4; f = 2 ln 3 + 1
    y = shared(torch.tensor([[math.log(3), 0.0]]))
    assert y.item() == pytest.approx(0.75 * (2 * math.log(3) + 1), abs=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_shared_plus_routed(gated):
    torch.manual_seed(0)
    plain = ffn()
    shared = GatedSharedExpert(plain, 4) if gated else plain
    pool = ExpertPool(SwiGLUExpert(4, 6), 3)
    layer, routed = MoELayer(pool, TopKRouter(4, 2), shared_expert=shared), MoELayer(pool, TopKRouter(4, 2))
    with torch.no_grad():
        routed.pool.growable("gate_2", "weight").banks()[0][0].copy_(pool.growable("gate", "weight").banks()[0][0])
    x = torch.randn(2, 5, 4)
    weight = torch.sigmoid(x @ shared.gate.weight.T) if gated else 1.0
    assert_close(layer(x), routed(x) + weight * plain(x), atol=1e-6, rtol=1e-6)


def test_padding_and_freezing():
    torch.manual_seed(0)
    shared = GatedSharedExpert(ffn(), 4)
    layer = MoELayer(ExpertPool(SwiGLUExpert(4, 6), 3), TopKRouter(4, 2), shared_expert=shared)
    x = torch.randn(5, 4)
    mask = torch.tensor([True, True, False, True, False])
    padded = torch.where(mask.unsqueeze(1), x, torch.full_like(x, torch.nan))
    y = layer(padded, mask=mask)
    assert_close(y[mask], layer(x)[mask], atol=1e-6, rtol=0)
    assert (y[~mask] == 0).all()
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in shared.parameters())
    layer.freeze([0])
    assert all(p.requires_grad for p in shared.parameters())
    layer.freeze()
    assert not any(p.requires_grad for p in shared.parameters())


def test_gradcheck():
    torch.manual_seed(0)
    shared = GatedSharedExpert(nn.Linear(3, 2), 3).double()
    assert torch.autograd.gradcheck(shared, torch.randn(4, 3, dtype=torch.float64, requires_grad=True))


def test_refusal():
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        GatedSharedExpert(nn.Identity(), 0)
