"""load_balancing_loss: the published numbers, masks, closed experts, gradients, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from modmoe.losses import load_balancing_loss

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, -1.0], [0.0, 2.0, 0.0], [1.0, 1.5, 1.0]])


def test_two_tokens_by_hand():
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4]])
    # Both tokens choose expert 0: f = [1, 0]; P = [(.8 + .6)/2, (.2 + .4)/2] = [.7, .3].
    # L = 2 (1 * .7 + 0 * .3) = 1.4
    assert_close(load_balancing_loss(probs, torch.tensor([[0], [0]])), torch.tensor(1.4))


def test_published_number_top_1():
    # softmax rows: [.665241, .244728, .090031] twice, [.106507, .786986, .106507],
    # [.274069, .451862, .274069].
    # P0 = (2 * .665241 + .106507 + .274069)/4 = .427765; P1 = (2 * .244728 + .786986 + .451862)/4 = .432076.
    # Choices 0, 0, 1, 1: f = [.5, .5, 0]. L = 3 (.5 * .427765 + .5 * .432076) = 1.289761
    loss = load_balancing_loss(LOGITS.softmax(-1), torch.tensor([0, 0, 1, 1]))
    assert loss.item() == pytest.approx(1.289761, abs=1e-5)


def test_published_number_top_2():
    # Ties go to the lowest index: {0, 1}, {0, 1}, {1, 0}, {1, 0}. Of 8 slots 4 are 0 and 4 are 1:
    # f = [.5, .5, 0] as for k = 1.
    # Mixtral's f sums to k = 2 and gives 2.579522; half of that is 1.289761.
    loss = load_balancing_loss(LOGITS.softmax(-1), torch.tensor([[0, 1], [0, 1], [1, 0], [1, 0]]))
    assert loss.item() == pytest.approx(2.579522 / 2, abs=1e-5)


def test_published_numbers_of_other_conventions():
    probs, top_1 = LOGITS.softmax(-1), torch.tensor([0, 0, 1, 1])
    # GShard: the mean of f P over 3 experts, 1.289761 / 3^2
    gshard = load_balancing_loss(probs, top_1, convention="gshard")
    assert gshard.item() == pytest.approx(0.143307, abs=1e-5)
    # Mixtral: f sums to k = 2
    mixtral = load_balancing_loss(probs, torch.tensor([[0, 1], [0, 1], [1, 0], [1, 0]]), convention="mixtral")
    assert mixtral.item() == pytest.approx(2.579522, abs=1e-5)


def test_a_convention_counts_the_open_experts():
    # two open experts, used evenly: f = P = 1/2. Switch 1, GShard 1/4, Mixtral k = 2; a count of 3 would show
    probs = torch.tensor([[0.4, 0.4, 0.2], [0.1, 0.1, 0.8]])
    values = [
        load_balancing_loss(
            probs, torch.tensor([[0, 1], [1, 0]]), open_experts=torch.tensor([True, True, False]), convention=name
        ).item()
        for name in ("switch", "gshard", "mixtral")
    ]
    assert values == pytest.approx([1.0, 0.25, 2.0])


def test_layers_concatenated_hide_their_imbalance():
    # two layers with logits (5, 0) and (0, 5) for every token: p = e^5/(e^5 + 1) = .993307; 2 * 1 * p = 1.986614 each
    one, other = torch.tensor([[5.0, 0.0]]).softmax(1).repeat(4, 1), torch.tensor([[0.0, 5.0]]).softmax(1).repeat(4, 1)
    zeros, ones = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    for probs, chosen in ((one, zeros), (other, ones)):
        assert load_balancing_loss(probs, chosen).item() == pytest.approx(1.986614, abs=1e-5)
    together = load_balancing_loss(torch.cat([one, other]), torch.cat([zeros, ones]))
    assert together.item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_uniform_is_one_for_every_k(top_k):
    # P_i = 1/3, f sums to 1: L = 3 * 1/3 = 1.
    expert_index = (torch.arange(6)[:, None] + torch.arange(top_k)) % 3
    assert_close(load_balancing_loss(torch.full((6, 3), 1 / 3), expert_index), torch.tensor(1.0))


def test_collapse_is_the_number_of_experts():
    # f = P = [1, 0, 0, 0]: L = 4 * 1 * 1.
    probs = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(5, 1)
    assert_close(load_balancing_loss(probs, torch.zeros(5, 1, dtype=torch.int64)), torch.tensor(4.0))


def test_dropped_assignments_do_not_count():
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4]])
    # Slots 0, -, 1, 0: f = [2/3, 1/3]; P = [.7, .3]. L = 2 (2/3 * .7 + 1/3 * .3) = 2 * 1.7/3 = 1.133333
    loss = load_balancing_loss(probs, torch.tensor([[0, -1], [1, 0]]))
    assert_close(loss, torch.tensor(3.4 / 3))


def test_closed_experts_by_hand():
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.0, 0.0, 1.0]])
    expert_index = torch.tensor([[0, 1], [2, 0], [2, 0]])
    # Open: 0 and 1. Token 2 has nothing on them and is left out. Renormalised: [2/3, 1/3], [1/2, 1/2].
    # P = [7/12, 5/12]. Open assignments 0, 1, 0: f = [2/3, 1/3]. L = 2 (2/3 * 7/12 + 1/3 * 5/12) = 2 * 19/36
    loss = load_balancing_loss(probs, expert_index, open_experts=torch.tensor([True, True, False]))
    assert_close(loss, torch.tensor(38 / 36))


def test_uniform_over_the_open_experts_is_one():
    probs = torch.tensor([[0.9, 0.05, 0.05], [0.2, 0.4, 0.4]])
    loss = load_balancing_loss(probs, torch.tensor([[0, 1], [2, 0]]), open_experts=torch.tensor([False, True, True]))
    assert_close(loss, torch.tensor(1.0))


def test_gradcheck():
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expert_index = torch.tensor([[0, 1], [1, 3], [2, -1], [0, 2], [3, 1]])
    mask = torch.tensor([True, True, True, False, True])
    open_experts = torch.tensor([True, True, False, True])

    def loss(logits):
        return load_balancing_loss(logits.softmax(-1), expert_index, mask, open_experts)

    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.autograd.gradgradcheck(loss, (logits,))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), num_experts=st.integers(2, 6), top_k=st.integers(1, 2))
def test_masks_equal_leaving_rows_and_columns_out(seed, num_experts, top_k):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(8, num_experts, generator=generator, dtype=torch.float64).softmax(-1)
    expert_index = probs.topk(top_k, dim=-1).indices
    mask = torch.rand(8, generator=generator) < 0.7
    open_experts = torch.rand(num_experts, generator=generator) < 0.7
    mask[0] = open_experts[0] = True

    position = torch.where(open_experts, open_experts.cumsum(0) - 1, -1)
    few = probs[mask][:, open_experts]
    expected = load_balancing_loss(few / few.sum(-1, keepdim=True), position[expert_index[mask]])
    assert_close(load_balancing_loss(probs, expert_index, mask, open_experts), expected)
    assert 0 <= expected <= open_experts.sum() + 1e-9


def test_padding_may_hold_anything():
    probs = torch.tensor([[0.8, 0.2], [float("nan"), float("nan")], [0.6, 0.4]], requires_grad=True)
    loss = load_balancing_loss(probs, torch.tensor([[0], [1], [0]]), torch.tensor([True, False, True]))
    assert_close(loss, torch.tensor(1.4))
    loss.backward()
    assert probs.grad is not None
    assert torch.isfinite(probs.grad).all()
    assert (probs.grad[1] == 0).all()


def test_nan_in_a_real_token_is_not_hidden():
    probs = torch.tensor([[0.8, 0.2], [float("nan"), 0.5]])
    assert load_balancing_loss(probs, torch.tensor([[0], [0]])).isnan()


@pytest.mark.parametrize(
    ("probs", "expert_index"),
    [
        ([[0.5, 0.5, 0.0]], [[2]]),  # assigned to a closed expert
        ([[0.5, 0.5, 0.0]], [[-1]]),  # not assigned
        ([[0.0, 0.0, 1.0]], [[0]]),  # no probability on an open expert
        ([[1e-42, 0.0, 1.0]], [[0]]),  # a denormal, whose reciprocal overflows
    ],
)
def test_no_open_assignment_is_zero_with_a_graph(probs, expert_index):
    probs = torch.tensor(probs, requires_grad=True)
    loss = load_balancing_loss(probs, torch.tensor(expert_index), open_experts=torch.tensor([True, True, False]))
    assert loss == 0
    loss.backward()
    assert probs.grad is not None
    assert (probs.grad == 0).all()


def test_half_precision_counts_in_float32():
    # 4096 equal tokens: a bfloat16 count would stop at 256.
    probs = torch.full((4096, 2), 0.5, dtype=torch.bfloat16)
    loss = load_balancing_loss(probs, torch.arange(4096) % 2)
    assert_close(loss, torch.tensor(1.0))


def test_it_spreads_a_collapsed_router():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    weight = torch.randn(8, 4).mul_(0.1).requires_grad_()
    bias = torch.tensor([2.0, 0.0, 0.0, 0.0], requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.05)

    def step():
        probs = (x @ weight + bias).softmax(-1)
        expert_index = probs.topk(1).indices
        share = torch.bincount(expert_index.flatten(), minlength=4) / len(x)
        return load_balancing_loss(probs, expert_index), share.max().item()

    first, first_share = step()
    for _ in range(100):
        optimizer.zero_grad()
        step()[0].backward()
        optimizer.step()
    last, last_share = step()
    assert first > 2
    assert first_share > 0.9
    assert last < 1.1
    assert last_share < 0.6


@pytest.mark.parametrize(
    ("probs", "expert_index", "options", "message"),
    [
        (torch.ones(3), torch.zeros(3, dtype=torch.int64), {}, r"shape \(T, E\)"),
        (torch.ones(0, 2), torch.zeros(0, 1, dtype=torch.int64), {}, "no token is real"),
        (torch.ones(2, 2), torch.zeros(3, dtype=torch.int64), {}, r"expert_index must be \(2, K\)"),
        (torch.ones(2, 2), torch.tensor([0, 2]), {}, "below E = 2"),
        (
            torch.ones(2, 2),
            torch.tensor([0, 1]),
            {"mask": torch.zeros(2, dtype=torch.bool)},
            "no token is real",
        ),
        (
            torch.ones(2, 2),
            torch.tensor([0, 1]),
            {"mask": torch.ones(3, dtype=torch.bool)},
            "mask must be bool",
        ),
        (torch.ones(2, 2), torch.tensor([0, 1]), {"mask": torch.ones(2)}, "mask must be bool"),
        (
            torch.ones(2, 2),
            torch.tensor([0, 1]),
            {"open_experts": torch.ones(3, dtype=torch.bool)},
            "open_experts must be bool",
        ),
        (torch.ones(2, 2), torch.tensor([0, 1]), {"convention": "ours"}, "convention is one of .* got 'ours'"),
    ],
)
def test_bad_input(probs, expert_index, options, message):
    with pytest.raises(ValueError, match=message):
        load_balancing_loss(probs, expert_index, **options)
