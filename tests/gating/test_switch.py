"""SwitchRouter and GShardRouter: weights, jitter, capacity and the second expert by hand, gradients, errors."""

import pytest
import torch
from torch.testing import assert_close

from modmoe import GShardRouter, SwitchRouter
from modmoe.gating.capacity import Capacity
from modmoe.losses import load_balancing_loss

L = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, -1.0], [0.0, 2.0, 0.0], [1.0, 1.5, 1.0]])


# -- Switch ------------------------------------------------------------------------------------------------------------


def test_switch_by_hand(identity_layer):
    layer = identity_layer(SwitchRouter(3, jitter_eps=0.0))
    routing = layer.route(L)
    # the softmax's maxima: e^2/(e^2+e+1) = .665241 twice, e^2/(e^2+2) = .786986, e^.5/(e^.5+2) = .451862
    assert routing.choices.squeeze(1).tolist() == [0, 0, 1, 1]
    assert_close(routing.weight, torch.tensor([0.665241, 0.665241, 0.786986, 0.451862]), atol=1e-6, rtol=0)
    loss = load_balancing_loss(routing.probs, routing.requested_choices)
    assert loss.item() == pytest.approx(1.289761, abs=1e-5)


def test_switch_drops_beyond_its_capacity(identity_layer):
    layer = identity_layer(SwitchRouter(4, capacity=Capacity(1.25)), 4).eval()
    x = torch.eye(4)[[0, 0, 0, 1, 0, 1, 2, 0]]
    routing = layer.route(x)
    # C = ceil(8 * 1.25 / 4) = 3; floor would give 2 and drop .375
    assert (routing.expert_index < 0).float().mean() == 0.25
    assert routing.requested_choices.squeeze(1).tolist() == [0, 0, 0, 1, 0, 1, 2, 0]
    y = layer(x)
    assert (y[[4, 7]] == 0).all()
    assert SwitchRouter(4).capacity == Capacity(1.25)


def test_jitter_reaches_the_router_only(identity_layer):
    layer = identity_layer(SwitchRouter(3, jitter_eps=0.1, capacity=None))
    x = torch.tensor([[4.0, 1.0, -2.0]]).repeat(200, 1)
    before = x.clone()
    torch.manual_seed(0)
    y = layer(x)
    assert torch.equal(x, before)  # not in place
    routing = layer.routing
    assert routing is not None
    ratio = routing.logits.detach() / before  # the gate is the identity: each element's own factor
    assert ratio.min() >= 0.9 - 1e-6
    assert ratio.max() <= 1.1 + 1e-6
    assert ratio[:, 0].std() == pytest.approx(0.2 / 12**0.5, rel=0.15)  # uniform over a width of .2
    assert ratio.std(1).min() > 0
    assert_close(y, routing.weight.unsqueeze(1) * layer.expert_output(0, before))


def test_no_jitter_in_evaluation(identity_layer):
    layer = identity_layer(SwitchRouter(3, jitter_eps=0.5)).eval()
    assert torch.equal(layer.route(L).logits, L)


def test_switch_learns_every_row(identity_layer, row_gradient):
    layer = identity_layer(SwitchRouter(3))
    layer(torch.randn(30, 3)).square().sum().backward()
    assert (row_gradient(layer).abs().sum(1) > 0).all()


@pytest.mark.parametrize("jitter", [-0.1, 1.0])
def test_bad_jitter(jitter):
    with pytest.raises(ValueError, match=rf"jitter_eps must be in \[0, 1\), got {jitter}"):
        SwitchRouter(3, jitter_eps=jitter)


# -- GShard ------------------------------------------------------------------------------------------------------------


def test_gshard_by_hand(identity_layer):
    layer = identity_layer(GShardRouter(3, capacity=None)).eval()
    routing = layer.route(L[:1])
    # .665241 and .244728 of the softmax, over their sum .909969: .731059 and .268941
    assert routing.choices.tolist() == [[0, 1]]
    assert_close(routing.weight, torch.tensor([0.731059, 0.268941]), atol=1e-6, rtol=0)
    routing = layer.route(L)
    loss = load_balancing_loss(routing.probs, routing.requested_choices[:, 0], convention="gshard")
    assert loss.item() == pytest.approx(0.143307, abs=1e-5)


def test_the_second_expert_is_kept_with_twice_its_weight(identity_layer):
    layer = identity_layer(GShardRouter(3, capacity=None))
    x = L[:1].repeat(4000, 1)
    routing = layer.route(x)
    kept = routing.choices[:, 1] >= 0
    # 2 * .268941 = .537882, with a standard error of sqrt(.25/4000) = .008
    assert kept.float().mean().item() == pytest.approx(0.537882, abs=0.03)
    weight = routing.weight.view(-1, 2)
    assert_close(weight[:, 0], torch.full((4000,), 0.731059), atol=1e-6, rtol=0)  # as it was
    assert (weight[~kept, 1] == 0).all()
    assert (routing.choices[:, 0] == 0).all()


def test_a_second_expert_as_good_as_the_first_is_always_kept(identity_layer):
    routing = identity_layer(GShardRouter(3, capacity=None)).route(torch.tensor([[1.0, 1.0, 0.0]]).repeat(500, 1))
    assert (routing.expert_index >= 0).all()  # 2 g_2 = 1


def test_both_experts_stay_in_evaluation(identity_layer):
    layer = identity_layer(GShardRouter(3, capacity=None)).eval()
    routing = layer.route(L.repeat(100, 1))
    assert (routing.expert_index >= 0).all()
    assert not routing.has_drops


def test_what_is_sampled_away_takes_no_room(identity_layer):
    # both experts of 40 equal tokens; C = ceil(80 * .25 / 2) = 10 places for the second
    layer = identity_layer(GShardRouter(2, capacity=Capacity(0.25)), 2)
    routing = layer.route(torch.tensor([[1.0, 0.0]]).repeat(40, 1))
    wanted = routing.requested_choices[:, 1] == 1
    assert 10 < wanted.sum() < 40  # some were sampled away before, more than fit are left
    assert routing.load.tolist() == [10, 10]
    kept = routing.choices[:, 1] == 1
    assert torch.equal(kept.nonzero().squeeze(1), wanted.nonzero().squeeze(1)[:10])


def test_gshard_capacity_is_two_shares(identity_layer):
    capacity = GShardRouter(3).capacity
    assert capacity is not None
    assert capacity.limit(12, 2, 4, training=True) == 6  # 2 T / E


def test_gshard_learns_every_row(identity_layer, row_gradient):
    layer = identity_layer(GShardRouter(3))
    layer(torch.randn(30, 3)).square().sum().backward()
    assert (row_gradient(layer).abs().sum(1) > 0).all()
