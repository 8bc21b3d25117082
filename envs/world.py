"""n episodes side by side in numpy: the one place where an environment's rules are written.

``WorldEnv`` shows a world of one row as a ``gymnasium.Env``, ``WorldVectorEnv`` (vector.py) one of n rows as a
``gymnasium.vector.VectorEnv``. Both run the same lines, so they agree step by step.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from .canvas import Canvas
from .context import check_choice

Generators = Sequence[np.random.Generator]
Info = dict[str, NDArray[Any]]
ROW = np.zeros(1, np.intp)  # the row of a single environment


class World(ABC):
    """The state of n episodes and the rules that move them. Axes: n rows, A action, D observation."""

    observation_space: spaces.Box
    action_space: spaces.Box
    size: ClassVar[tuple[int, int]]  # of a rendered frame, in pixels

    def __init__(self, num_rows: int):
        if num_rows < 1:
            raise ValueError(f"num_envs must be 1 or more, not {num_rows}")
        self.num_rows = num_rows

    @abstractmethod
    def begin(self, rows: NDArray[Any], generators: Generators, options: Mapping[str, Any] | None) -> None:
        """Start new episodes in (r,) rows, r > 0, drawing from their generators."""

    @abstractmethod
    def advance(self, actions: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """(n, A) actions -> rewards, terminated, truncated, (n,) each. The time limit is not the world's business."""

    @abstractmethod
    def observe(self, rows: NDArray[Any], generators: Generators) -> NDArray[np.float32]:
        """(r,) rows and their generators -> (r, D)."""

    @abstractmethod
    def info(self) -> Info:
        """Arrays with n rows; "context" is always among them."""

    @abstractmethod
    def draw(self, canvas: Canvas, row: int) -> None:
        """Paint one row."""


class WorldEnv(gym.Env[Any, Any]):
    """One row of a world as an environment. Subclasses only build the world and describe it."""

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, world: World, render_mode: str | None):
        check_choice("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        self.world = world
        self.observation_space = world.observation_space
        self.action_space = world.action_space
        self.render_mode = render_mode
        self.canvas = Canvas(world.size)
        self._begun = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.world.begin(ROW, [self.np_random], options)
        self._begun = True
        return self._observe_and_show()

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        if not self._begun:
            raise gym.error.ResetNeeded("call reset() before step()")
        actions = as_actions(action, self.action_space.shape, self.world)
        rewards, terminated, truncated = self.world.advance(actions)
        observation, info = self._observe_and_show()
        return observation, float(rewards[0]), bool(terminated[0]), bool(truncated[0]), info

    def _observe_and_show(self) -> tuple[NDArray[np.float32], dict[str, Any]]:
        if self.render_mode == "human":
            self.render()
        observation = self.world.observe(ROW, [self.np_random])[0]
        return observation, {key: first(values) for key, values in self.world.info().items()}

    def render(self) -> NDArray[np.uint8] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.render_mode is None:
            gym.logger.warn('render() shows nothing without a render_mode: use render_mode="rgb_array" or "human"')
            return None
        if not self._begun:
            raise gym.error.ResetNeeded("call reset() before render()")
        self.canvas.begin()
        self.world.draw(self.canvas, 0)
        return self.canvas.show(self.render_mode, self.metadata["render_fps"])

    def close(self) -> None:
        self.canvas.close()


def as_actions(actions: Any, shape: tuple[int, ...] | None, world: World) -> NDArray[np.float64]:
    """Actions of the given shape as (n, A) numbers in [-1, 1]."""
    array = np.asarray(actions, np.float64)
    if array.shape != shape:
        raise ValueError(f"actions must have shape {shape}, not {array.shape}")
    if np.isnan(array).any():
        raise ValueError("actions must be numbers; one is nan")
    return np.clip(array.reshape(world.num_rows, -1), -1.0, 1.0)


def first(values: NDArray[Any]) -> Any:
    """The entry of the only row: a Python number, or a copy of an array."""
    return values[0].copy() if values.ndim > 1 else values[0].item()
