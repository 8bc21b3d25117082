"""DeepSeekV2Router and DeepSeekV3Router: groups, weights and the bias by hand, growth, freezing, saving, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from modmoe import DeepSeekV2Router, DeepSeekV3Router, ExpertPool, MLPExpert, MoELayer


def biases(layer: MoELayer) -> Tensor:
    return layer.pool.namespace("gate")["selection_bias"]


def logit(*probs: float) -> Tensor:
    return torch.tensor([[math.log(p / (1 - p)) for p in probs]])


# -- V2 ----------------------------------------------------------------------------------------------------------------


def test_v2_by_hand(identity_layer):
    # ids 0 and 2 are group 0, 1 and 3 group 1. Logits log(1, 8, 4, 3): softmax 1/16, 8/16, 4/16, 3/16.
    # Group 1 holds the best (8/16); its two experts are chosen although expert 2 is better than 3.
    x = torch.tensor([[1.0, 8.0, 4.0, 3.0]]).log()
    routing = identity_layer(DeepSeekV2Router(4, 2, num_groups=2), 4).route(x)
    assert routing.choices.tolist() == [[1, 3]]
    assert_close(routing.weight, torch.tensor([8 / 16, 3 / 16]))  # not normalised
    assert_close(routing.probs, torch.tensor([[1, 8, 4, 3]]) / 16)
    assert not routing.has_drops
    scaled = identity_layer(DeepSeekV2Router(4, 2, num_groups=2, routed_scaling=16.0), 4)
    assert_close(scaled.route(x).weight, torch.tensor([8.0, 3.0]))
    assert scaled.router.weight_sum == "any"


def test_v2_without_groups_is_top_k_of_the_softmax(identity_layer):
    x = torch.randn(20, 5)
    routing = identity_layer(DeepSeekV2Router(5, 3), 5).route(x)
    weights, choices = x.softmax(1).topk(3)
    assert torch.equal(routing.choices, choices)
    assert_close(routing.weight.view(20, 3), weights)


def test_v2_takes_its_own_group_even_where_probabilities_vanish(identity_layer):
    # softmax(300, 0, 200, -1) is 1, 0, 0, 0 in float32: masked with 0, experts of group 1 would tie with expert 2
    routing = identity_layer(DeepSeekV2Router(4, 2, num_groups=2), 4).route(torch.tensor([[300.0, 0.0, 200.0, -1.0]]))
    assert routing.choices.tolist() == [[0, 2]]


# -- V3 ----------------------------------------------------------------------------------------------------------------


def test_v3_by_hand(identity_layer, write_rows):
    layer = identity_layer(DeepSeekV3Router(4, 2, routed_scaling=2.5), 4)
    write_rows(layer, "selection_bias", torch.tensor([0.0, 0.0, 0.5, -0.5]))
    routing = layer.route(logit(0.6, 0.2, 0.3, 0.9))
    # s + b = .6, .2, .8, .4: 2 and 0 are chosen; s alone weighs them: 2.5 * .3/.9 and 2.5 * .6/.9
    assert routing.choices.tolist() == [[2, 0]]
    assert_close(routing.weight, torch.tensor([2.5 / 3, 5 / 3]))
    assert_close(routing.probs, torch.tensor([[0.3, 0.1, 0.15, 0.45]]))  # s / 2


def test_v3_groups_by_hand(identity_layer):
    # Groups {0, 2} and {1, 3}: .9 + .1 = 1 against .6 + .5 = 1.1, though .9 is the best of all
    x = logit(0.9, 0.6, 0.1, 0.5)
    routing = identity_layer(DeepSeekV3Router(4, 2, num_groups=2), 4).route(x)
    assert routing.choices.tolist() == [[1, 3]]
    assert_close(routing.weight, torch.tensor([6 / 11, 5 / 11]))
    assert identity_layer(DeepSeekV2Router(4, 2, num_groups=2), 4).route(x).choices.tolist() == [[0, 2]]


def test_groups_are_masked_with_minus_infinity(identity_layer, write_rows):
    # all s + b are negative: a group masked with 0 would win. Sums -.5 - .7 = -1.2 and -.6 - .8 = -1.4
    layer = identity_layer(DeepSeekV3Router(4, 2, num_groups=2), 4)
    write_rows(layer, "selection_bias", torch.full((4,), -1.0))
    assert layer.route(logit(0.5, 0.4, 0.3, 0.2)).choices.tolist() == [[0, 2]]


def test_the_bias_touches_no_weight_and_gets_no_gradient(identity_layer, write_rows, row_gradient):
    layer = identity_layer(DeepSeekV3Router(3, 3))
    x = torch.randn(9, 3)
    before = layer.route(x).matrix()
    write_rows(layer, "selection_bias", torch.tensor([3.0, -1.0, 0.0]))
    assert_close(layer.route(x).matrix(), before)
    layer(x).square().sum().backward()
    assert (row_gradient(layer).abs().sum(1) > 0).all()
    assert not biases(layer).requires_grad


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", [DeepSeekV2Router, DeepSeekV3Router])
def test_every_row_learns(kind, k, identity_layer, row_gradient):
    layer = identity_layer(kind(4, k, num_groups=2), 4)
    layer(torch.randn(60, 4)).square().sum().backward()
    assert (row_gradient(layer).abs().sum(1) > 0).all()


def test_v3_with_one_expert_weighs_by_its_score(identity_layer):
    routing = identity_layer(DeepSeekV3Router(2, 1, routed_scaling=2.0), 2).route(logit(0.6, 0.3))
    assert_close(routing.weight, torch.tensor([1.2]))
    assert [DeepSeekV3Router(2, k).weight_sum for k in (1, 2)] == ["<= 1", "1"]


def test_v3_without_normalisation_by_hand(identity_layer):
    routing = identity_layer(DeepSeekV3Router(3, 2, routed_scaling=2.0, renormalize=False)).route(logit(0.6, 0.2, 0.9))
    assert routing.choices.tolist() == [[2, 0]]
    assert_close(routing.weight, torch.tensor([1.8, 1.2]))  # 2 * .9 and 2 * .6


def test_v3_with_one_normalised_expert_weighs_exactly_the_scale_and_learns(identity_layer, row_gradient):
    # w = 3 s / const(s): dw/dlogit = 3 (1 - s), here 3 * .4; x is the logit of .6, the rows are the identity
    layer = identity_layer(DeepSeekV3Router(2, 1, routed_scaling=3.0, renormalize=True), 2)
    x = logit(0.6, 0.3)
    weight = layer.route(x).weight
    assert weight.tolist() == [3.0]
    weight.sum().backward()
    assert_close(row_gradient(layer), torch.stack([1.2 * x[0], torch.zeros(2)]))


@pytest.mark.parametrize(
    ("k", "scaling", "renormalize", "declared"),
    [
        (2, 1.0, None, "1"),
        (1, 1.0, True, "1"),
        (1, 1.0, None, "<= 1"),
        (2, 0.5, True, "<= 1"),
        (2, 1.0, False, "any"),  # .9 + .9
        (1, 2.0, True, "any"),
    ],
)
def test_v3_declares_what_its_weights_add_up_to(k, scaling, renormalize, declared, identity_layer):
    router = DeepSeekV3Router(2, k, routed_scaling=scaling, renormalize=renormalize)
    assert router.weight_sum == declared
    total = identity_layer(router, 2).route(logit(0.9, 0.9)).weight.sum().item()
    assert {"1": total == 1, "<= 1": total < 1, "any": total > 1}[declared]


def test_a_copy_keeps_the_function_only_where_groups_limit_nothing(identity_layer):
    layer = identity_layer(DeepSeekV3Router(3, 1, num_groups=2, top_groups=2, renormalize=True))
    x = torch.randn(50, 3)
    before = layer(x)
    layer.add_experts(1, init="copy", source=0)
    assert_close(layer(x), before)
    limited = identity_layer(DeepSeekV3Router(3, 1, num_groups=2, renormalize=True))
    with pytest.raises(ValueError, match="init='copy' cannot keep the layer's function"):
        limited.add_experts(1, init="copy", source=0)


# -- the bias ----------------------------------------------------------------------------------------------------------


def test_update_by_hand(identity_layer):
    layer = identity_layer(DeepSeekV3Router(3, 1, update_rate=0.01))
    layer.route(torch.eye(3)[[0, 0, 0, 1, 1, 2]])
    layer.update_router()
    # loads 3, 2, 1, their mean 2
    assert_close(biases(layer), torch.tensor([-0.01, 0.0, 0.01]))
    layer.update_router()
    assert_close(biases(layer), torch.tensor([-0.02, 0.0, 0.02]))
    layer.eval()
    layer.update_router()
    assert_close(biases(layer), torch.tensor([-0.02, 0.0, 0.02]))


def test_padding_frozen_and_closed_experts_stay_out_of_the_update(identity_layer):
    layer = identity_layer(DeepSeekV3Router(5, 1, update_rate=0.01), 5)
    layer.freeze([0])
    frozen = layer.pool.growable("gate", "selection_bias").stack([0]).clone()
    x = torch.eye(5)[[0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 3]]
    mask = torch.arange(11) != 8  # one of expert 1's tokens is padding
    layer.route(x, mask=mask, expert_mask=torch.tensor([True, True, True, True, False]))
    layer.update_router()
    # live and open: loads 2, 1, 1, their mean 4/3; with the frozen expert's 6 it would be 2.5 and all would rise
    assert_close(biases(layer), torch.tensor([0.0, -0.01, 0.01, 0.01, 0.0]))
    assert torch.equal(layer.pool.growable("gate", "selection_bias").stack([0]), frozen)


def test_updates_even_out_the_load(identity_layer):
    torch.manual_seed(0)
    layer = identity_layer(DeepSeekV3Router(4, 1, update_rate=0.01), 4)
    x = 0.3 * torch.randn(400, 4) + torch.tensor([1.0, 0.0, 0.0, -1.0])
    first = layer.route(x).load.max()
    for _ in range(60):
        layer.route(x)
        layer.update_router()
    assert first > 300
    assert layer.route(x).load.max() < 130


def test_a_clone_of_the_layer_keeps_its_own_bias(identity_layer):
    layer = identity_layer(DeepSeekV3Router(2, 1, update_rate=0.01), 2)
    before = biases(layer)
    layer.route(torch.tensor([[1.0, 0.0]]))
    layer.update_router()
    assert (before == 0).all()  # written to a copy, not in place


def test_biases_are_saved_and_grow_with_the_pool(identity_layer):
    layer = identity_layer(DeepSeekV3Router(3, 1, update_rate=0.01))
    layer.route(torch.eye(3)[[0, 0, 1]])
    layer.update_router()
    assert_close(biases(layer), torch.tensor([-0.01, 0.0, 0.01]))
    layer.freeze([2])
    layer.add_experts(1)
    layer.remove([1])
    assert layer.pool.ids == (0, 2, 3)
    assert_close(biases(layer), torch.tensor([-0.01, 0.01, 0.0]))
    loaded = MoELayer(ExpertPool(MLPExpert(3, 4), 1), DeepSeekV3Router(3, 1))
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(biases(loaded), biases(layer))


def test_an_update_after_growth_is_refused(identity_layer):
    layer = identity_layer(DeepSeekV3Router(3, 1))
    layer.route(torch.eye(3))
    layer.add_experts(1)
    with pytest.raises(ValueError, match="the routing is of 3 experts, the pool has 4"):
        layer.update_router()


# -- groups on a growing pool ------------------------------------------------------------------------------------------


def test_an_expert_never_changes_its_group(identity_layer):
    layer = identity_layer(DeepSeekV3Router(6, 2, num_groups=3), 6)
    router = layer.router
    assert isinstance(router, DeepSeekV3Router)
    assert router.groups(layer.pool.namespace("gate")).tolist() == [0, 1, 2, 0, 1, 2]
    layer.add_experts(2)
    layer.remove([0, 1, 4])
    assert layer.pool.ids == (2, 3, 5, 6, 7)
    assert router.groups(layer.pool.namespace("gate")).tolist() == [2, 0, 2, 0, 1]
    routing = layer.route(torch.randn(40, 6))
    assert routing.has_drops  # group 1 holds expert 7 alone
    alone = (routing.choices == 4).any(1)
    assert (routing.choices[alone, 1] == -1).all()
    assert_close(routing.matrix().sum(1), torch.ones(40))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([DeepSeekV2Router, DeepSeekV3Router]),
    seed=st.integers(0, 10_000),
    num_experts=st.integers(2, 7),
    num_groups=st.integers(1, 4),
    data=st.data(),
)
def test_choices_stay_within_the_best_groups(kind, seed, num_experts, num_groups, data):
    top_groups = data.draw(st.integers(1, num_groups))
    k = data.draw(st.integers(1, num_experts))
    torch.manual_seed(seed)
    layer = MoELayer(ExpertPool(MLPExpert(4, 4), num_experts), kind(4, k, num_groups, top_groups))
    x, is_open = torch.randn(6, 4), torch.rand(6, num_experts) < 0.6
    is_open[torch.arange(6), torch.randint(num_experts, (6,))] = True
    routing = layer.route(x, expert_mask=is_open)
    scores = routing.logits.softmax(1) if kind is DeepSeekV2Router else routing.logits.sigmoid()
    for token in range(6):
        members = [
            sorted(
                (scores[token, e].item() for e in range(g, num_experts, num_groups) if is_open[token, e]), reverse=True
            )
            for g in range(num_groups)
        ]
        value = [sum(m[: 1 if kind is DeepSeekV2Router else 2]) if m else -math.inf for m in members]
        best = sorted(range(num_groups), key=lambda g: value[g], reverse=True)[:top_groups]
        inside = [e for e in range(num_experts) if e % num_groups in best and is_open[token, e]]
        expected = sorted(inside, key=lambda e: scores[token, e].item(), reverse=True)[:k]
        assert [e for e in routing.choices[token].tolist() if e >= 0] == expected


@pytest.mark.parametrize("kind", [DeepSeekV2Router, DeepSeekV3Router])
def test_bad_settings(kind):
    with pytest.raises(ValueError, match="1 <= top_groups <= num_groups is needed, got 3 and 2"):
        kind(4, 2, num_groups=2, top_groups=3)
    with pytest.raises(ValueError, match="routed_scaling must be positive, got 0"):
        kind(4, 2, routed_scaling=0.0)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        kind(4, 0)
    with pytest.raises(ValueError, match="update_rate must be at least 0, got -1"):
        DeepSeekV3Router(4, 2, update_rate=-1.0)
