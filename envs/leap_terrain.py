"""LeapTerrain: a body that leaps over gaps, walls and steps."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from .context import ContextView
from .leap_world import LeapWorld
from .vector import WorldVectorEnv
from .world import WorldEnv

COURSE, MAX_LEAPS = 50.0, 120
FIRST_HELD_OUT_SEED = 1_000_000


class LeapTerrain(WorldEnv):
    """A body that leaps over gaps, walls and steps.

    ## Description
    One step is one ballistic leap. The body sees the ground ahead, chooses how fast to take off, and lands where the
    parabola (bent by drag) meets the ground. After MACE (Peng, Berseth and van de Panne, SIGGRAPH 2016), whose dog and
    raptor run over such terrain; one leap stands for one of their gait cycles.

    A body is drawn for each episode: gravity U(7, 14) m/s^2, leg strength U(.85, 1.15), linear drag U(0, .4) 1/s.
    The obstacles are scaled to it, so that each can be passed and no fixed leap passes all: gaps of U(.25, .75) of its
    greatest range (at most 3.2 m), walls .2 m thick and U(.25, .7) of its greatest apex (at most .9 m) high, steps of
    U(.1, .35) m up or down, with flats of U(2, 4.5) m between them.

    A take-off at speed (v_x, v_y) is after t seconds at x = v_x r(t), y = v_y r(t) - g (t - r(t))/d with
    r(t) = (1 - exp(-d t))/d. Time goes in steps of .02 s, at most 1.8 s.

    ## Action Space
    `Box(-1, 1, (2,), float32)`: v_x = (2 + 1.5 a_0) s and v_y = (2.2 + 1.7 a_1) s in m/s, where s is the strength.

    ## Observation Space
    `Box(-2, 2, (43,), float32)`: 40 heights of the ground relative to the body, evenly from .02 to 4 m ahead, cut at
    2 m; then the context: gravity, strength and drag, each on [-1, 1] over its range.

    `info` holds "context" (gravity, strength, drag in their units), "distance" (m, at most the course's length) and
    "terrain" (0 open ground, 1 gap, 2 wall, 3 step: the next obstacle, from 1.5 m before it to its end).

    ## Rewards
    exp(-(v - 2)^2 / 2) - .02 v_y for a leap, where v is its length over its duration + .15 s on the ground: run at
    2 m/s, without needless height. 0 for a fall.

    ## Starting State
    At .5 m on level ground; the first obstacle comes at 3 m.

    ## Episode End
    Terminated by a fall: the body hits the side of an obstacle more than 3 cm below its edge, drops more than 1.2 m,
    or lands at more than 4.9 s m/s. Truncated at the end of the course (50 m), which the body cannot see coming, and
    after 120 leaps (`gymnasium.make` sees to that). The measure of success is the distance: `course_distance`.

    ## Arguments
    - `terrain`: "mixed", or one kind of obstacle only: "gap", "wall", "step".
    - `hardened`: False gives every episode the same body (9.81 m/s^2, strength 1, no drag) and a context of zeros.
    - `context`: "visible", "hidden" (zeros) or "noisy" (with noise, drawn anew at each step).
    - `context_noise`: the noise's standard deviation.
    - `course`: its length in m.
    - `render_mode`: None, "rgb_array" or "human".

    ## Version History
    - v0: first version.
    """

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array"], "render_fps": 5}  # noqa: RUF012

    def __init__(
        self,
        terrain: str = "mixed",
        hardened: bool = True,
        context: str = "visible",
        context_noise: float = 0.5,
        course: float = COURSE,
        render_mode: str | None = None,
    ):
        super().__init__(LeapWorld(1, terrain, hardened, course, ContextView(context, context_noise)), render_mode)

    @staticmethod
    def bounds(primitives: Sequence[Sequence[float]], seeds: Sequence[int]) -> dict[str, NDArray[np.float64]]:
        """How far one gets without learning, by primitives and by any action: see ``modmoe_envs.bounds.bounds``."""
        from .bounds import bounds  # it imports this module

        return bounds(np.asarray(primitives, np.float64), seeds)


class LeapTerrainVector(WorldVectorEnv):
    """n ``LeapTerrain`` side by side in numpy; equal to n single ones. Arguments: those of both."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        terrain: str = "mixed",
        hardened: bool = True,
        context: str = "visible",
        context_noise: float = 0.5,
        course: float = COURSE,
        max_episode_steps: int | None = MAX_LEAPS,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ):
        world = LeapWorld(num_envs, terrain, hardened, course, ContextView(context, context_noise))
        super().__init__(world, max_episode_steps, autoreset_mode, render_mode)


def held_out_seeds(num: int = 50, first: int = FIRST_HELD_OUT_SEED) -> list[int]:
    """Seeds of episodes for evaluation, apart from any training seed below a million."""
    return list(range(first, first + num))


def course_distance(
    policy: Callable[[NDArray[np.float32]], NDArray[Any]], seeds: Sequence[int] | None = None, **options: Any
) -> NDArray[np.float64]:
    """How far a policy gets on each of some courses, in at most 120 leaps.

    Args:
        policy: (n, 43) observations -> (n, 2) actions.
        seeds: one for each course; None for ``held_out_seeds()``.
        options: those of ``LeapTerrain``.
    Returns:
        (n,) metres, at most the course's length.
    """
    seeds = held_out_seeds() if seeds is None else seeds
    env = LeapTerrainVector(len(seeds), **options)
    observations, info = env.reset(seed=list(seeds))
    distance, running = info["distance"], np.ones(len(seeds), np.bool_)
    while running.any():
        observations, _, terminated, truncated, info = env.step(policy(observations))
        distance = np.where(running, info["distance"], distance)
        running &= ~(terminated | truncated)
    return distance
