"""DenseRouter and TopKRouter: the weights by hand, selection, masks, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from modmoe import DenseRouter, ExpertPool, MLPExpert, MoELayer, NonFiniteError, Router, Routing, TopKRouter
from modmoe.losses import load_balancing_loss

# The logits of the published fixtures; ties go to the lowest index.
L = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, -1.0], [0.0, 2.0, 0.0], [1.0, 1.5, 1.0]])


def layer_of(router: Router, num_experts: int = 3) -> MoELayer:
    """A layer whose logits are its input: the gate's weight is the identity."""
    layer = MoELayer(ExpertPool(MLPExpert(num_experts, 4), num_experts), router)
    with torch.no_grad():
        layer.pool.growable("gate", "weight").banks()[0][0].copy_(torch.eye(num_experts))
    return layer


def gate_gradient(layer: MoELayer) -> Tensor:
    gradient = layer.pool.growable("gate", "weight").banks()[0][0].grad
    assert gradient is not None
    return gradient


# -- dense -------------------------------------------------------------------------------------------------------------


def test_dense_softmax_by_hand():
    layer = layer_of(DenseRouter(2), 2)
    routing = layer.route(torch.tensor([[math.log(3.0), 0.0]]))
    # e^(log 3) = 3 and e^0 = 1: 3/4 and 1/4
    assert_close(routing.matrix(), torch.tensor([[0.75, 0.25]]))
    assert routing.choices.tolist() == [[0, 1]]
    assert routing.top_k == 2


def test_dense_importance_of_the_published_fixture():
    # CV^2 (population variance) of the column sums of the gates: 0.167951
    importance = layer_of(DenseRouter(3)).route(L).matrix().sum(0)
    assert (importance.var(correction=0) / importance.mean() ** 2).item() == pytest.approx(0.167951, abs=1e-5)


def test_dense_bias_by_hand():
    layer = layer_of(DenseRouter(2), 2)
    with torch.no_grad():
        layer.pool.growable("gate", "bias").banks()[0][0].copy_(torch.tensor([math.log(4.0), 0.0]))
    # 3 * 4 = 12 against 1
    assert_close(layer.route(torch.tensor([[math.log(3.0), 0.0]])).matrix(), torch.tensor([[12 / 13, 1 / 13]]))


def test_dense_leaves_closed_experts_out():
    layer = layer_of(DenseRouter(3))
    routing = layer.route(torch.tensor([[math.log(3.0), 9.0, 0.0]]), expert_mask=torch.tensor([True, False, True]))
    assert_close(routing.matrix(), torch.tensor([[0.75, 0.0, 0.25]]))
    assert routing.choices.tolist() == [[0, -1, 2]]
    assert_close(routing.probs, routing.matrix())


def test_dense_takes_no_k():
    with pytest.raises(ValueError, match="a dense router uses all 3 experts: it takes no top_k"):
        layer_of(DenseRouter(3)).route(L, top_k=2)


# -- top-k weights -----------------------------------------------------------------------------------------------------


def test_mixtral_order_by_hand():
    # Row 0: logits 2 and 1 -> e/(e+1) = .731059 and .268941. Row 2 (tie of 0 and 2 at 0): 2 and 0 -> .880797, .119203
    # (e^2/(e^2+1)). Row 3: 1.5 and 1 -> .622459, .377541 (e^.5/(e^.5+1)).
    routing = layer_of(TopKRouter(3, 2)).route(L)
    assert routing.choices[:, 0].tolist() == [0, 0, 1, 1]
    weight = routing.weight.view(4, 2)
    expected = torch.tensor([[0.731059, 0.268941], [0.731059, 0.268941], [0.880797, 0.119203], [0.622459, 0.377541]])
    assert_close(weight, expected, atol=1e-6, rtol=0)
    assert_close(routing.probs, L.softmax(1))  # over all experts


def test_probabilities_before_selection_by_hand():
    # softmax(2, 1, 0) = e^2, e, 1 over 7.389056 + 2.718282 + 1 = 11.107338: .665241, .244728, .090031
    layer = layer_of(TopKRouter(3, 2, order="softmax_topk", renormalize=False))
    routing = layer.route(L[:1])
    assert_close(routing.weight, torch.tensor([0.665241, 0.244728]), atol=1e-6, rtol=0)
    assert routing.choices.tolist() == [[0, 1]]
    assert layer.router.weight_sum == "<= 1"


