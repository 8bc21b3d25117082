"""ReLURouter: the published number, tokens without an expert, the coefficient and what it leads to."""

import pytest
import torch
from torch.testing import assert_close

from modmoe import ExpertPool, MLPExpert, MoELayer, ReLURouter
from modmoe.losses import relu_l1_loss

L = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, -1.0], [0.0, 2.0, 0.0], [1.0, 1.5, 1.0]])


def router_of(layer: MoELayer) -> ReLURouter:
    assert isinstance(layer.router, ReLURouter)
    return layer.router


def test_published_number(identity_layer):
    layer = identity_layer(ReLURouter(3, 1))
    routing = layer.route(L - 1)
    assert_close(routing.matrix(), torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0.5, 0]]))
    assert routing.choices.tolist() == [[0, -1, -1], [-1, -1, -1], [1, -1, -1], [1, -1, -1]]
    # f = 3/4 (1, 2, 0), Rbar = (1, 1.5, 0)/4: .75 * .25 + 1.5 * .375 = .75
    assert relu_l1_loss(routing.matrix(), 1).item() == pytest.approx(0.75, abs=1e-5)
    assert (routing.matrix() == 0).float().mean() == 0.75  # sparsity
    # where nothing is active, an even distribution
    assert_close(routing.probs, torch.tensor([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1, 0], [0, 1, 0]]))


def test_a_token_that_nobody_wants_gets_zero(identity_layer):
    layer = identity_layer(ReLURouter(3))
    y = layer(torch.tensor([[-1.0, -2.0, -0.5], [1.0, 2.0, -1.0]]))
    assert (y[0] == 0).all()
    assert y[1].abs().max() > 0


def test_output_against_the_formula(identity_layer):
    layer, x = identity_layer(ReLURouter(3)), torch.randn(7, 3)
    expected = sum(x[:, [e]].relu() * layer.expert_output(e, x) for e in range(3))
    assert_close(layer(x), expected)


def test_closed_experts_and_padding(identity_layer):
    layer = identity_layer(ReLURouter(3))
    mask = torch.tensor([True, False])
    routing = layer.route(torch.ones(2, 3), mask=mask, expert_mask=torch.tensor([True, False, True]))
    assert_close(routing.matrix(), torch.tensor([[1.0, 0, 1], [0, 0, 0]]))
    assert_close(routing.probs[0], torch.tensor([0.5, 0, 0.5]))


def test_every_row_learns(identity_layer, row_gradient):
    layer = identity_layer(ReLURouter(3, 1))
    layer(torch.randn(40, 3)).square().sum().backward()
    assert (row_gradient(layer).abs().sum(1) > 0).all()


def test_the_coefficient_by_hand(identity_layer):
    layer = identity_layer(ReLURouter(3, 1))
    router = router_of(layer)
    assert router.l1_coefficient.item() == pytest.approx(1e-8)
    layer.route(L - 1)  # sparsity .75, not below 1 - 1/3
    layer.update_router()
    assert router.l1_coefficient.item() == pytest.approx(1e-8 / 1.2)
    for _ in range(3):
        layer.route(L + 2)  # all active: sparsity 0
        layer.update_router()
    assert router.l1_coefficient.item() == pytest.approx(1e-8 * 1.2**2)
    layer.eval()
    layer.update_router()
    assert router.l1_coefficient.item() == pytest.approx(1e-8 * 1.2**2)


def test_the_coefficient_looks_at_live_open_experts_and_real_tokens(identity_layer):
    layer = identity_layer(ReLURouter(4, 1), 4)
    layer.freeze([0])
    x = torch.tensor([[1.0, 1, -1, -1], [1.0, -1, 1, 1], [1.0, 1, 1, 1]])
    layer.route(x, mask=torch.tensor([True, True, False]), expert_mask=torch.tensor([True, True, True, False]))
    layer.update_router()
    # experts 1 and 2, tokens 0 and 1: 2 active for 2 tokens is k = 1. Expert 0, 3 or token 2 would make it more
    assert router_of(layer).l1_steps == -1
    layer.freeze([1, 2, 3])
    layer.route(x)
    layer.update_router()
    assert router_of(layer).l1_steps == -1  # nobody is left to be made sparse


def test_the_coefficient_is_saved_frozen_and_kept_in_half_precision(identity_layer):
    layer = identity_layer(ReLURouter(3, 1))
    layer.route(L + 2)
    layer.update_router()
    loaded = MoELayer(ExpertPool(MLPExpert(3, 4), 3), ReLURouter(3, 1))
    loaded.load_state_dict(layer.state_dict())
    assert router_of(loaded).l1_coefficient.item() == pytest.approx(1.2e-8)
    assert router_of(loaded.half()).l1_coefficient.item() == pytest.approx(1.2e-8)  # 1e-8 is 0 in half precision
    layer.freeze()
    layer.add_experts(1)
    layer.route(L + 2)
    layer.update_router()
    assert router_of(layer).l1_steps == 1
    layer.router.freeze_shared(False)
    layer.route(L, expert_mask=torch.tensor([True, True, True, False]))
    layer.update_router()
    assert router_of(layer).l1_steps == 1  # the experts that are left open are frozen


def test_training_comes_close_to_k():
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(8, 4), 4), ReLURouter(8, 1))
    router = router_of(layer)
    x = torch.randn(128, 8)
    router.l1_steps = torch.tensor(70)  # 1e-8 * 1.2^70 = .0035: not to wait for it
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    active = []
    for _ in range(250):
        optimizer.zero_grad()
        y = layer(x)
        routing = layer.routing
        assert routing is not None
        active.append((routing.weight > 0).sum().item() / len(x))
        loss = (y - x).square().mean() + router.l1_coefficient * relu_l1_loss(routing.matrix(), 1)
        loss.backward()
        optimizer.step()
        layer.update_router()
    assert active[0] > 1.7  # half of 4
    assert sum(active[-50:]) / 50 == pytest.approx(1, abs=0.3)


def test_errors(identity_layer):
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        ReLURouter(3, 0)
    layer = identity_layer(ReLURouter(3))
    with pytest.raises(ValueError, match="learns how many experts it opens: it takes no top_k"):
        layer.route(L, top_k=1)
    layer.route(L)
    layer.add_experts(1)
    with pytest.raises(ValueError, match="the routing is of 3 experts, the pool has 4"):
        layer.update_router()


def test_the_coefficient_stays_finite_where_the_goal_is_out_of_reach(identity_layer):
    layer = identity_layer(ReLURouter(3, 1))
    router = router_of(layer)
    for x, steps in ((L + 2, 200), (L - 9, -200)):
        router.l1_steps = torch.tensor(199 * steps // 200)
        for _ in range(3):
            layer.route(x)
            layer.update_router()
        assert router.l1_steps == steps
    assert router.l1_coefficient > 0


def test_the_bias_closes_an_expert(identity_layer, write_rows, row_gradient):
    layer = identity_layer(ReLURouter(3))
    write_rows(layer, "bias", torch.tensor([0.5, -1.0, -9.0]))
    routing = layer.route(torch.tensor([[1.0, 2.0, 3.0]]))
    assert_close(routing.matrix(), torch.tensor([[1.5, 1.0, 0.0]]))
    routing.weight.sum().backward()
    assert row_gradient(layer, "bias").tolist() == [1.0, 1.0, 0.0]
