"""A world of n rows as a ``gymnasium.vector.VectorEnv``, with each of Gymnasium's three autoreset modes."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from .canvas import Canvas
from .context import check_choice
from .world import World, as_actions

Bools = NDArray[np.bool_]
Step = tuple[NDArray[np.float32], NDArray[np.float64], Bools, Bools, dict[str, Any]]


class WorldVectorEnv(VectorEnv[NDArray[np.float32], NDArray[Any], NDArray[Any]]):
    """n rows that equal n single environments under ``SyncVectorEnv``, each with a random generator of its own.

    Args:
        world: the episodes.
        max_episode_steps: truncate after so many steps; None for no limit.
        autoreset_mode: when a finished row begins anew: "NextStep" (the next step resets it and ignores its action),
            "SameStep" (at once; the last observation is in ``info["final_obs"]``) or "Disabled" (by
            ``reset(options={"reset_mask": mask})``).
        render_mode: None or "rgb_array"; ``render()`` gives one frame for each row.
    Raises:
        ValueError: if a mode is unknown or the limit below 1.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        world: World,
        max_episode_steps: int | None,
        autoreset_mode: str | AutoresetMode,
        render_mode: str | None,
    ):
        check_choice("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        if not isinstance(autoreset_mode, AutoresetMode):
            check_choice("autoreset_mode", autoreset_mode, [mode.value for mode in AutoresetMode])
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be 1 or more, or None, not {max_episode_steps}")
        self.world = world
        self.num_envs = world.num_rows
        self.max_episode_steps = max_episode_steps
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = render_mode
        self.single_observation_space = world.observation_space
        self.single_action_space = world.action_space
        self.observation_space = batch_space(world.observation_space, self.num_envs)
        self.action_space = batch_space(world.action_space, self.num_envs)
        self.canvas = Canvas(world.size)
        self.generators: list[np.random.Generator] = []
        self.seeds: list[int] = []
        self.steps = np.zeros(self.num_envs, np.int64)
        self.done = np.ones(self.num_envs, np.bool_)
        self._begun = False

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode in every row, or in those of ``options["reset_mask"]``.

        Args:
            seed: row i gets ``seed + i``, or ``seed[i]``; None leaves its generator as it is.
            options: "reset_mask", an (n,) bool array; the rest goes to each row's reset.
        """
        options = dict(options or {})
        mask = options.pop("reset_mask", None)
        rows = np.arange(self.num_envs) if mask is None else np.flatnonzero(self._checked(mask))
        if len(rows) < self.num_envs and not self._begun:
            raise gym.error.ResetNeeded("reset every row before resetting some")
        self._seed(seed, rows)
        self._begin(rows, options)
        self._begun = True
        observations = self.world.observe(np.arange(self.num_envs), self.generators)
        return observations, self._info(np.isin(np.arange(self.num_envs), rows))

    def step(self, actions: NDArray[Any]) -> Step:
        if not self._begun:
            raise gym.error.ResetNeeded("call reset() before step()")
        finished = np.flatnonzero(self.done)
        if len(finished) and self.autoreset_mode is AutoresetMode.DISABLED:
            raise gym.error.ResetNeeded(f'rows {finished.tolist()} are done: reset them by options={{"reset_mask": …}}')
        array = as_actions(actions, self.action_space.shape, self.world)
        rewards, terminated, truncated = self.world.advance(array)
        self.steps += 1
        if self.max_episode_steps is not None:
            truncated = truncated | (self.steps >= self.max_episode_steps)
        # What the world made of rows that were done before this step is thrown away.
        self._begin(finished, None)
        rewards[finished], terminated[finished], truncated[finished] = 0.0, False, False
        self.done = terminated | truncated

        observations = self.world.observe(np.arange(self.num_envs), self.generators)
        info = self._info(np.ones(self.num_envs, np.bool_))
        if self.autoreset_mode is AutoresetMode.SAME_STEP and self.done.any():
            info = self._begin_at_once(observations, info)
        return observations, rewards, terminated, truncated, info

    def _begin_at_once(self, observations: NDArray[np.float32], info: dict[str, Any]) -> dict[str, Any]:
        over = self.done.copy()  # beginning anew clears it
        rows = np.flatnonzero(over)
        last = np.full(self.num_envs, None, dtype=object)
        for row in rows:
            last[row] = observations[row].copy()
        final = {key: np.where(expand(over, value), value, 0) for key, value in info.items()}
        self._begin(rows, None)
        observations[rows] = self.world.observe(rows, [self.generators[row] for row in rows])
        return {
            **self._info(np.ones(self.num_envs, np.bool_)),
            "final_obs": last,
            "_final_obs": over.copy(),
            "final_info": final,
            "_final_info": over.copy(),
        }

    def _begin(self, rows: NDArray[Any], options: dict[str, Any] | None) -> None:
        if len(rows) == 0:
            return
        self.world.begin(rows, [self.generators[row] for row in rows], options)
        self.steps[rows] = 0
        self.done[rows] = False

    def _seed(self, seed: int | Sequence[int | None] | None, rows: NDArray[Any]) -> None:
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else int(seed) + row for row in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed must be a number or {self.num_envs} of them, one for each row, not {len(seeds)}")
        if not self.generators:
            made = [seeding.np_random(one) for one in seeds]
            self.generators, self.seeds = [list(part) for part in zip(*made, strict=True)]
            return
        for row in rows:
            if seeds[row] is not None:
                self.generators[row], self.seeds[row] = seeding.np_random(seeds[row])

    def _checked(self, mask: Any) -> Bools:
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (self.num_envs,):
            raise ValueError(f'options["reset_mask"] must be a bool array of shape ({self.num_envs},)')
        if not mask.any():
            raise ValueError('options["reset_mask"] must select one row at least')
        return mask

    def _info(self, mask: Bools) -> dict[str, Any]:
        """Gymnasium's form: each value with n rows, and under "_" + its key which rows have it."""
        info: dict[str, Any] = {}
        for key, values in self.world.info().items():
            info[key] = np.where(expand(mask, values), values, 0).astype(values.dtype)
            info[f"_{key}"] = mask.copy()
        return info

    @property
    def np_random(self) -> tuple[np.random.Generator, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(self.generators)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(self.seeds)

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.render_mode is None:
            gym.logger.warn('render() shows nothing without a render_mode: use render_mode="rgb_array"')
            return None
        frames = []
        for row in range(self.num_envs):
            self.canvas.begin()
            self.world.draw(self.canvas, row)
            frames.append(self.canvas.show(self.render_mode, self.metadata["render_fps"]))
        return tuple(frames)

    def close_extras(self, **kwargs: Any) -> None:
        self.canvas.close()


def expand(mask: Bools, values: NDArray[Any]) -> Bools:
    """(n,) -> (n, 1, ...), to go with values of n rows."""
    return mask.reshape(-1, *[1] * (values.ndim - 1))
