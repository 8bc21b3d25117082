"""How far LeapTerrain can be run without learning: run ``python -m modmoe_envs.bounds``.

A chooser knows the whole course, tries every sequence of a few leaps from a fixed set of actions, and takes the first
leap of the best one. It bounds what a selector over fixed primitives can reach; a learner that gets further than the
bound of its initial primitives has learned actions.
"""

import argparse
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .context import ContextView
from .leap_terrain import COURSE, MAX_LEAPS, held_out_seeds
from .leap_world import Floats, LeapWorld

WEAK_PRIMITIVES = np.array([[-0.5, -0.5], [0.1, 0.0], [0.4, 0.3]])
OLD_PRIMITIVES = np.array([[-0.5, -0.3], [0.4, 0.1], [0.7, 0.7]])
GRID = np.stack(np.meshgrid(np.linspace(-1, 1, 13), np.linspace(-1, 1, 13)), -1).reshape(-1, 2)

DISCOUNT = 0.9
STANDING = 5.0  # what it is worth to stand where the lookahead ends; a leap is worth 1 at most
WIDTH = 12  # of the leaps that were tried from one place, how many are followed


def lookahead_distance(actions: NDArray[np.float64], depth: int, seeds: Sequence[int] | None = None) -> Floats:
    """How far a chooser gets that looks ``depth`` leaps beyond the next one.

    Args:
        actions: (A, 2), the leaps to choose from.
        depth: 0 or more; the cost grows with min(A, 12)^depth.
        seeds: one for each course; None for ``held_out_seeds()``.
    Returns:
        (n,) metres on courses of 50 m, in at most 120 leaps.
    """
    world = hardened_world(seeds)

    def choose(rows: NDArray[np.intp]) -> Floats:
        return actions[values(world, rows, world.x[rows], world.y[rows], actions, depth).argmax(1)]

    return run(world, choose)


def constant_distance(action: NDArray[np.float64], seeds: Sequence[int] | None = None) -> Floats:
    """How far one and the same action gets: (2,) -> (n,) metres."""
    return run(hardened_world(seeds), lambda rows: np.tile(action, (len(rows), 1)))


def best_constant(seeds: Sequence[int] | None = None) -> tuple[NDArray[np.float64], Floats]:
    """The best action of the 13x13 grid, chosen on these very courses, and how far it gets on each."""
    distances = [constant_distance(action, seeds) for action in GRID]
    best = int(np.argmax([distance.mean() for distance in distances]))
    return GRID[best], distances[best]


def bounds(primitives: NDArray[np.float64], seeds: Sequence[int] | None = None) -> dict[str, Floats]:
    """What no learner is needed for: about half a minute for 50 courses.

    Args:
        primitives: (A, 2), the leaps to choose from.
        seeds: one for each course; None for ``held_out_seeds()``.
    Returns:
        (n,) metres each: "weak", the best choice among the primitives, 4 leaps beyond the next one; "constant", the
        best single action, chosen on these courses; "grid", the best choice from 13x13 actions, 1 leap beyond.
    """
    return {
        "weak": lookahead_distance(primitives, 4, seeds),
        "constant": best_constant(seeds)[1],
        "grid": lookahead_distance(GRID, 1, seeds),
    }


def hardened_world(seeds: Sequence[int] | None) -> LeapWorld:
    seeds = held_out_seeds() if seeds is None else seeds
    world = LeapWorld(len(seeds), "mixed", True, COURSE, ContextView("visible", 0.0))
    world.begin(np.arange(len(seeds)), [np.random.default_rng(seed) for seed in seeds], None)
    return world


def run(world: LeapWorld, choose) -> Floats:
    """Leap in every row until it falls or arrives; ``choose``: (r,) rows -> (r, 2) actions."""
    running = np.arange(world.num_rows)
    for _ in range(MAX_LEAPS):
        landing = world.leap(running, world.x[running], world.y[running], choose(running))
        world.x[running], world.y[running] = landing.x, landing.y
        running = running[~landing.fell & (landing.x < world.course)]
        if len(running) == 0:
            break
    return np.minimum(world.x, world.course)


def values(world: LeapWorld, rows: NDArray[np.intp], x: Floats, y: Floats, actions: Floats, depth: int) -> Floats:
    """(m,) places -> (m, A): reward + .9 * (value of the best leap that follows), 0 for a fall."""
    num, count = len(rows), len(actions)
    landing = world.leap(np.repeat(rows, count), np.repeat(x, count), np.repeat(y, count), np.tile(actions, (num, 1)))
    reward, stood = landing.reward.reshape(num, count), ~landing.fell.reshape(num, count)
    if depth == 0:
        return np.where(stood, reward + STANDING, 0.0)
    ranked = np.argsort(np.where(stood, -reward, np.inf), 1, kind="stable")[:, :WIDTH]
    place, action = np.repeat(np.arange(num), ranked.shape[1]), ranked.ravel()
    kept = stood[place, action]
    place, action = place[kept], action[kept]
    flat = place * count + action
    following = values(world, rows[place], landing.x[flat], landing.y[flat], actions, depth - 1)
    found = np.where(stood, -1.0, 0.0)  # a fall is better than a leap that was not followed, to nothing else
    found[place, action] = reward[place, action] + DISCOUNT * following.max(1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Bounds of LeapTerrain by lookahead, over held-out courses.")
    parser.add_argument("--courses", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=held_out_seeds()[0])
    chosen = parser.parse_args()
    seeds = held_out_seeds(chosen.courses, chosen.first_seed)
    action, constant = best_constant(seeds)
    rows = [
        ("weak primitives, 4 leaps beyond", lookahead_distance(WEAK_PRIMITIVES, 4, seeds)),
        ("old primitives, 4 leaps beyond", lookahead_distance(OLD_PRIMITIVES, 4, seeds)),
        (f"best constant action {action.round(2).tolist()}", constant),
        ("13x13 grid, 1 leap beyond", lookahead_distance(GRID, 1, seeds)),
    ]
    for name, distance in rows:
        error = distance.std(ddof=1) / len(distance) ** 0.5
        print(f"{name:36} {distance.mean():5.1f} m  (standard error {error:.1f}, {len(distance)} courses)")


if __name__ == "__main__":
    main()
