"""The five families: moments worked out by hand, variants, oracles, seeds."""

import math

import pytest
import torch
from torch import Tensor

from modmoe.meta.families import FAMILIES, FiveFamilies

MANY = 40_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clean(family: str) -> Tensor:
    """(MANY,) values of f at one uniform x each."""
    return FiveFamilies([family], y_scale=1.0).sample(MANY, 0, 1, seeded(), "a").clean_y.flatten()


# x is uniform in [-5, 5]: E x^2 = 25/3, E x^4 = 125. Slopes and shifts in [-3, 3]: E c^2 = 3, E c^4 = 81/5.
# q: E q^2 = (.15^3 - .02^3) / (3 * .13) = .0086333, E q = 0.
E_Q2 = 0.0086333
# E (x - c)^4 = E x^4 + 6 E x^2 E c^2 + E c^4 = 125 + 150 + 16.2
MOMENTS = {
    # E A = 2.55; E sin(x - p) = E sin x E cos p - E cos x E sin p = -(sin 5 / 5) (2 / pi) = .12209; E A^2 = 8.5033,
    # E sin^2 = (1 - E cos 2(x - p)) / 2 = 1/2, because 2 p runs over a whole turn
    "sine": (2.55 * 0.12209, 8.5033 / 2),
    "line": (0.0, 3 * 25 / 3 + 3),
    "quadratic": (0.0, E_Q2 * 291.2 + 3),
    # E |x - c|^2 = 25/3 + 3
    "absolute": (0.0, E_Q2 * (25 / 3 + 3) + 3),
}


@pytest.mark.parametrize("family", MOMENTS)
def test_moments_by_hand(family):
    mean, square = MOMENTS[family]
    y = clean(family)
    assert abs(y.mean() - mean) < 4 * y.std() / MANY**0.5
    assert abs(y.square().mean() - square) < 4 * y.square().std() / MANY**0.5


def test_tanh_is_bounded_and_centred():
    y = clean("tanh")
    assert y.abs().max() <= 6  # |m| + |b|
    assert abs(y.mean()) < 4 * y.std() / MANY**0.5
    # tanh^2 < 1, so the variance is below E m^2 + E b^2 = 6; |x - c| is over 1 most of the time, where tanh^2 > .58
    assert 4.5 < y.square().mean() < 6


def test_scales_and_noise():
    tasks = FiveFamilies().sample(2000, 0, 20, seeded())
    assert tasks.batch.target_x.abs().max() <= 1
    assert tasks.batch.target_y is not None
    noise = tasks.batch.target_y - tasks.clean_y
    assert abs(noise.std() - 0.1) < 4 * 0.1 / 80_000**0.5  # .3 / 3; the error of a deviation is s / sqrt(2 n)
    raw = FiveFamilies(x_scale=1.0, y_scale=1.0).sample(2000, 0, 20, seeded())
    torch.testing.assert_close(raw.batch.target_x, 5 * tasks.batch.target_x)
    torch.testing.assert_close(raw.batch.target_y, 3 * tasks.batch.target_y)
    # ln .1 + ln(2 pi e) / 2 = -2.3026 + 1.4189
    assert FiveFamilies().noise_nll == pytest.approx(-0.8837, abs=1e-4)
    normal = torch.distributions.Normal(tasks.clean_y, 0.1)
    assert -normal.log_prob(tasks.batch.target_y).mean() == pytest.approx(FiveFamilies().noise_nll, abs=0.02)


def test_one_family_a_task_and_all_equally_often():
    tasks = FiveFamilies().sample(5000, 4, 6, seeded(), "a")
    both = torch.cat([tasks.context_family, tasks.target_family], 1)
    assert (both == both[:, :1]).all()
    assert tasks.breakpoint.isnan().all()
    counts = both[:, 0].bincount(minlength=5)
    assert (counts - 1000).abs().max() < 4 * (5000 * 0.2 * 0.8) ** 0.5


def test_families_switch_at_the_breakpoint():
    tasks = FiveFamilies().sample(2000, 40, 40, seeded(), "b")
    x = torch.cat([tasks.batch.context_x, tasks.batch.target_x], 1).squeeze(2)
    family = torch.cat([tasks.context_family, tasks.target_family], 1)
    left = x <= tasks.breakpoint[:, None]
    first, second = (family.masked_fill(~side, -1).amax(1) for side in (left, ~left))
    assert (tasks.breakpoint.abs() <= 0.5).all()  # 2.5 / 5
    assert (first != second).all()
    assert torch.equal(family, torch.where(left, first[:, None], second[:, None]))
    pairs = (5 * first + second).bincount(minlength=25)
    assert (pairs[pairs > 0] - 100).abs().max() < 45  # 20 ordered pairs, standard deviation 9.7
    assert (pairs > 0).sum() == 20


