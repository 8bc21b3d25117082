"""relu_l1_loss: the published number, masks, closed experts, gradients, errors."""

import pytest
import torch
from torch.testing import assert_close

from modmoe.losses import relu_l1_loss

L = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, -1.0], [0.0, 2.0, 0.0], [1.0, 1.5, 1.0]])


def test_published_number():
    # R = [[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, .5, 0]]; f = 3/(1 * 4) (1, 2, 0) = (.75, 1.5, 0);
    # Rbar = (.25, .375, 0): .75 * .25 + 1.5 * .375 = .75
    gates = (L - 1).relu()
    assert relu_l1_loss(gates, 1).item() == pytest.approx(0.75, abs=1e-5)
    assert relu_l1_loss(gates, 2).item() == pytest.approx(0.375, abs=1e-5)
    assert (gates == 0).float().mean() == 0.75


def test_an_even_load_is_the_plain_l1_norm():
    # each expert active for half of the tokens, k = 1 of 2: f = 1
    gates = torch.tensor([[0.3, 0.0], [0.0, 0.5]])
    assert_close(relu_l1_loss(gates, 1), torch.tensor(0.4))  # (.3 + .5)/2


def test_masks_equal_leaving_rows_and_columns_out():
    gates = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).relu()
    mask, counted = torch.arange(8) % 3 > 0, torch.tensor([True, False, True, True])
    dirty = gates.masked_fill(~mask[:, None], torch.nan).requires_grad_()
    loss = relu_l1_loss(dirty, 1, mask, counted)
    assert_close(loss, relu_l1_loss(gates[mask][:, counted], 1))
    loss.backward()
    assert dirty.grad is not None
    assert (dirty.grad[~mask] == 0).all()
    assert (dirty.grad[:, 1] == 0).all()


def test_gradient_by_hand():
    gates = (L - 1).relu().requires_grad_()
    relu_l1_loss(gates, 1).backward()
    # f_e / T for every token: .75/4, 1.5/4, 0; f itself is not differentiated
    assert_close(gates.grad, torch.tensor([0.1875, 0.375, 0.0]).expand(4, 3))


def test_no_active_expert_is_zero():
    assert relu_l1_loss(torch.zeros(3, 2), 1) == 0


@pytest.mark.parametrize(
    ("gates", "options", "message"),
    [
        (torch.ones(3), {"top_k": 1}, r"shape \(T, E\)"),
        (torch.ones(2, 2), {"top_k": 0}, "top_k must be at least 1, got 0"),
        (torch.ones(2, 2), {"top_k": 1, "mask": torch.zeros(2, dtype=torch.bool)}, "no token is real"),
        (torch.ones(2, 2), {"top_k": 1, "open_experts": torch.ones(2)}, "open_experts must be bool"),
    ],
)
def test_bad_input(gates, options, message):
    with pytest.raises(ValueError, match=message):
        relu_l1_loss(gates, **options)
