"""The record of what a router decided."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from modmoe import Routing


def three_tokens() -> Routing:
    """Token 0 goes to experts 2 and 0, token 1 to 2 (its second choice was dropped), token 2 is padding."""
    return Routing(
        token_index=torch.tensor([0, 0, 1, 1, 2, 2]),
        expert_index=torch.tensor([2, 0, 2, -1, -1, -1]),
        weight=torch.tensor([0.75, 0.25, 1.0, 0.0, 0.0, 0.0]),
        num_tokens=3,
        num_experts=4,
        logits=torch.zeros(3, 4),
        probs=torch.full((3, 4), 0.25),
        top_k=2,
    )


def test_choices_load_and_matrix_by_hand():
    routing = three_tokens()
    assert routing.choices.tolist() == [[2, 0], [2, -1], [-1, -1]]
    assert routing.load.tolist() == [1, 0, 2, 0]  # expert 2 twice, expert 0 once; three slots dropped
    assert routing.matrix().tolist() == [[0.25, 0.0, 0.75, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_a_dropped_assignment_counts_for_nothing_whatever_its_weight():
    routing = three_tokens()
    routing.weight = torch.tensor([0.75, 0.25, 1.0, torch.nan, 7.0, torch.inf])
    assert_close(routing.matrix(), three_tokens().matrix())


def test_the_matrix_carries_the_gradient_of_the_weights():
    routing = three_tokens()
    routing.weight.requires_grad_()
    scale = torch.arange(12.0).view(3, 4)
    (routing.matrix() * scale).sum().backward()
    # slots: (token 0, expert 2) -> 2, (0, 0) -> 0, (1, 2) -> 6, and nothing for dropped ones
    assert routing.weight.grad is not None
    assert routing.weight.grad.tolist() == [2.0, 0.0, 6.0, 0.0, 0.0, 0.0]


def test_choices_need_a_fixed_number_for_each_token():
    routing = three_tokens()
    routing.top_k = None
    with pytest.raises(ValueError, match="same number of choices"):
        _ = routing.choices


def test_detach_cuts_every_tensor_and_keeps_the_rest():
    routing = three_tokens()
    for name in ("weight", "logits", "probs"):
        setattr(routing, name, getattr(routing, name).clone().requires_grad_() * 1)
    cut = routing.detach()
    assert all(getattr(routing, name).grad_fn is not None for name in ("weight", "logits", "probs"))
    assert all(getattr(cut, name).grad_fn is None for name in ("weight", "logits", "probs"))
    assert (cut.top_k, cut.num_tokens, cut.num_experts, cut.mask) == (2, 3, 4, None)
    assert torch.equal(cut.expert_index, routing.expert_index)


def test_assigned_by_hand():
    routing = Routing.assigned(torch.tensor([1, 0, 1]), 3, torch.float64)
    assert routing.matrix().tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert routing.load.tolist() == [1, 2, 0]
    assert routing.weight.dtype == torch.float64
    assert (routing.top_k, routing.has_drops) == (1, False)


@settings(max_examples=50, deadline=None)
@given(
    choices=st.lists(st.lists(st.integers(-1, 4), min_size=3, max_size=3), max_size=8),
    seed=st.integers(0, 1000),
)
def test_load_and_matrix_equal_a_loop(choices, seed):
    flat = [expert for row in choices for expert in row]
    weight = torch.rand(len(flat), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    routing = Routing(
        token_index=torch.arange(len(choices)).repeat_interleave(3),
        expert_index=torch.tensor(flat, dtype=torch.int64),
        weight=weight,
        num_tokens=len(choices),
        num_experts=5,
        logits=torch.zeros(len(choices), 5),
        probs=torch.zeros(len(choices), 5),
        top_k=3,
    )
    expected = torch.zeros(len(choices), 5, dtype=torch.float64)
    for slot, expert in enumerate(flat):
        if expert >= 0:
            expected[slot // 3, expert] += weight[slot]
    assert_close(routing.matrix(), expected)
    assert routing.load.tolist() == [flat.count(expert) for expert in range(5)]
    assert routing.choices.tolist() == choices
