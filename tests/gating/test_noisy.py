"""NoisyTopKRouter: noise by hand, evaluation without, the load estimate against counts, gradients, growth."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from modmoe import ExpertPool, MLPExpert, MoELayer, NoisyTopKRouter
from modmoe.losses import expected_load, load_loss


def test_noise_by_hand(identity_layer, write_rows):
    layer = identity_layer(NoisyTopKRouter(3, 2))
    write_rows(layer, "noise", torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, -1.0, 0]]))
    x = torch.tensor([[2.0, 1.0, 0.0]])
    torch.manual_seed(3)
    routing = layer.route(x)
    torch.manual_seed(3)
    eps = torch.randn(1, 3)
    # x W_n^T = (2, 0, -1); softplus(a) = log(1 + e^a): 2.126928, .693147, .313262
    std = torch.tensor([[2.126928, 0.693147, 0.313262]])
    assert_close(routing.noise_std, std, atol=1e-6, rtol=0)
    assert_close(routing.noisy_logits, x + eps * std, atol=1e-5, rtol=0)
    assert_close(routing.logits, x)
    values, choices = (x + eps * std).topk(2)
    assert torch.equal(routing.choices, choices)
    assert_close(routing.weight.view(1, 2), values.softmax(1), atol=1e-5, rtol=0)


def test_rows_start_at_zero():
    layer = MoELayer(ExpertPool(MLPExpert(3, 4), 2), NoisyTopKRouter(3, 1))
    rows = layer.pool.namespace("gate")
    assert all((rows[name] == 0).all() for name in ("weight", "noise"))
    routing = layer.route(torch.randn(50, 3))
    assert_close(routing.noise_std, torch.full((50, 2), math.log(2)))  # softplus(0)
    assert 0 < routing.load[0] < 50  # noise alone spreads the tokens


def test_no_noise_in_evaluation(identity_layer):
    layer = identity_layer(NoisyTopKRouter(3, 1)).eval()
    x = torch.randn(100, 3)
    first, again = layer.route(x), layer.route(x)
    assert torch.equal(first.expert_index, again.expert_index)
    assert torch.equal(first.choices.squeeze(1), x.argmax(1))
    assert first.noisy_logits is None
    layer.train()
    assert not torch.equal(layer.route(x).choices, first.choices)


def test_the_load_estimate_agrees_with_counts(identity_layer):
    torch.manual_seed(0)
    T, E, k = 400, 6, 2
    layer = identity_layer(NoisyTopKRouter(E, k), E)
    x = torch.randn(T, E) + torch.tensor([0.5, 0.0, 0.0, 0.0, -0.2, 0.2])
    estimate, sums = torch.zeros(E), []
    with torch.no_grad():
        for _ in range(100):
            routing = layer.route(x)
            load = expected_load(routing.logits, routing.noisy_logits, routing.noise_std, k)
            estimate += load / 100
            sums.append(load.sum().item())
        noisy = x + torch.randn(1000, T, E) * math.log(2)  # the noise rows are 0
        counts = F.one_hot(noisy.topk(k, dim=2).indices, E).sum((0, 1, 2)) / 1000
    assert ((estimate - counts).abs() / counts).max() < 0.02
    assert sum(sums) / 100 == pytest.approx(k * T, rel=0.005)
    assert_close(counts.sum(), torch.tensor(800.0))


def test_the_load_is_not_that_of_probabilities_against_logits(identity_layer):
    # the published slip: thresholds from the softmax, compared with logits, give 11599 where k T = 8000
    torch.manual_seed(0)
    T, E, k = 4000, 6, 2
    layer = identity_layer(NoisyTopKRouter(E, k), E)
    routing = layer.route(torch.randn(T, E))
    assert routing.noisy_logits is not None
    assert routing.noise_std is not None
    right = expected_load(routing.logits, routing.noisy_logits, routing.noise_std, k).sum()
    wrong = expected_load(routing.logits, routing.noisy_logits.softmax(1), routing.noise_std, k).sum()
    assert right.item() == pytest.approx(8000, rel=0.02)
    assert abs(wrong.item() - 8000) > 1000


@pytest.mark.parametrize("k", [1, 2])
def test_every_row_learns(k, identity_layer, row_gradient):
    layer = identity_layer(NoisyTopKRouter(3, k))
    layer(torch.randn(60, 3)).square().sum().backward()
    for name in ("weight", "noise"):
        assert (row_gradient(layer, name).abs().sum(1) > 0).all()


def test_the_load_loss_trains_both_rows(identity_layer, row_gradient):
    layer = identity_layer(NoisyTopKRouter(3, 1))
    routing = layer.route(torch.randn(60, 3) + torch.tensor([2.0, 0.0, 0.0]))
    load_loss(routing.logits, routing.noisy_logits, routing.noise_std, 1).backward()
    for name in ("weight", "noise"):
        assert (row_gradient(layer, name).abs().sum(1) > 0).all()


def test_noise_rows_freeze_with_their_expert(identity_layer):
    layer = identity_layer(NoisyTopKRouter(3, 1))
    layer.freeze([0])
    before = layer.pool.expert_state(0)
    layer.add_experts(1)
    layer(torch.randn(30, 3)).sum().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    assert {"gate.weight", "gate.noise"} <= before.keys()
    after = layer.pool.expert_state(0)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_k_below_one():
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        NoisyTopKRouter(3, 0)
