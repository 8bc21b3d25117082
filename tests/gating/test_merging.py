"""SmearRouter and LoryRouter: what a merge reads, by hand; causality; padding; equal sizes."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modmoe import ExpertPool, LoryRouter, MergedRouting, MLPExpert, MoELayer, SmearRouter

MERGING = {"smear": lambda: SmearRouter(4), "lory": lambda: LoryRouter(4, 3)}


def layer_of(router, num_experts: int = 3, seed: int = 0) -> MoELayer:
    torch.manual_seed(seed)
    layer = MoELayer(ExpertPool(MLPExpert(router.in_features, 5, 3), num_experts), router)
    with torch.no_grad():
        layer.pool.growable("gate", "weight").banks()[0][0].normal_()
    return layer


def merged_output(layer: MoELayer, weights: Tensor, x: Tensor) -> Tensor:
    """One token through sum_e weights_e theta_e, written out for the MLP."""
    rows = layer.pool.namespace("expert")
    theta = {name: sum(w * row for w, row in zip(weights, rows[name], strict=True)) for name in rows}
    return torch.nn.functional.gelu(x @ theta["w_in"] + theta["b_in"]) @ theta["w_out"] + theta["b_out"]


def by_loop(layer: MoELayer, x: Tensor, mask: Tensor) -> Tensor:
    """One sequence x (S, D), token after token."""
    gate = layer.pool.namespace(layer.namespace)
    real = [x[s] for s in range(len(x)) if mask[s]]
    y = torch.zeros(len(x), 3)
    place = iter(s for s in range(len(x)) if mask[s])
    for t, token in enumerate(real):
        source = sum(real) / len(real)
        if isinstance(layer.router, LoryRouter):
            size = layer.router.segment_length
            segment = t // size
            source = real[0] if segment == 0 else sum(real[(segment - 1) * size : segment * size]) / size
        weights = torch.stack([source @ w + b for w, b in zip(gate["weight"], gate["bias"], strict=True)]).softmax(0)
        y[next(place)] = merged_output(layer, weights, token)
    return y


def identity_gate(router) -> MoELayer:
    layer = layer_of(router, 2)
    with torch.no_grad():
        layer.pool.growable("gate", "weight").banks()[0][0].copy_(torch.eye(2))
    return layer


def test_smear_reads_the_mean_of_real_tokens_by_hand():
    layer = identity_gate(SmearRouter(2))
    x = torch.tensor([[[2 * math.log(3.0), 0.0], [0.0, 0.0], [9.0, 9.0]]])
    routing = layer.route(x, mask=torch.tensor([[True, True, False]]))
    assert isinstance(routing, MergedRouting)
    # the mean of the two real tokens is (log 3, 0): 3/4 and 1/4
    assert_close(routing.merge_weight, torch.tensor([[0.75, 0.25]]))
    assert routing.merge_index.tolist() == [0, 0, -1]
    assert_close(routing.matrix(), torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 0.0]]))


def test_lory_reads_the_segment_before_by_hand():
    layer = identity_gate(LoryRouter(2, 2))
    log3 = math.log(3.0)
    x = torch.tensor([[log3, 0.0], [-log3, 0.0], [8.0, 0.0], [0.0, 0.0], [0.0, 5.0]]).requires_grad_()
    routing = layer.route(x)
    # segment 0 reads token 0: 3/4; segment 1 the mean of tokens 0 and 1: 0, 1/2; segment 2 that of 2 and 3: 4
    best = torch.tensor([0.75, 0.5, torch.tensor(4.0).sigmoid()])
    assert_close(routing.merge_weight, torch.stack([best, 1 - best], 1))
    assert routing.merge_index.tolist() == [0, 0, 1, 1, 2]
    (gradient,) = torch.autograd.grad(routing.merge_weight[0, 0], x, retain_graph=True)
    assert (gradient == 0).all()  # the first segment stands behind a stop-gradient
    (gradient,) = torch.autograd.grad(routing.merge_weight[1, 0], x)
    # d sigmoid = 1/4, half of it for each of the two tokens
    assert_close(gradient[:, 0], torch.tensor([0.125, 0.125, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("make", MERGING.values(), ids=MERGING)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_a_loop(make, masked):
    layer = layer_of(make())
    layer.add_experts(1)
    layer.freeze([1])
    x = torch.randn(2, 8, 4)
    mask = torch.ones(2, 8, dtype=torch.bool)
    if masked:
        mask[0, [0, 3]] = mask[1, [1, 2, 3, 6]] = False
    y = layer(x, mask=mask if masked else None)
    for b in range(2):
        assert_close(y[b], by_loop(layer, x[b], mask[b]), atol=1e-6, rtol=1e-5)


def test_lory_never_looks_ahead():
    layer = layer_of(LoryRouter(4, 3)).eval()
    x = torch.randn(2, 8, 4)
    y = layer(x)
    for s in range(1, 8):
        later = x.clone()
        later[:, s:] = 10 * torch.randn(2, 8 - s, 4)
        assert_close(layer(later)[:, :s], y[:, :s], atol=1e-6, rtol=0)
        assert_close(layer(x[:, :s]), y[:, :s], atol=1e-6, rtol=0)  # a prefix alone
    earlier = x.clone()
    earlier[:, 2] += 1
    assert not torch.equal(layer(earlier)[:, 3], y[:, 3])  # and it does look back
    assert layer.router.causal


def test_smear_looks_at_all_of_its_own_sequence():
    layer = layer_of(SmearRouter(4)).eval()
    x = torch.randn(2, 5, 4)
    later = x.clone()
    later[0, 4] += 1
    assert not torch.equal(layer(later)[0, 0], layer(x)[0, 0])
    assert_close(layer(later)[1], layer(x)[1])
    assert not layer.router.causal


@pytest.mark.parametrize("make", MERGING.values(), ids=MERGING)
def test_padding_anywhere_changes_nothing(make):
    layer = layer_of(make())
    x = torch.randn(1, 7, 4)
    padded = torch.full((2, 12, 4), torch.nan)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, [1, 2, 5, 6, 7, 9, 11]] = True
    padded[0, mask[0]] = x[0]
    y = layer(padded.requires_grad_(), mask=mask)
    assert_close(y[0, mask[0]], layer(x)[0])
    assert (y[~mask] == 0).all()
    y.sum().backward()
    assert (padded.grad[~mask] == 0).all()
    assert padded.grad[mask].isfinite().all()


@pytest.mark.parametrize("make", MERGING.values(), ids=MERGING)
def test_a_copied_expert_changes_nothing(make):
    layer, x = layer_of(make()), torch.randn(2, 7, 4)
    before = layer(x)
    layer.add_experts(2, init="copy", source=1)
    assert_close(layer(x), before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", MERGING.values(), ids=MERGING)
def test_the_gate_learns_and_the_graph_is_let_go(make):
    layer = layer_of(make())
    layer.freeze([0])
    layer(torch.randn(2, 7, 4)).square().sum().backward()
    ((rows, _),) = layer.pool.growable("gate", "weight").live()
    assert rows.grad.abs().amax(1).min() > 0
    assert not layer.routing.merge_weight.requires_grad


def test_an_expert_is_open_to_a_merge_if_it_is_to_all_its_tokens():
    layer = layer_of(LoryRouter(4, 2))
    open_experts = torch.tensor([[True, True, False], [True, False, True], [False, True, True], [True, True, True]])
    routing = layer.route(torch.randn(4, 4), expert_mask=open_experts)
    assert (routing.merge_weight > 0).tolist() == [[True, False, False], [False, True, True]]
    open_experts[0] = torch.tensor([False, True, False])
    with pytest.raises(ValueError, match="no expert is open to all tokens that are merged together: token 0 of 4"):
        layer.route(torch.randn(4, 4), expert_mask=open_experts)
    mask = torch.tensor([False, True, True, True])  # the first is padding: segments are 1, 2 and 3
    open_experts[1] = torch.tensor([True, True, True])
    routing = layer.route(torch.randn(4, 4), mask=mask, expert_mask=open_experts)
    assert (routing.merge_weight > 0).tolist() == [[False, True, True], [True, True, True]]


@pytest.mark.parametrize("make", MERGING.values(), ids=MERGING)
def test_experts_need_equal_sizes(make):
    layer = layer_of(make())
    layer.add_experts(1, hidden_features=6)
    with pytest.raises(ValueError, match=r"only experts of equal sizes can be merged: 'w_in' is \(4, 5\) in experts"):
        layer(torch.randn(3, 4))


@pytest.mark.parametrize("make", MERGING.values(), ids=MERGING)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (1,), (), (2, 1)])
def test_few_tokens(make, shape):
    y = layer_of(make())(torch.randn(*shape, 4))
    assert y.shape == (*shape, 3)
    assert y.isfinite().all()


def test_bad_input():
    with pytest.raises(ValueError, match="segment_length must be at least 1, got 0"):
        LoryRouter(4, 0)
    with pytest.raises(ValueError, match="takes no top_k"):
        layer_of(SmearRouter(4)).route(torch.zeros(2, 4), top_k=1)
