"""The balancing losses that models carry."""

import copy

import pytest
import torch

import modmoe
from modmoe import VMoERouter
from modmoe.losses import load_balancing_loss
from modmoe.vision import balancing_loss, carry_balancing_losses, moe_layers


def gate_gradient(model, images, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    model(images).sum().mul(0.0).backward()  # of the host's loss nothing is left
    return [layer.pool.growable("gate", "weight").banks()[0][0].grad for layer in moe_layers(model).values()]


def test_importance_and_load_by_hand():
    router = VMoERouter(1, top_k=1, capacity_factor=2.0)
    layer = modmoe.MoELayer(modmoe.ExpertPool(modmoe.MLPExpert(1, 2), 2), router)
    ((gate, _, _),) = layer.pool.growable("gate", "weight").banks()
    with torch.no_grad():
        gate.copy_(torch.tensor([[0.0], [100.0]]))
    layer(torch.ones(4, 1))
    # all four tokens are expert 1's for certain: importance and load are (0, 4), mean 2, variance 4: 4 / 2^2 = 1 each
    assert balancing_loss(layer).item() == pytest.approx(2.0, abs=1e-5)


def test_the_loss_of_a_router_without_noise_is_the_load_balancing_loss(layer_of):
    layer = layer_of()
    layer(torch.randn(6, 4))
    expected = load_balancing_loss(layer.routing.probs, layer.routing.choices)
    assert torch.equal(balancing_loss(layer), expected)


def test_the_gradient_comes_with_the_host_s_backward_pass(build, images):
    model = build("vmoe", balance_weight=0.5)
    found = gate_gradient(model, images)
    plain = build("vmoe", balance_weight=0.0)
    assert all(grad.abs().max() == 0 for grad in gate_gradient(plain, images))
    torch.manual_seed(0)
    plain(images)
    loss = sum(balancing_loss(layer) for layer in moe_layers(plain).values())
    gates = [layer.pool.growable("gate", "weight").banks()[0][0] for layer in moe_layers(plain).values()]
    for grad, expected in zip(found, torch.autograd.grad(0.5 * loss, gates), strict=True):
        torch.testing.assert_close(grad, expected)
    assert found[0].abs().max() > 0


def test_outputs_and_evaluation_are_untouched_and_copies_carry_on(build, images):
    model = build("vmoe", balance_weight=0.5)
    assert torch.equal(model.eval()(images), build("vmoe", balance_weight=0.0).eval()(images))
    assert all(grad.abs().max() == 0 for grad in gate_gradient(model, images))
    assert gate_gradient(copy.deepcopy(model).train(), images)[0].abs().max() > 0


def test_handles_end_it(build, images):
    model = build("vmoe", balance_weight=0.0)
    for handle in carry_balancing_losses(model, 0.5):
        handle.remove()
    assert all(grad.abs().max() == 0 for grad in gate_gradient(model, images))


def test_frozen_experts_are_left_out(layer_of):
    layer = layer_of(num_experts=4, top_k=2)
    layer.freeze([0, 1])
    x = torch.randn(8, 4)
    layer(x)
    live = torch.tensor([False, False, True, True])
    assert torch.equal(
        balancing_loss(layer), load_balancing_loss(layer.routing.probs, layer.routing.choices, open_experts=live)
    )
    layer.freeze([2])
    layer(x)
    assert balancing_loss(layer) is None  # one live expert


def test_nothing_to_balance(build, images, layer_of):
    assert balancing_loss(layer_of()) is None  # not called yet
    soft = build("soft")
    soft(images)
    assert all(balancing_loss(layer) is None for layer in moe_layers(soft).values())
    with pytest.raises(ValueError, match=r"weight must be positive, got 0\.0"):
        carry_balancing_losses(soft, 0.0)