def test_renormalised_probabilities_equal_the_mixtral_order():
    first = layer_of(TopKRouter(3, 2)).route(L)
    second = layer_of(TopKRouter(3, 2, order="softmax_topk")).route(L)
    assert_close(first.weight, second.weight)
    assert torch.equal(first.expert_index, second.expert_index)


def test_top_2_losses_of_the_published_fixture():
    # Ties to the lowest index (the fixture's rows have ties at 0 and at 1, moved apart by an amount below 1e-6).
    logits = L - torch.tensor([0.0, 0.0, 1e-7])
    routing = layer_of(TopKRouter(3, 2)).route(logits)
    importance = routing.matrix().sum(0)
    assert (importance.var(correction=0) / importance.mean() ** 2).item() == pytest.approx(0.500635, abs=1e-5)
    # Mixtral's loss is 2.579522; ours divides f by T K: half of it
    loss = load_balancing_loss(routing.probs, routing.choices)
    assert loss.item() == pytest.approx(2.579522 / 2, abs=1e-5)


@pytest.mark.parametrize("order", ["topk_softmax", "softmax_topk"])
def test_top_1_takes_the_probability_before_selection(order):
    layer = layer_of(TopKRouter(3, 1, order=order))
    routing = layer.route(L[:1])
    assert_close(routing.weight, torch.tensor([0.665241]), atol=1e-6, rtol=0)
    routing.weight.sum().backward()
    # dp_0/dh = p_0 (1 - p_0, -p_1, -p_2) = .665241 * (.334759, -.244728, -.090031); times x = (2, 1, 0)
    by_logit = torch.tensor([0.222696, -0.162803, -0.059893])
    assert_close(gate_gradient(layer), torch.outer(by_logit, L[0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", ["topk_softmax", "softmax_topk"])
def test_renormalised_top_1_is_one_with_the_gradient_of_log_p(order):
    layer = layer_of(TopKRouter(3, 1, order=order, renormalize=True))
    routing = layer.route(L)
    assert (routing.weight == 1).all()
    routing.weight.sum().backward()
    got = gate_gradient(layer)
    weight = torch.eye(3).requires_grad_()
    log_p = (L @ weight.T).log_softmax(1)
    log_p.amax(1).sum().backward()
    assert_close(got, weight.grad)
    # by hand for the first token: (1 - p_0, -p_1, -p_2) = (.334759, -.244728, -.090031)
    layer.zero_grad()
    layer.route(L[:1]).weight.sum().backward()
    by_logit = torch.tensor([0.334759, -0.244728, -0.090031])
    assert_close(gate_gradient(layer), torch.outer(by_logit, L[0]), atol=1e-6, rtol=0)
    assert layer.router.weight_sum == "1"


def test_k_of_one_call():
    layer = layer_of(TopKRouter(3, 2))
    with torch.no_grad():
        assert layer.route(L, top_k=1).choices.tolist() == [[0], [0], [1], [1]]
        assert_close(layer.route(L[:1], top_k=1).weight, torch.tensor([0.665241]), atol=1e-6, rtol=0)
        assert_close(layer.route(L, top_k=3).matrix(), L.softmax(1))
        assert layer.route(L).top_k == 2
    assert layer.router.top_k == 2
    assert layer(L, top_k=3).shape == (4, 3)


def test_the_gate_learns_through_the_weights():
    torch.manual_seed(0)
    for router in (DenseRouter(3), TopKRouter(3, 1), TopKRouter(3, 2), TopKRouter(3, 1, renormalize=True)):
        layer = layer_of(router)
        layer(torch.randn(8, 3)).square().sum().backward()
        assert gate_gradient(layer).abs().max() > 0


# -- closed experts and padding ----------------------------------------------------------------------------------------

KINDS = {
    "dense": lambda: DenseRouter(5),
    "topk_softmax": lambda: TopKRouter(5, 3),
    "softmax_topk": lambda: TopKRouter(5, 3, order="softmax_topk"),
    "not_renormalised": lambda: TopKRouter(5, 3, order="softmax_topk", renormalize=False),
    "top_1": lambda: TopKRouter(5, 1),
    "straight_through": lambda: TopKRouter(5, 1, renormalize=True),
}


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 10_000), num_tokens=st.integers(0, 6))
def test_every_routing_is_sound(kind, seed, num_tokens):
    generator = torch.Generator().manual_seed(seed)
    layer = layer_of(KINDS[kind](), 5)
    x = 3 * torch.randn(num_tokens, 5, generator=generator)
    is_open = torch.rand(num_tokens, 5, generator=generator) < 0.4
    mask = torch.rand(num_tokens, generator=generator) < 0.7
    is_open[torch.arange(num_tokens), torch.randint(5, (num_tokens,), generator=generator)] = True
    is_open[~mask] = False  # nothing has to be open to padding
    routing = layer.route(x, mask=mask, expert_mask=is_open)

    choices, weight = routing.choices, routing.weight.view_as(routing.choices)
    k = choices.shape[1]
    assert (weight[choices < 0] == 0).all()
    assert ((choices >= 0).sum(1) == is_open.sum(1).clamp(max=k)).all()
    matrix = routing.matrix()
    assert (matrix[~is_open] == 0).all()
    assert torch.isfinite(routing.probs).all()
    assert_close(routing.probs[mask].sum(1), torch.ones(int(mask.sum())))
    assert (routing.probs[mask][~is_open[mask]] == 0).all()
    total = matrix[mask].sum(1)
    if layer.router.weight_sum == "1":  # also where fewer than k experts are open
        assert_close(total, torch.ones_like(total))
    else:
        assert (total <= 1 + 1e-6).all()
        assert (total > 0).all()
    for row, chosen in enumerate(choices.tolist()):  # no expert twice, the best open ones first
        kept = [expert for expert in chosen if expert >= 0]
        best = torch.where(is_open[row], x[row], -torch.inf).topk(len(kept)).indices.tolist()
        assert sorted(kept) == sorted(best)
        assert kept == best or kind == "dense"


@pytest.mark.parametrize("order", ["topk_softmax", "softmax_topk"])
def test_fewer_open_experts_than_k(order):
    layer = layer_of(TopKRouter(3, 2, order=order))
    routing = layer.route(L[:1], expert_mask=torch.tensor([False, True, False]))
    assert routing.choices[0, 0] == 1
    assert routing.choices.tolist() == [[1, -1]]
    assert routing.weight.tolist() == [1.0, 0.0]
    routing.weight.sum().backward()
    assert torch.isfinite(gate_gradient(layer)).all()


def test_a_closed_expert_gets_no_gradient():
    layer = layer_of(TopKRouter(3, 2))
    x = torch.randn(6, 3)
    layer(x, expert_mask=torch.tensor([True, False, True])).square().sum().backward()
    gradient = gate_gradient(layer)
    assert (gradient[1] == 0).all()
    assert gradient[0].abs().max() > 0


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_experts_raw_score_is_its_own(kind):
    torch.manual_seed(0)
    layer = layer_of(KINDS[kind](), 5)
    x = torch.randn(9, 5)
    with torch.no_grad():
        before = layer.route(x).logits
        layer.freeze([0, 1, 2, 3, 4])
        layer.add_experts(3)
        after = layer.route(x).logits
    assert after.shape == (9, 8)
    assert_close(after[:, :5], before, atol=1e-6, rtol=0)  # the product may add up in another order


# -- precision ---------------------------------------------------------------------------------------------------------


def test_scores_are_float32_in_a_bfloat16_model():
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(64, 8), 4), TopKRouter(64, 2)).to(torch.bfloat16)
    x = torch.randn(32, 64).bfloat16()
    routing = layer.route(x)
    assert {routing.logits.dtype, routing.probs.dtype, routing.weight.dtype} == {torch.float32}
    weight = layer.pool.growable("gate", "weight").banks()[0][0]
    # a bfloat16 product would be off by 2^-9 of the logit
    assert_close(routing.logits, (x.double() @ weight.double().T).float(), atol=1e-6, rtol=1e-5)
    assert layer(x).dtype == torch.bfloat16