def test_mixed_tasks_alternate():
    tasks = FiveFamilies().sample(6, 0, 3, seeded(), "mix")
    assert tasks.breakpoint.isnan().tolist() == [True, False] * 3


def test_variants_of_a_seed_share_their_points():
    one, other = (FiveFamilies().sample(50, 5, 9, seeded(), variant) for variant in "ab")
    assert torch.equal(one.batch.target_x, other.batch.target_x)
    same = one.target_family == other.target_family
    assert torch.equal(one.clean_y.squeeze(2)[same], other.clean_y.squeeze(2)[same])


def test_families_come_one_after_the_other():
    family = FiveFamilies(["tanh", "line", "sine"])
    for stage, name in enumerate(("tanh", "line", "sine")):
        tasks = family.sample(20, 5, 5, seeded(), "c", stage)
        assert (tasks.target_family == FAMILIES.index(name)).all()


def test_equal_seeds_give_equal_tasks():
    one, again, other = (FiveFamilies().sample(9, 3, 5, seeded(s)).batch for s in (1, 1, 2))
    assert torch.equal(one.context_y, again.context_y)
    assert torch.equal(one.target_x, again.target_x)
    assert not torch.equal(one.target_x, other.target_x)


def test_evaluation_sets_share_tasks_and_nest_contexts():
    sets = FiveFamilies().evaluation_sets(seed=7, num_tasks=11)
    again = FiveFamilies().evaluation_sets(seed=7, num_tasks=11, contexts=(10, 3))
    assert list(sets) == [3, 5, 10]
    for size, tasks in sets.items():
        assert tasks.batch.context_x.shape == (11, size, 1)
        assert tasks.context_family.shape == (11, size)
        assert torch.equal(tasks.batch.context_y, sets[10].batch.context_y[:, :size])
        assert torch.equal(tasks.batch.target_y, sets[10].batch.target_y)
    assert torch.equal(again[3].batch.context_y, sets[3].batch.context_y)


@pytest.mark.parametrize("context", [0, 1])
def test_empty_and_one_point_contexts(context):
    assert FiveFamilies().sample(4, context, 5, seeded()).batch.context_x.shape == (4, context, 1)


def test_context_sizes_that_differ_are_masked():
    tasks = FiveFamilies().sample(3000, (0, 2), 1, seeded())
    sizes = tasks.batch.present.sum(1)
    counts = sizes.bincount(minlength=3)
    assert (counts - 1000).abs().max() < 4 * (3000 * 2 / 9) ** 0.5
    assert torch.equal(tasks.context_family >= 0, tasks.batch.present)
    assert not (tasks.batch.present[:, 1] & ~tasks.batch.present[:, 0]).any()  # those that are there stand first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": ["sine", "cube"]}, "unknown family 'cube', choose from sine"),
        ({"families": ["sine", "sine"]}, "one or more different names"),
        ({"families": []}, "one or more different names"),
        ({"noise": 0.0}, "are positive, got 0.0, 5.0, 3.0"),
        ({"y_scale": math.nan}, "are positive"),
    ],
)
def test_bad_families(options, message):
    with pytest.raises(ValueError, match=message):
        FiveFamilies(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "d"}, "unknown variant 'd', choose from a, b, mix, c"),
        ({"num_tasks": 0}, "1 or more, got 0 and 5"),
        ({"targets": 0}, "1 or more, got 2 and 0"),
        ({"context": -1}, "0 <= low <= high, got -1"),
        ({"context": (4, 3)}, r"0 <= low <= high, got \(4, 3\)"),
        ({"variant": "c"}, "variant 'c' has a stage and no other does"),
        ({"variant": "a", "stage": 0}, "variant 'c' has a stage and no other does"),
        ({"variant": "c", "stage": 5}, "stage is one of 0 to 4, got 5"),
    ],
)
def test_bad_samples(options, message):
    with pytest.raises(ValueError, match=message):
        FiveFamilies().sample(**{"num_tasks": 2, "context": 3, "targets": 5, **options})


def test_what_cannot_be_asked():
    with pytest.raises(ValueError, match="switches between two families, there is only line"):
        FiveFamilies(["line"]).sample(1, 1, 1, variant="b")
    with pytest.raises(ValueError, match="hold 3 context points, asked for 4"):
        FiveFamilies().sample(1, 3, 1).with_context(4)
    with pytest.raises(ValueError, match="contexts names no size"):
        FiveFamilies().evaluation_sets(0, contexts=())
