"""z_loss: the published number, masks, closed experts, gradients, errors."""

import math

import pytest
import torch
from torch.testing import assert_close

from modmoe.losses import z_loss

INF = float("inf")


def test_one_token_by_hand():
    # exp(log 1) + exp(log 3) = 4: L = (log 4)^2 = 1.921812
    loss = z_loss(torch.tensor([[0.0, math.log(3.0)]]))
    assert loss.item() == pytest.approx(math.log(4.0) ** 2, abs=1e-6)


def test_published_number():
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, -1.0], [0.0, 2.0, 0.0], [1.0, 1.5, 1.0]])
    # logsumexp: 2.407606, 1.407606, log(2 + e^2) = 2.239545, 1 + log(2 + e^.5) = 2.294377.
    # Squares: 5.796567, 1.981355, 5.015562, 5.264166; their mean is 18.057650/4 = 4.514412
    assert z_loss(logits).item() == pytest.approx(4.514412, abs=1e-5)


def test_gradcheck():
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True, True])
    closed = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)

    def loss(logits):
        return z_loss(logits.masked_fill(closed, -INF), mask)

    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.autograd.gradgradcheck(loss, (logits,))


def test_mask_leaves_tokens_out():
    torch.manual_seed(0)
    logits = torch.randn(6, 4)
    mask = torch.tensor([True, False, True, True, False, True])
    assert_close(z_loss(logits, mask), z_loss(logits[mask]))


@pytest.mark.parametrize("padding", [float("nan"), INF, -INF])
def test_padding_may_hold_anything(padding):
    logits = torch.tensor([[0.0, 1.0], [padding, padding]], requires_grad=True)
    loss = z_loss(logits, torch.tensor([True, False]))
    loss.backward()
    assert_close(loss, z_loss(logits[:1]))
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[1] == 0).all()


def test_a_closed_expert_equals_a_missing_one():
    torch.manual_seed(0)
    logits = torch.randn(5, 3)
    closed = torch.cat([logits, torch.full((5, 1), -INF)], dim=1).requires_grad_()
    loss = z_loss(closed)
    assert_close(loss, z_loss(logits))
    loss.backward()
    assert closed.grad is not None
    assert torch.isfinite(closed.grad).all()
    assert (closed.grad[:, -1] == 0).all()


def test_half_precision_is_computed_in_float32():
    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert_close(z_loss(logits), z_loss(logits.float()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("logits", "mask", "message"),
    [
        (torch.ones(3), None, r"shape \(T, E\)"),
        (torch.ones(0, 3), None, "no token is real"),
        (torch.ones(2, 3), torch.zeros(2, dtype=torch.bool), "no token is real"),
        (torch.ones(2, 3), torch.ones(3, dtype=torch.bool), "mask must be bool"),
        (torch.tensor([[0.0, 1.0], [-INF, -INF]]), None, "every logit at -inf"),
    ],
)
def test_bad_input(logits, mask, message):
    with pytest.raises(ValueError, match=message):
        z_loss(logits, mask)