def test_scores_are_float32_under_autocast():
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(64, 8), 4), TopKRouter(64, 2))
    x = torch.randn(32, 64)
    expected = layer.route(x)
    with torch.autocast("cpu", torch.bfloat16):
        routing = layer.route(x)
    assert torch.equal(routing.logits, expected.logits)
    assert torch.equal(routing.expert_index, expected.expert_index)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one(k):
    with pytest.raises(ValueError, match=f"top_k must be at least 1, got {k}"):
        TopKRouter(3, k)
    with pytest.raises(ValueError, match=f"top_k must be at least 1, got {k}"):
        layer_of(TopKRouter(3, 1)).route(L, top_k=k)


def test_k_above_the_pool():
    with pytest.raises(ValueError, match="top_k=4 experts cannot be chosen out of 3"):
        layer_of(TopKRouter(3, 4))
    with pytest.raises(ValueError, match="top_k=4 experts cannot be chosen out of 3"):
        layer_of(TopKRouter(3, 2)).route(L, top_k=4)


def test_unknown_order_and_a_contradiction():
    with pytest.raises(ValueError, match="order is 'topk_softmax' or 'softmax_topk', got 'mixtral'"):
        TopKRouter(3, 2, order="mixtral")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use order='softmax_topk' for less"):
        TopKRouter(3, 2, renormalize=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_input_is_named(value):
    layer = layer_of(TopKRouter(3, 2))
    x = torch.zeros(5, 3)
    x[3, 1] = value
    with pytest.raises(NonFiniteError, match="non-finite input at token 3 of 5"):
        layer.route(x)
    with pytest.raises(NonFiniteError, match="non-finite input at token 3 of 5"):
        layer.route(x, mask=torch.tensor([False, True, True, True, True]))


def test_non_finite_logits_are_named():
    layer = layer_of(TopKRouter(3, 2))
    with torch.no_grad():
        layer.pool.growable("gate", "weight").banks()[0][0][2] = torch.nan
    with pytest.raises(NonFiniteError, match="non-finite logits at token 0 of 4"):
        layer.route(L)
    big = layer_of(DenseRouter(3))
    with torch.no_grad():
        big.pool.growable("gate", "weight").banks()[0][0].fill_(3e38)
    with pytest.raises(NonFiniteError, match="non-finite logits at token 1 of 2"):
        big.route(torch.tensor([[0.0, 0.0, 0.0], [5.0, 0.0, 0.0]]))


def test_every_expert_masked():
    layer = layer_of(TopKRouter(3, 2))
    is_open = torch.ones(4, 3, dtype=torch.bool)
    is_open[2] = False
    with pytest.raises(ValueError, match="every expert is masked for token 2 of 4"):
        layer.route(L, expert_mask=is_open)
    with pytest.raises(ValueError, match="every expert is masked for token 0 of 4"):
        layer.route(L, expert_mask=torch.zeros(3, dtype=torch.bool))
    assert isinstance(layer.route(L, mask=torch.tensor([True, True, False, True]), expert_mask=is_open), Routing)


def test_the_checks_of_compiled_graphs(monkeypatch):
    layer = layer_of(TopKRouter(3, 2))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="non-finite input or router logits"):
        layer.route(torch.full((2, 3), torch.nan))
    with pytest.raises(RuntimeError, match="every expert is masked for some token"):
        layer.route(L, expert_mask=torch.zeros(3, dtype=torch.bool))


def test_declared_properties():
    assert TopKRouter(3, 1, renormalize=True).preserving_growth == "tie"
    assert TopKRouter(3, 1).preserving_growth is None
    assert TopKRouter(3, 2).preserving_growth is None
    assert DenseRouter(3).preserving_growth == "split"
    assert (TopKRouter(3, 2).num_active(8), TopKRouter(3, 2).num_active(1), DenseRouter(3).num_active(8)) == (2, 1, 8)
    assert (TopKRouter(3, 2).scope, TopKRouter(3, 2).causal) == ("token", True)
