"""importance_loss and load_loss: the published numbers, both variances, masks, closed experts, gradients, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from modmoe.losses import expected_load, importance_loss, load_loss

L = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, -1.0], [0.0, 2.0, 0.0], [1.0, 1.5, 1.0]])
N = torch.tensor([[0.1, -0.2, 0.3], [0.0, 0.5, -0.5], [0.2, -0.1, 0.0], [-0.3, 0.4, 0.1]])
ONES = torch.ones(4, 3)
TOP_2 = torch.tensor([[0, 1], [0, 1], [1, 0], [1, 0]])  # ties go to the lowest index


# -- importance --------------------------------------------------------------------------------------------------------


def test_importance_by_hand():
    # sums (3, 1): mean 2, population variance ((3-2)^2 + (1-2)^2)/2 = 1 (2 if divided by E - 1): 1/4
    assert_close(importance_loss(torch.tensor([[1.0, 0.0], [1.0, 0.5], [1.0, 0.5]])), torch.tensor(0.25))


def test_published_numbers_of_importance():
    # dense: column sums 1.711057, 1.728304, .560639; their mean 4/3. The unbiased variance would give .251927
    assert importance_loss(L.softmax(1)).item() == pytest.approx(0.167951, abs=1e-5)
    assert importance_loss(L.softmax(1)).item() * 3 / 2 == pytest.approx(0.251927, abs=1e-5)
    gates = torch.zeros(4, 3).scatter(1, TOP_2, L.gather(1, TOP_2).softmax(1))
    assert importance_loss(gates).item() == pytest.approx(0.500635, abs=1e-5)


def test_even_importance_is_zero_and_none_is_zero():
    assert_close(importance_loss(torch.eye(3)), torch.tensor(0.0))
    gates = torch.zeros(2, 3, requires_grad=True)
    loss = importance_loss(gates)
    loss.backward()
    assert loss == 0
    assert gates.grad is not None
    assert torch.isfinite(gates.grad).all()


def test_layers_concatenated_hide_their_imbalance():
    # each layer collapses on one of two experts, another one each: CV^2 of (4, 0) is 1; together (4, 4): 0
    one, other = torch.eye(2)[[0] * 4], torch.eye(2)[[1] * 4]
    assert importance_loss(one) == importance_loss(other) == 1
    assert importance_loss(torch.cat([one, other])) == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_masks_equal_leaving_rows_and_columns_out(seed):
    generator = torch.Generator().manual_seed(seed)
    gates = torch.rand(8, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(8, generator=generator) < 0.6
    counted = torch.rand(4, generator=generator) < 0.6
    mask[0] = counted[0] = True
    expected = importance_loss(gates[mask][:, counted])
    dirty = gates.masked_fill(~mask[:, None], torch.nan)
    assert_close(importance_loss(dirty, mask, counted), expected)
    noisy, std = gates + torch.randn(8, 4, generator=generator, dtype=torch.float64), gates + 0.1
    load = expected_load(gates[mask], noisy[mask], std[mask], 2)[counted]
    expected = load.var(correction=0) / load.mean() ** 2
    assert_close(load_loss(dirty, noisy, std, 2, mask, counted), expected)


# -- load --------------------------------------------------------------------------------------------------------------


def test_published_numbers_of_load():
    # k = 1, token 0: H = (2.1, .8, .3); thresholds .8, 2.1, 2.1; Phi(2 - .8) = .884930, Phi(-1.1) = .135666,
    # Phi(-2.1) = .017864; and so on
    load = expected_load(L, L + N, ONES, 1)
    assert_close(load, torch.tensor([1.789169, 1.913813, 0.253391]), atol=1e-5, rtol=0)
    assert load_loss(L, L + N, ONES, 1).item() == pytest.approx(0.327808, abs=1e-5)
    assert load_loss(L, L + N, ONES, 2).item() == pytest.approx(0.125536, abs=1e-5)
    first = expected_load(L[:1], (L + N)[:1], ONES[:1], 1)
    assert_close(first, torch.tensor([0.884930, 0.135666, 0.017864]), atol=1e-6, rtol=0)


def test_without_noise_it_counts():
    load = expected_load(L[:3, :2], L[:3, :2], torch.zeros(3, 2), 1)
    assert_close(load, torch.tensor([2.0, 1.0]))


def test_the_threshold_leaves_an_expert_itself_out():
    # H = (3, 1): expert 0 compares with 1, not with its own 3: Phi(2 - 1) = .841345, not Phi(2 - 3)
    h, noisy = torch.tensor([[2.0, 1.5]]), torch.tensor([[3.0, 1.0]])
    assert expected_load(h, noisy, torch.ones(1, 2), 1)[0].item() == pytest.approx(0.841345, abs=1e-5)


def test_tied_logits():
    # every threshold is 1, and every h as well: Phi(0) for each
    assert_close(expected_load(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 3), 2), torch.full((3,), 0.5))


def test_k_of_all_takes_everybody():
    assert_close(expected_load(L, L + N, ONES, 3), torch.full((3,), 4.0))
    assert_close(load_loss(L, L + N, ONES, 5), torch.tensor(0.0))


def test_closed_experts_take_nothing_and_leave_room():
    h = torch.tensor([[1.0, 0.0, -torch.inf], [1.0, -torch.inf, -torch.inf]]).requires_grad_()
    std = torch.ones(2, 3, requires_grad=True)
    load = expected_load(h, h + 0.1, std, 1)
    # token 0 as if there were two: Phi(1 - .1) = .815940, Phi(0 - 1.1) = .135666; token 1 takes expert 0 for certain
    assert_close(load, torch.tensor([1.815940, 0.135666, 0.0]), atol=1e-6, rtol=0)
    load.sum().backward()
    assert h.grad is not None
    assert std.grad is not None
    assert torch.isfinite(h.grad).all()
    assert torch.isfinite(std.grad).all()


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    h, noise, std = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    h, std = h.requires_grad_(), (std.abs() + 0.2).requires_grad_()
    mask = torch.tensor([True, True, False, True, True])
    counted = torch.tensor([True, True, True, False])
    assert torch.autograd.gradcheck(lambda h, s: load_loss(h, h + noise * s, s, 2, mask, counted), (h, std))
    assert torch.autograd.gradcheck(lambda h: importance_loss(h.softmax(1), mask, counted), (h,))


def test_half_precision_is_computed_in_float32():
    h = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    std = torch.ones_like(h)
    assert_close(load_loss(h, h + 1, std, 2), load_loss(h.float(), (h + 1).float(), std.float(), 2))
    assert_close(importance_loss(h.abs()), importance_loss(h.abs().float()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.ones(3)}, r"shape \(T, E\)"),
        ({"noisy_logits": torch.ones(4, 2)}, r"must be \(4, 3\), got \(4, 2\) and \(4, 3\)"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"noise_std": -ONES}, "noise_std must not be negative"),
        ({"mask": torch.zeros(4, dtype=torch.bool)}, "no token is real"),
        ({"open_experts": torch.ones(4, 3, dtype=torch.bool)}, r"open_experts must be bool of shape \(3,\)"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        load_loss(**{"logits": L, "noisy_logits": L + N, "noise_std": ONES, "top_k": 1, **change})


def test_bad_gates():
    with pytest.raises(ValueError, match="no token is real: T is 0"):
        importance_loss(torch.ones(0, 3))
    with pytest.raises(ValueError, match="open_experts must be bool"):
        importance_loss(ONES, open_experts=torch.ones(3))
