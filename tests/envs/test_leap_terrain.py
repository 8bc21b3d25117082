"""LeapTerrain: leaps computed by hand, the ranges that were fixed, the distance, the bounds by lookahead."""

import gymnasium as gym
import numpy as np
import pytest
from modmoe_envs import LeapTerrain, course_distance, held_out_seeds
from modmoe_envs.bounds import (
    GRID,
    OLD_PRIMITIVES,
    WEAK_PRIMITIVES,
    best_constant,
    constant_distance,
    hardened_world,
    lookahead_distance,
    values,
)
from modmoe_envs.context import ContextView
from modmoe_envs.leap_world import CELL, LeapWorld, flight

ID = "modmoe/LeapTerrain-v0"


def plain(piece: tuple[int, int | None, float] = (0, 0, 0.0), body=(9.81, 1.0, 0.0)) -> LeapTerrain:
    """An environment with a given body on ground that is level but for cells (5 cm) from, to, at a height."""
    env = LeapTerrain(hardened=False)
    env.reset(seed=0)
    world = env.world
    world.body[0] = body
    world.reach[:], world.sink[:] = flight(world.body[:, 0], world.body[:, 2])
    world.heights[0] = 0.0
    start, stop, height = piece
    world.heights[0, start:stop] = height
    return env


def test_a_leap_without_drag():
    # Action 0: v = (2, 2.2). y = 2.2 t - 4.905 t^2 is +.018 at t = .44 and -.026 at t = .46, where the leap ends:
    # x = .5 + 2 * .46 = 1.42. Speed: .92 / (.46 + .15) = 1.508; reward exp(-.4918^2 / 2) - .02 * 2.2 = .8861 - .044.
    _, reward, terminated, truncated, info = plain().step(np.zeros(2, np.float32))
    assert info["distance"] == pytest.approx(1.42, abs=1e-5)
    assert reward == pytest.approx(0.8421, abs=1e-4)
    assert not terminated
    assert not truncated


def test_a_leap_with_drag():
    # g = 10, d = .4, action 1: v = (3.5, 3.9), r(t) = (1 - e^(-.4 t)) / .4, y = 3.9 r - 10 (t - r)/.4 = 28.9 r - 25 t.
    # t = .74: r = .64053, y = +.011. t = .76: r = .65535, y = -.060. So x = .5 + 3.5 * .65535 = 2.7937.
    env = plain(body=(10.0, 1.0, 0.4))
    assert env.step(np.ones(2, np.float32))[4]["distance"] == pytest.approx(2.7937, abs=2e-4)


def test_strength_scales_the_speed():
    # s = 1.1: v = (2.2, 2.42); 2.42 t = 4.905 t^2 at t = .4934, so it ends at t = .50 and x = .5 + 1.1.
    env = plain(body=(9.81, 1.1, 0.0))
    assert env.step(np.zeros(2, np.float32))[4]["distance"] == pytest.approx(1.6, abs=1e-5)


@pytest.mark.parametrize(
    ("piece", "action", "fell", "x"),
    [
        # A wall .5 m high at 1 m: at t = .26 the body is at (1.02, .240), below its top.
        ((20, 24, 0.5), (0, 0), True, 1.02),
        # One of .2 m: y = .2017 at t = .32, .1810 at t = .34, where x = 1.18: it lands on top.
        ((20, 24, 0.2), (0, 0), False, 1.18),
        # A gap from 1 to 3 m, 2 m deep: the body drops past -1.2 m. y = -2 at t = .901, so t = .92, x = 2.34.
        ((20, 60, -2.0), (0, 0), True, 2.34),
        # A step 1 m down, high leap: v_y = 3.9, landing at sqrt(3.9^2 + 2 * 9.81 * 1) = 5.90 > 4.9 m/s.
        # y = -1 at t = .9993, so t = 1, x = 2.5.
        ((20, None, -1.0), (0, 1), True, 2.5),
        # The same step, low leap: v_y = 1.35, landing at 4.63 m/s. y = -1 at t = .6096, so t = .62, x = 1.74.
        ((20, None, -1.0), (0, -0.5), False, 1.74),
    ],
)
def test_falls(piece, action, fell, x):
    _, reward, terminated, _, info = plain(piece).step(np.array(action, np.float32))
    assert terminated is fell
    assert (reward == 0.0) is fell
    assert info["distance"] == pytest.approx(x, abs=1e-4)


def test_the_finish_truncates():
    env = plain()
    env.world.x[0] = 49.5
    _, reward, terminated, truncated, info = env.step(np.zeros(2, np.float32))
    assert (terminated, truncated) == (False, True)
    assert info["distance"] == 50.0
    assert reward > 0


