"""Capacity: the limit and who is dropped, by hand and as properties, alone and through a router."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modmoe import TopKRouter
from modmoe.gating.capacity import Capacity


def test_the_published_share_that_is_dropped():
    choices = torch.tensor([[0], [0], [0], [1], [0], [1], [2], [0]])
    capacity = Capacity(1.25)
    # 8 * 1 * 1.25 / 4 = 2.5 -> 3 (2 rounded down). Expert 0 is asked 5 times: 2 of 8 dropped, .25 (3 of 8, .375)
    assert capacity.limit(8, 1, 4, training=True) == 3
    kept = capacity.keep(choices, torch.zeros(8), 4, 3)
    assert (~kept).float().mean() == 0.25
    assert kept.squeeze(1).tolist() == [True, True, True, True, False, True, True, False]
    assert (~capacity.keep(choices, torch.zeros(8), 4, 2)).float().mean() == 0.375


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_limit_is_not_rounded_up_by_floating_point(as_tensor):
    # 10 * 1 * 1.1 / 1 = 11, in floating point a little more: not 12. 7 * 2 * 1.25 / 4 = 4.375 -> 5. None -> 0
    for num_tokens, k, factor, num_experts, expected in [(10, 1, 1.1, 1, 11), (7, 2, 1.25, 4, 5), (0, 2, 1.25, 4, 0)]:
        given = torch.tensor(num_tokens) if as_tensor else num_tokens
        limit = Capacity(factor).limit(given, k, num_experts, training=True)
        assert limit == expected
        assert isinstance(limit, torch.Tensor) == as_tensor


def test_the_factor_of_evaluation():
    capacity = Capacity(1.0, eval_factor=2.0)
    assert [capacity.limit(8, 1, 4, training) for training in (True, False)] == [2, 4]
    assert Capacity(1.0).limit(8, 1, 4, training=False) == 2


def test_first_choices_stand_before_second_ones():
    # Expert 0, one place: token 0 wants it second, token 1 first. Expert 1 the other way round
    kept = Capacity(1.0).keep(torch.tensor([[1, 0], [0, 1]]), torch.zeros(2), 2, 1)
    assert kept.tolist() == [[True, False], [True, False]]


def test_priority_drops_the_least_sure():
    choices, score = torch.zeros(4, 1, dtype=torch.int64), torch.tensor([0.4, 0.9, 0.6, 0.9])
    keep = Capacity(1.0, order="priority").keep
    assert keep(choices, score, 2, 2).squeeze(1).tolist() == [False, True, False, True]
    assert keep(choices, score, 2, 1).squeeze(1).tolist() == [False, True, False, False]  # a tie: the earlier token
    assert Capacity(1.0).keep(choices, score, 2, 2).squeeze(1).tolist() == [True, True, False, False]


def test_padding_takes_no_room():
    choices = torch.tensor([[-1], [0], [-1], [0], [0]])
    for order in ("token", "priority"):
        kept = Capacity(1.0, order=order).keep(choices, torch.tensor([9.0, 3.0, 9.0, 2.0, 1.0]), 1, 2)
        assert kept.squeeze(1).tolist() == [False, True, False, True, False]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_tokens=st.integers(0, 12),
    num_experts=st.integers(1, 4),
    limit=st.integers(0, 4),
    order=st.sampled_from(["token", "priority"]),
)
def test_nobody_is_dropped_for_one_who_stands_behind(seed, num_tokens, num_experts, limit, order):
    generator = torch.Generator().manual_seed(seed)
    k = min(2, num_experts)
    choices = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :k]
    choices = choices.masked_fill(torch.rand(num_tokens, k, generator=generator) < 0.2, -1)
    score = torch.rand(num_tokens, generator=generator).mul(4).round() / 4  # with ties
    kept = Capacity(1.0, order=order).keep(choices, score, num_experts, limit)
    assert not kept[choices < 0].any()
    # highest score first, then the earlier token
    place = score.argsort(descending=True, stable=True).argsort() if order == "priority" else torch.arange(num_tokens)
    for expert in range(num_experts):
        wanted = choices == expert
        assert kept[wanted].sum() == min(int(wanted.sum()), limit)  # no room is left empty
        for rank in range(k):
            mine, stays = wanted[:, rank], kept[:, rank]
            if (mine & ~stays).any():
                assert not kept[:, rank + 1 :][wanted[:, rank + 1 :]].any()
                if (mine & stays).any():
                    assert place[mine & stays].max() < place[mine & ~stays].min()
                    if order == "priority":
                        assert score[mine & stays].min() >= score[mine & ~stays].max()


def test_priority_through_a_router(identity_layer):
    generator = torch.Generator().manual_seed(0)
    layer = identity_layer(TopKRouter(3, 2, capacity=Capacity(0.75, order="priority")))
    x, mask = torch.randn(20, 3, generator=generator), torch.arange(20) % 5 > 0
    routing = layer.route(x, mask=mask)
    best, limit = routing.probs.amax(1), 8  # 16 real tokens * 2 * .75 / 3 = 8
    assert routing.load.max() == limit
    for expert in range(3):
        for rank in range(2):
            asked = routing.requested_choices[:, rank] == expert
            stays = routing.choices[:, rank] == expert
            if (asked & ~stays).any() and stays.any():
                assert best[stays].min() >= best[asked & ~stays].max()
    dropped = (routing.requested_choices >= 0) & (routing.choices < 0)
    assert dropped.any()
    assert (routing.weight.view(20, 2)[dropped] == 0).all()
    assert (routing.requested_choices[~mask] == -1).all()


def test_a_dropped_token_gets_nothing(identity_layer):
    layer = identity_layer(TopKRouter(3, 1, capacity=Capacity(1.0)))
    y = layer(torch.tensor([[3.0, 0, 0], [2.0, 0, 0], [1.0, 0, 0]]))  # C = 1
    assert y[0].abs().max() > 0
    assert (y[1:] == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 0.0}, "capacity factors must be positive, got 0.0 and None"),
        ({"factor": 1.0, "eval_factor": -1.0}, "capacity factors must be positive, got 1.0 and -1.0"),
        ({"factor": 1.0, "order": "random"}, "order is one of .* got 'random'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Capacity(**settings)
