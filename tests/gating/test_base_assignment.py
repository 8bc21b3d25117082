"""BaseAssignmentRouter: the balanced optimum by brute force, unequal shares, padding, closed experts."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from modmoe import BaseAssignmentRouter, ExpertPool, MLPExpert, MoELayer
from modmoe.gating.base_assignment import balanced_assignment

FIXTURE = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.7, 0.2], [0.6, 0.5]])


def layer_of(num_experts: int = 2) -> MoELayer:
    """A layer whose scores are its input: the gate's weight is the identity."""
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(num_experts, 3), num_experts), BaseAssignmentRouter(num_experts))
    with torch.no_grad():
        layer.pool.growable("gate", "weight").banks()[0][0].copy_(torch.eye(num_experts))
    return layer


def objective(scores: torch.Tensor, choices: torch.Tensor) -> float:
    return scores.gather(1, choices.view(-1, 1)).sum().item()


def test_the_published_fixture():
    layer = layer_of()
    routing = layer.route(FIXTURE)
    # .9 + .8 + .2 + .5 = 2.4 = .9 + .7 + .3 + .5: the optimum is not unique, its value is
    assert objective(FIXTURE, routing.expert_index) == pytest.approx(2.4, abs=1e-6)
    assert routing.load.tolist() == [2, 2]
    assert_close(routing.weight, FIXTURE.gather(1, routing.choices).sigmoid().view(-1))


def test_at_test_each_token_takes_its_best():
    layer = layer_of().eval()
    routing = layer.route(FIXTURE)
    assert routing.choices.tolist() == [[0]] * 4
    assert_close(routing.weight, FIXTURE[:, 0].sigmoid())
    assert_close(layer(FIXTURE)[1:2], layer(FIXTURE[1:2]))  # alone as in a batch


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_best_of_all_balanced_assignments(num_tokens, num_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_tokens, num_experts, generator=generator)
    choices = balanced_assignment(scores)
    loads = torch.bincount(choices, minlength=num_experts)
    assert loads.max() - loads.min() <= 1  # T/E above or below
    fair = [
        sum(scores[t, e].item() for t, e in enumerate(option))
        for option in itertools.product(range(num_experts), repeat=num_tokens)
        if max(map(option.count, range(num_experts))) - min(map(option.count, range(num_experts))) <= 1
    ]
    assert objective(scores, choices) == pytest.approx(max(fair), abs=1e-5)


def test_closed_experts_leave_the_most_even_assignment():
    closed = torch.tensor([[0.0, -torch.inf, -torch.inf]] * 4 + [[9.0, 1.0, 2.0]] * 2)
    # The first four have expert 0 only; the others go one each to experts 1 and 2, though they prefer 0.
    assert torch.bincount(balanced_assignment(closed)).tolist() == [4, 1, 1]
    # Nobody has expert 2: six tokens are three and three.
    nobody = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    nobody[:, 2] = -torch.inf
    assert torch.bincount(balanced_assignment(nobody), minlength=3).tolist() == [3, 3, 0]


@pytest.mark.parametrize("training", [True, False])
def test_padding_takes_no_place(training):
    layer = layer_of().train(training)
    x = torch.full((7, 2), torch.nan)
    mask = torch.tensor([True, False, True, True, False, True, False])
    x[mask] = FIXTURE
    routing = layer.route(x, mask=mask)
    assert routing.expert_index[~mask].tolist() == [-1] * 3
    assert torch.equal(routing.expert_index[mask], layer.route(FIXTURE).expert_index)
    assert_close(layer(x, mask=mask)[mask], layer(FIXTURE))
    assert (layer(x, mask=mask)[~mask] == 0).all()
    assert layer.route(x, mask=torch.zeros(7, dtype=torch.bool)).load.tolist() == [0, 0]


def test_equals_a_loop():
    layer = layer_of(3)
    layer.add_experts(1, hidden_features=5)
    layer.freeze([0])
    x = torch.randn(8, 3)
    y, routing = layer(x), layer.routing
    for t, (e,) in enumerate(routing.choices.tolist()):
        score = x[t] @ layer.pool.namespace("gate")["weight"][e]
        assert_close(y[t], score.sigmoid() * layer.expert_output(layer.pool.ids[e], x[t]))
    assert routing.load.tolist() == [2, 2, 2, 2]


def test_the_gate_learns_through_the_weight():
    layer = layer_of()
    layer.route(FIXTURE).weight.sum().backward()
    rows = layer.pool.growable("gate", "weight").banks()[0][0]
    choices = layer.route(FIXTURE).choices
    # d sigmoid(s)/ds = sigmoid (1 - sigmoid), times the token
    slope = FIXTURE.gather(1, choices).sigmoid()
    slope = slope * (1 - slope)
    expected = torch.zeros(2, 2).index_add(0, choices.view(-1), slope * FIXTURE)
    assert_close(rows.grad, expected)
    assert rows.grad.abs().min() > 0


def test_what_it_declares():
    router = layer_of().router
    assert (router.scope, router.causal, router.weight_sum) == ("batch", False, "<= 1")
    with pytest.raises(ValueError, match="gives each token one expert, got top_k=2"):
        layer_of().route(FIXTURE, top_k=2)