def test_at_most_120_leaps():
    env = gym.make(ID)
    env.reset(seed=0)
    env.unwrapped.world.heights[:] = 0.0
    ends = [env.step(np.full(2, -1, np.float32))[2:4] for _ in range(120)]  # shortest leaps
    assert ends == [(False, False)] * 119 + [(False, True)]


def test_the_body_sees_the_ground_ahead_of_it():
    # At .5 m, first gap at 3 m: point i is .02 + i * 3.98/39 m ahead; 2.5 m lies between i = 24 and i = 25.
    observation, _ = LeapTerrain(terrain="gap").reset(seed=1)
    assert (observation[:25] == 0).all()
    assert observation[25] == -2.0


def test_the_context_is_the_body_on_its_ranges():
    observation, info = LeapTerrain().reset(seed=1)
    gravity, strength, drag = info["context"]
    expected = [(gravity - 10.5) / 3.5, (strength - 1.0) / 0.15, (drag - 0.2) / 0.2]
    np.testing.assert_allclose(observation[40:], expected, atol=1e-5)


def test_terrain_at_hand():
    env = plain()
    for kind in (1, 2, 3):
        env.world.obstacles[0] = np.array([[1.5], [3.2], [kind]])  # noticed from, end, kind
        seen = []
        for x in (1.49, 1.51, 3.19):
            env.world.x[0] = x
            seen.append(env.world.terrain()[0])
        assert seen == [0, kind, kind]


def bodies(num: int, terrain: str) -> LeapWorld:
    world = LeapWorld(num, terrain, True, 50.0, ContextView("visible", 0.0))
    world.begin(np.arange(num), [np.random.default_rng(seed) for seed in range(num)], None)
    return world


def greatest(gravity: float, strength: float, drag: float) -> tuple[float, float]:
    """Range and apex of the strongest leap by small Euler steps, capped at 3.2 and .9 m."""
    x, y, vx, vy, apex, dt = 0.0, 0.0, 3.5 * strength, 3.9 * strength, 0.0, 1e-3
    while y >= 0 and x < 10:
        x, y = x + dt * vx, y + dt * vy
        vx, vy = vx - dt * drag * vx, vy - dt * (drag * vy + gravity)
        apex = max(apex, y)
    return min(x, 3.2), min(apex, 0.9)


