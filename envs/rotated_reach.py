"""RotatedReach: a point that is steered towards a goal by controls turned by an angle."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from .canvas import CONTEXT_COLORS, FAINT, INK, RED, Canvas
from .context import CONTEXT_BOUND, ContextView, check_options, check_task
from .vector import WorldVectorEnv
from .world import Generators, Info, World, WorldEnv

STRIDE = 0.2
FENCE = 2.0
MAX_STEPS = 20


class ReachWorld(World):
    """n points. See ``RotatedReach`` for what the arguments mean."""

    size: ClassVar[tuple[int, int]] = (500, 500)

    def __init__(self, num_rows: int, num_contexts: int, task: int | None, view: ContextView):
        super().__init__(num_rows)
        if num_contexts < 1:
            raise ValueError(f"num_contexts must be 1 or more, not {num_contexts}")
        check_task(task, num_contexts)
        self.num_contexts, self.task, self.view = num_contexts, task, view
        bound = np.array([FENCE, FENCE, 1, 1, *[CONTEXT_BOUND] * num_contexts], np.float32)
        self.observation_space = spaces.Box(-bound, bound)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        angles = 2 * math.pi * np.arange(num_contexts) / num_contexts
        self.cos, self.sin = np.cos(angles), np.sin(angles)
        self.contexts = np.zeros(num_rows, np.int64)
        self.points, self.goals = np.zeros((num_rows, 2)), np.zeros((num_rows, 2))
        self.previous = np.zeros((num_rows, 2))

    def begin(self, rows: NDArray[Any], generators: Generators, options: Mapping[str, Any] | None) -> None:
        task = check_options(options, ("task",)).get("task")
        check_task(task, self.num_contexts)
        chosen = self.task if task is None else task
        # Always five numbers, so that a seed gives the same start in every task.
        drawn = np.stack([generator.random(5) for generator in generators])
        self.contexts[rows] = drawn[:, 0] * self.num_contexts if chosen is None else chosen
        self.points[rows], self.goals[rows] = 2 * drawn[:, 1:3] - 1, 2 * drawn[:, 3:] - 1
        self.previous[rows] = self.points[rows]

    def advance(self, actions: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        cos, sin = self.cos[self.contexts], self.sin[self.contexts]
        turned = np.stack([cos * actions[:, 0] - sin * actions[:, 1], sin * actions[:, 0] + cos * actions[:, 1]], 1)
        self.previous = self.points
        self.points = np.clip(self.points + STRIDE * turned, -FENCE, FENCE)
        never = np.zeros(self.num_rows, np.bool_)
        return -np.hypot(*(self.points - self.goals).T), never, never.copy()

    def observe(self, rows: NDArray[Any], generators: Generators) -> NDArray[np.float32]:
        context = self.view(np.eye(self.num_contexts)[self.contexts[rows]], generators)
        return np.concatenate([self.points[rows], self.goals[rows], context], 1, dtype=np.float32)

    def info(self) -> Info:
        return {"context": self.contexts.copy()}

    def draw(self, canvas: Canvas, row: int) -> None:
        def at(point: NDArray[np.float64]) -> tuple[float, float]:
            return 250.0 + 110.0 * float(point[0]), 255.0 - 110.0 * float(point[1])

        context = int(self.contexts[row])
        color = CONTEXT_COLORS[context % len(CONTEXT_COLORS)]
        for line in np.arange(-FENCE, FENCE + 0.5):
            canvas.line(at(np.array([line, -FENCE])), at(np.array([line, FENCE])), FAINT)
            canvas.line(at(np.array([-FENCE, line])), at(np.array([FENCE, line])), FAINT)
        canvas.circle(at(self.goals[row]), 13, RED, 3)
        canvas.circle(at(self.goals[row]), 4, RED)
        canvas.line(at(self.previous[row]), at(self.points[row]), color, 4)
        canvas.circle(at(self.points[row]), 9, color)
        canvas.text(f"context {context} of {self.num_contexts}", (14, 9), color, size=16)
        distance = math.hypot(*(self.points[row] - self.goals[row]))
        canvas.text(f"distance {distance:.2f}", (486, 9), INK, size=16, align="right")
        # What the action (1, 0) does here.
        middle, tip = (453.0, 447.0), (self.cos[context], self.sin[context])
        end = (middle[0] + 24 * tip[0], middle[1] - 24 * tip[1])
        canvas.circle(middle, 30, FAINT, 2)
        canvas.line(middle, end, color, 4)
        canvas.circle(end, 5, color)


class RotatedReach(WorldEnv):
    """A point that is steered towards a goal by controls turned by an angle.

    ## Description
    In context k of K the action is turned by 2 pi k / K before it moves the point:
    p' = clip(p + .2 R(2 pi k / K) a, -2, 2). What is right in one context is wrong in another, so one behaviour cannot
    serve all, and none helps to learn another.

    ## Action Space
    `Box(-1, 1, (2,), float32)`: the stride before it is turned, in fifths of a unit.

    ## Observation Space
    `Box(float32)` of 4 + K numbers: the point (2, within [-2, 2]), the goal (2, within [-1, 1]), and the context as
    one of K (within [-2, 2], which leaves room for noise). `info["context"]` is k.

    ## Rewards
    Minus the distance to the goal after the step.

    ## Starting State
    Point and goal uniform in [-1, 1]^2; the context is `task`, or drawn uniformly.

    ## Episode End
    Truncated after 20 steps (`gymnasium.make` sees to that); never terminated.

    ## Arguments
    - `num_contexts`: K.
    - `task`: the context of every episode, from 0; None draws one for each. `reset(options={"task": k})` sets it once.
    - `context`: "visible", "hidden" (zeros) or "noisy" (with noise, drawn anew at each step).
    - `context_noise`: the noise's standard deviation.
    - `render_mode`: None, "rgb_array" or "human".

    ## Version History
    - v0: first version.
    """

    def __init__(
        self,
        num_contexts: int = 3,
        task: int | None = None,
        context: str = "visible",
        context_noise: float = 0.5,
        render_mode: str | None = None,
    ):
        super().__init__(ReachWorld(1, num_contexts, task, ContextView(context, context_noise)), render_mode)


class RotatedReachVector(WorldVectorEnv):
    """n ``RotatedReach`` side by side in numpy; equal to n single ones. Arguments: those of both."""

    def __init__(
        self,
        num_envs: int = 1,
        num_contexts: int = 3,
        task: int | None = None,
        context: str = "visible",
        context_noise: float = 0.5,
        max_episode_steps: int | None = MAX_STEPS,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ):
        world = ReachWorld(num_envs, num_contexts, task, ContextView(context, context_noise))
        super().__init__(world, max_episode_steps, autoreset_mode, render_mode)
