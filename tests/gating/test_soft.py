"""SoftRouter: weights by hand, a loop over tokens and slots, padding, closed experts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from modmoe import ExpertPool, MLPExpert, MoELayer, SlotRouting, SoftRouter
from modmoe.gating.soft import masked_softmax


def layer_of(num_experts: int = 3, slots: int = 2, seed: int = 0) -> MoELayer:
    torch.manual_seed(seed)
    return MoELayer(ExpertPool(MLPExpert(4, 5, 3), num_experts), SoftRouter(4, slots))


def by_loop(layer: MoELayer, x: Tensor, mask: Tensor | None = None, expert_mask: Tensor | None = None) -> Tensor:
    """One sequence x (S, D): slot after slot, token after token."""
    phi, scale = layer.pool.namespace(layer.namespace)["phi"], layer.router.scale
    real = [s for s in range(len(x)) if mask is None or mask[s]]
    slots = [(e, p) for e in range(phi.shape[0]) for p in range(phi.shape[1]) if expert_mask is None or expert_mask[e]]
    logit = {(s, e, p): scale * (x[s] / x[s].norm()) @ (phi[e, p] / phi[e, p].norm()) for s in real for e, p in slots}
    y = torch.zeros(len(x), layer.pool.expert.out_features)
    outputs = {}
    for e, p in slots:
        total = sum(logit[s, e, p].exp() for s in real)
        mixture = sum(logit[s, e, p].exp() / total * x[s] for s in real)
        outputs[e, p] = layer.expert_output(layer.pool.ids[e], mixture)
    for s in real:
        total = sum(logit[s, e, p].exp() for e, p in slots)
        y[s] = sum(logit[s, e, p].exp() / total * outputs[e, p] for e, p in slots)
    return y


def test_weights_by_hand():
    layer = MoELayer(ExpertPool(MLPExpert(2, 3), 2), SoftRouter(2, 1))
    with torch.no_grad():
        layer.pool.growable("gate", "phi").banks()[0][0].copy_(torch.tensor([[[5.0, 0.0]], [[0.0, 0.1]]]))
        layer.router.scale.fill_(math.log(3.0))
    routing = layer.route(torch.tensor([[7.0, 0.0], [0.0, 2.0]]))
    assert isinstance(routing, SlotRouting)
    # Lengths do not count: logits are log 3 where token and slot agree and 0 where not.
    assert_close(routing.logits, math.log(3.0) * torch.eye(2))
    # over tokens (columns) and over slots (rows) 3/4 and 1/4
    by_hand = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    assert_close(routing.dispatch.view(2, 2), by_hand)
    assert_close(routing.combine.view(2, 2), by_hand)
    assert_close(routing.matrix(), by_hand)


def test_the_raw_input_is_mixed():
    layer = MoELayer(ExpertPool(MLPExpert(2, 3, activation="relu"), 1), SoftRouter(2, 1))
    x = torch.tensor([[30.0, 0.0]])  # one token, one slot: all weights are 1
    assert_close(layer(x), layer.expert_output(0, x))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("closed", [False, True])
def test_equals_a_loop(masked, closed):
    layer = layer_of()
    layer.add_experts(2, hidden_features=7)
    layer.freeze([1, 3])
    with torch.no_grad():
        layer.router.scale.fill_(2.5)
    x = torch.randn(2, 6, 4)
    mask = torch.tensor([[True, True, False, True, True, False], [False] + [True] * 5]) if masked else None
    expert_mask = torch.tensor([True, False, True, True, True]) if closed else None
    y = layer(x, mask=mask, expert_mask=expert_mask)
    for b in range(2):
        expected = by_loop(layer, x[b], None if mask is None else mask[b], expert_mask)
        assert_close(y[b], expected, atol=1e-6, rtol=1e-5)


def test_a_token_sums_its_slots_of_an_expert():
    layer = layer_of()
    routing = layer.route(torch.randn(2, 3, 4))
    assert_close(routing.matrix(), routing.combine.sum(3).view(6, 3))
    assert_close(routing.matrix(), routing.probs)
    assert_close(routing.dispatch.sum(1), torch.ones(2, 3, 2))
    assert_close(routing.combine.sum((2, 3)), torch.ones(2, 3))
    assert routing.load.tolist() == [6, 6, 6]


def test_padding_anywhere_changes_nothing():
    layer = layer_of()
    x = torch.randn(1, 4, 4)
    padded = torch.full((2, 7, 4), torch.nan)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, [0, 2, 3, 6]] = True
    padded[0, mask[0]] = x[0]
    y = layer(padded.requires_grad_(), mask=mask)
    assert_close(y[0, mask[0]], layer(x)[0])
    assert (y[~mask] == 0).all()  # the second sequence has nothing but padding
    y.sum().backward()
    assert (padded.grad[~mask] == 0).all()
    assert padded.grad[mask].isfinite().all()
    assert layer.router.scale.grad.isfinite()


def test_a_task_keeps_its_tokens_to_its_experts():
    layer = layer_of(2)
    x = torch.randn(5, 4)
    open_experts = torch.tensor([[True, False]] * 3 + [[False, True]] * 2)
    y = layer(x, expert_mask=open_experts)
    assert_close(y[:3], by_loop(layer, x[:3], None, torch.tensor([True, False])), atol=1e-6, rtol=1e-5)
    assert_close(y[3:], by_loop(layer, x[3:], None, torch.tensor([False, True])), atol=1e-6, rtol=1e-5)


def test_masked_softmax_by_hand():
    logits = torch.tensor([[0.0, 5.0, math.log(3.0)], [1.0, 2.0, 3.0]], requires_grad=True)
    weights = masked_softmax(logits, torch.tensor([[True, False, True], [False] * 3]), 1)
    assert_close(weights, torch.tensor([[0.25, 0.0, 0.75], [0.0, 0.0, 0.0]]))
    weights[:, 0].sum().backward()
    assert_close(logits.grad, torch.tensor([[0.1875, 0.0, -0.1875], [0.0, 0.0, 0.0]]))  # p (1 - p) = .25 * .75


def test_slots_and_scale_learn_and_frozen_slots_do_not():
    layer = layer_of()
    layer.freeze([0])
    x = torch.randn(2, 4, 4)
    layer(x).square().sum().backward()
    ((rows, owners),) = layer.pool.growable("gate", "phi").live()
    assert [row.owner for row in owners] == [1, 2]
    assert rows.grad.abs().amax((1, 2)).min() > 0
    assert layer.router.scale.grad != 0
    assert not layer.routing.dispatch.requires_grad  # the graph is let go
    layer.freeze()
    assert not layer.router.scale.requires_grad


def test_sequences_do_not_meet():
    layer, x = layer_of().eval(), torch.randn(3, 4, 4)
    together = layer(x)
    for b in range(3):
        assert_close(layer(x[b]), together[b])  # (S, D) is one sequence
    later = x.clone()
    later[0, 3] += 1
    assert not torch.equal(layer(later)[0, 0], together[0, 0])
    assert not layer.router.causal
    assert F.mse_loss(layer(later)[1:], together[1:]) == 0


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (1,), (), (2, 1)])
def test_few_tokens(shape):
    layer = layer_of()
    y = layer(torch.randn(*shape, 4))
    assert y.shape == (*shape, 3)
    assert y.isfinite().all()


def test_bad_input():
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        SoftRouter(4, 0)
    with pytest.raises(ValueError, match="a soft router mixes all 3 experts"):
        layer_of().route(torch.zeros(2, 4), top_k=1)
    with pytest.raises(ValueError, match="every expert is masked for token 1 of 2"):
        layer_of().route(torch.zeros(2, 4), expert_mask=torch.tensor([[True] * 3, [False] * 3]))
