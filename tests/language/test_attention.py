"""Rotary angles, grouped heads, and attention heads as experts in a language model."""

import math

import pytest
import torch
from torch.testing import assert_close

from modmoe import AttentionExpert, ExpertPool, MoAttention, TopKRouter
from modmoe.language.attention import CausalAttention, HeadMixture, Step, rotate, rotation

TIMES = torch.arange(3).unsqueeze(0)


def step(theta=None):
    return Step(None, None, None, TIMES, theta, None)


def test_rotation_by_hand():
    # H = 4, theta = 100: the pair (0, 2) turns by p, the pair (1, 3) by p / 10
    cos, sin = rotation(torch.tensor([2]), 4, 100.0, torch.float64)
    turned = rotate(torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64), cos, sin)
    expected = [[math.cos(2.0), math.cos(0.2), math.sin(2.0), math.sin(0.2)]]
    assert_close(turned, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_rotated_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 8)

    def product(here, there):
        (a, b), (c, d) = (rotation(torch.tensor([p]), 8, 50.0, torch.float32) for p in (here, there))
        return (rotate(q, a, b) * rotate(k, c, d)).sum()

    assert_close(product(7, 3), product(15, 11), atol=1e-5, rtol=0)
    assert abs(product(7, 3) - product(7, 4)) > 1e-3


def test_gradients_in_float64():
    torch.manual_seed(0)
    attention = CausalAttention(8, 2, 1).double()
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention(x, step(10.0)), x)


def test_grouped_heads_equal_heads_with_the_keys_repeated():
    torch.manual_seed(0)
    grouped, full = CausalAttention(16, 4, 2), CausalAttention(16, 4)
    full.load_state_dict(
        {
            name: tensor if tensor.shape[0] == 16 else tensor.view(2, 1, 4, 16).expand(2, 2, 4, 16).reshape(16, 16)
            for name, tensor in grouped.state_dict().items()
        }
    )
    x = torch.randn(2, 3, 16)
    assert_close(grouped(x, step(10.0)), full(x, step(10.0)))


def test_head_mixture_without_rotary_positions_is_mo_attention():
    torch.manual_seed(0)
    layer = HeadMixture(ExpertPool(AttentionExpert(8, 4), 5), TopKRouter(8, 2), causal=True)
    plain = MoAttention(ExpertPool(AttentionExpert(8, 4), 5), TopKRouter(8, 2), causal=True)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 8)
    results = []
    for module, call in ((layer, lambda x: layer(x, step())), (plain, plain)):
        y = call(x)
        y.square().sum().backward()
        results.append([y, *(parameter.grad for parameter in module.parameters())])
    assert_close(*results)


@pytest.mark.parametrize(("sizes", "message"), [((6, 2), "even size"), ((8, 2, 3), "must divide the 2 heads")])
def test_sizes_that_do_not_divide(sizes, message):
    with pytest.raises(ValueError, match=message):
        CausalAttention(*sizes)