def pieces(heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths (m) and levels of the level pieces of a course, the last one, which is cut, left out."""
    edges = np.flatnonzero(np.diff(heights)) + 1
    return np.diff(np.concatenate([[0], edges])) * CELL, heights[np.concatenate([[0], edges[:-1]])]


def test_bodies_fill_their_ranges():
    body = bodies(2000, "mixed").body
    np.testing.assert_allclose(body.min(0), [7, 0.85, 0], atol=0.02)
    np.testing.assert_allclose(body.max(0), [14, 1.15, 0.4], atol=0.02)
    np.testing.assert_allclose(body.mean(0), [10.5, 1, 0.2], atol=0.2)


def test_gaps_are_scaled_to_the_greatest_range():
    world = bodies(60, "gap")
    shares = []
    for row in range(60):
        lengths, levels = pieces(world.heights[row])
        widths, flats = lengths[levels == -2], lengths[levels == 0]
        assert flats[0] == pytest.approx(3.0)
        assert flats[1:].min() > 2 - 1e-9
        assert flats[1:].max() < 4.5 + 1e-9
        far, _ = greatest(*world.body[row])
        # Cells cut off up to .05 m, instants of .02 s add up to .02 * 3.5 * 1.15 m to the range.
        assert widths.min() > 0.25 * far - CELL
        assert widths.max() < 0.75 * (far + 0.085)
        shares.extend(widths / far)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)


def test_walls_are_scaled_to_the_greatest_apex():
    world = bodies(60, "wall")
    shares = []
    for row in range(60):
        lengths, levels = pieces(world.heights[row])
        assert lengths[levels > 0] == pytest.approx(0.2)
        _, apex = greatest(*world.body[row])
        shares.extend(levels[levels > 0] / apex)
    assert min(shares) > 0.25 * 0.98
    assert max(shares) < 0.7 * 1.02
    assert np.mean(shares) == pytest.approx(0.475, abs=0.02)


def test_steps_go_both_ways():
    world = bodies(60, "step")
    rises = np.concatenate([np.diff(pieces(world.heights[row])[1]) for row in range(60)])
    assert np.abs(rises).min() > 0.1 - 1e-9
    assert np.abs(rises).max() < 0.35 + 1e-9
    assert 0.4 < (rises > 0).mean() < 0.6


def test_mixed_terrain_has_each_kind_equally_often():
    kinds = bodies(200, "mixed").obstacles[:, 2].astype(int).ravel()
    share = np.bincount(kinds, minlength=4)[1:] / len(kinds)
    np.testing.assert_allclose(share, 1 / 3, atol=0.03)


def policy(observations: np.ndarray) -> np.ndarray:
    """High where something stands or gapes in the next metre."""
    ahead = np.abs(observations[:, :12]).max(1, keepdims=True) > 0.05
    return np.where(ahead, [[0.6, 0.9]], [[0.1, 0.0]])


def test_course_distance_is_that_of_single_episodes():
    seeds = held_out_seeds(8)
    expected = []
    for seed in seeds:
        env = gym.make(ID)
        observation, info = env.reset(seed=seed)
        over = False
        while not over:
            observation, _, terminated, truncated, info = env.step(policy(observation[None])[0].astype(np.float32))
            over = terminated or truncated
        expected.append(info["distance"])
    found = course_distance(lambda rows: policy(rows).astype(np.float32), seeds)
    np.testing.assert_array_equal(found, expected)
    assert len(set(found)) > 4  # they fell at different places


def test_held_out_seeds_are_apart_from_training_seeds():
    assert held_out_seeds(3) == [1_000_000, 1_000_001, 1_000_002]
    assert len(held_out_seeds()) == 50


def test_values_by_hand():
    # Level ground, a pit from 2.2 to 4 m. From .5 m: A = (0, 0) lands at 1.42; again A lands at 2.34, in the pit.
    # B = (1, 1) would land at 3.4, in the pit: the low leap (-1, -1), v = (.5, .5), t = .12, ends at .56 and stands.
    world = hardened_world([0])
    world.body[0] = 9.81, 1.0, 0.0
    world.reach[:], world.sink[:] = flight(world.body[:, 0], world.body[:, 2])
    world.heights[0] = 0.0
    world.heights[0, 44:80] = -2.0
    actions = np.array([[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0]])
    row, x, y = np.zeros(1, np.intp), np.array([0.5]), np.zeros(1)
    steady, low = 0.8421, np.exp(-0.5 * (0.06 / 0.27 - 2) ** 2) - 0.01
    np.testing.assert_allclose(values(world, row, x, y, actions, 0), [[steady + 5, 0, low + 5]], atol=1e-3)
    # One leap further. After A only (1, 1) might stand, from 1.42 to 4.29 m (t = .80: 3.12 - 3.139 < 0, x = 1.42 + 2.8
    # = 4.22): reward exp(-(2.8/.95 - 2)^2 / 2) - .078 = .5630. (-1, -1) stands too, but gives .9 * (low + 5).
    far = np.exp(-0.5 * (2.8 / 0.95 - 2) ** 2) - 0.078
    expected = [[steady + 0.9 * (far + 5), 0, low + 0.9 * (steady + 5)]]
    np.testing.assert_allclose(values(world, row, x, y, actions, 1), expected, atol=2e-3)


def test_lookahead_over_one_action_is_that_action():
    seeds = held_out_seeds(6)
    action = np.array([0.4, 0.3])
    found = lookahead_distance(action[None], 1, seeds)
    np.testing.assert_array_equal(found, constant_distance(action, seeds))
    expected = course_distance(lambda rows: np.tile(action, (len(rows), 1)), seeds)
    np.testing.assert_array_equal(found, expected)


def test_fixed_primitives_fail_where_the_grid_arrives():
    seeds = held_out_seeds(10)
    weak, grid = lookahead_distance(WEAK_PRIMITIVES, 2, seeds), lookahead_distance(GRID, 1, seeds)
    assert weak.mean() < 25
    assert grid.mean() > 45


@pytest.mark.slow
def test_bounds_by_lookahead_are_those_of_the_probe():
    """15.6, 50.1, 11.8 and 50.4 m over 50 courses; the standard errors are 1.6, .9, 1.4 and 0."""
    assert lookahead_distance(WEAK_PRIMITIVES, 4).mean() == pytest.approx(15.6, abs=2 * 1.6 * 2**0.5)
    assert lookahead_distance(OLD_PRIMITIVES, 4).mean() == pytest.approx(50.1, abs=2 * 0.9 * 2**0.5)
    assert best_constant()[1].mean() == pytest.approx(11.8, abs=2 * 1.4 * 2**0.5)
    assert lookahead_distance(GRID, 1).mean() == pytest.approx(50.4, abs=0.5)
