"""PointGoals: a point that looks for a goal nobody tells it of, except by the reward."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from numpy.typing import ArrayLike, NDArray

from .canvas import CONTEXT_COLORS, FAINT, INK, RED, Canvas
from .context import ContextView, check_options, check_task
from .vector import WorldVectorEnv
from .world import Generators, Info, World, WorldEnv

STRIDE = 0.2
FENCE = 2.0
START = 0.5
RING, SPREAD = 1.2, 0.3  # where the middles of the groups lie, and how far from one a goal may be
MAX_STEPS = 20


class GoalsWorld(World):
    """n points. See ``PointGoals`` for what the arguments mean."""

    size: ClassVar[tuple[int, int]] = (500, 500)

    def __init__(self, num_rows: int, num_contexts: int, task: int | None, view: ContextView):
        super().__init__(num_rows)
        if num_contexts < 1:
            raise ValueError(f"num_contexts must be 1 or more, not {num_contexts}")
        check_task(task, num_contexts)
        self.num_contexts, self.task, self.view = num_contexts, task, view
        self.observation_space = spaces.Box(-FENCE, FENCE, (4,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        angles = 2 * math.pi * np.arange(num_contexts) / num_contexts
        self.middles = RING * np.stack([np.cos(angles), np.sin(angles)], 1)
        self.contexts = np.zeros(num_rows, np.int64)
        self.points, self.goals = np.zeros((num_rows, 2)), np.zeros((num_rows, 2))
        self.previous = np.zeros((num_rows, 2))

    def begin(self, rows: NDArray[Any], generators: Generators, options: Mapping[str, Any] | None) -> None:
        options = check_options(options, ("task", "goal"))
        task, goal = options.get("task"), options.get("goal")
        check_task(task, self.num_contexts)
        if task is not None and goal is not None:
            raise ValueError("a reset sets the task or the goal, not both")
        chosen = self.task if task is None else task
        # Always five numbers, so that a seed gives the same start in every task.
        drawn = np.stack([generator.random(5) for generator in generators])
        self.points[rows] = START * (2 * drawn[:, 1:3] - 1)
        self.previous[rows] = self.points[rows]
        if goal is None:
            self.contexts[rows] = drawn[:, 0] * self.num_contexts if chosen is None else chosen
            angle, distance = 2 * math.pi * drawn[:, 3], SPREAD * np.sqrt(drawn[:, 4])  # uniform in a disc
            offset = distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
            self.goals[rows] = self.middles[self.contexts[rows]] + offset
        else:
            self.goals[rows] = checked_goals(goal, len(rows))
            far = np.linalg.norm(self.goals[rows][:, None] - self.middles, axis=2)
            self.contexts[rows] = far.argmin(1)

    def advance(self, actions: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        self.previous = self.points
        self.points = np.clip(self.points + STRIDE * actions, -FENCE, FENCE)
        never = np.zeros(self.num_rows, np.bool_)
        return -np.hypot(*(self.points - self.goals).T), never, never.copy()

    def observe(self, rows: NDArray[Any], generators: Generators) -> NDArray[np.float32]:
        seen = self.view(self.goals[rows], generators)
        return np.concatenate([self.points[rows], seen], 1, dtype=np.float32)

    def info(self) -> Info:
        return {"context": self.contexts.copy(), "goal": self.goals.copy()}

    def draw(self, canvas: Canvas, row: int) -> None:
        def at(point: NDArray[np.float64]) -> tuple[float, float]:
            return 250.0 + 110.0 * float(point[0]), 255.0 - 110.0 * float(point[1])

        for line in np.arange(-FENCE, FENCE + 0.5):
            canvas.line(at(np.array([line, -FENCE])), at(np.array([line, FENCE])), FAINT)
            canvas.line(at(np.array([-FENCE, line])), at(np.array([FENCE, line])), FAINT)
        for i, middle in enumerate(self.middles):
            canvas.circle(at(middle), 110 * SPREAD, CONTEXT_COLORS[i % len(CONTEXT_COLORS)], 2)
        context = int(self.contexts[row])
        color = CONTEXT_COLORS[context % len(CONTEXT_COLORS)]
        canvas.circle(at(self.goals[row]), 13, RED, 3)
        canvas.circle(at(self.goals[row]), 4, RED)
        canvas.line(at(self.previous[row]), at(self.points[row]), color, 4)
        canvas.circle(at(self.points[row]), 9, INK)
        canvas.text(f"goals of group {context} of {self.num_contexts}", (14, 9), color, size=16)
        distance = math.hypot(*(self.points[row] - self.goals[row]))
        canvas.text(f"distance {distance:.2f}", (486, 9), INK, size=16, align="right")


def checked_goals(goal: ArrayLike, num_rows: int) -> NDArray[np.float64]:
    """(2,) or (r, 2) within the fence -> something that fits r rows."""
    goals = np.asarray(goal, np.float64)
    if goals.shape not in ((2,), (num_rows, 2)) or not (np.abs(goals) <= FENCE).all():
        raise ValueError(f"goal must be two numbers, or ({num_rows}, 2) of them, within [-{FENCE}, {FENCE}]")
    return goals


class PointGoals(WorldEnv):
    """A point that looks for a goal nobody tells it of, except by the reward.

    ## Description
    p' = clip(p + .2 a, -2, 2). Goals lie in K groups: discs of radius .3 whose middles stand evenly on a circle of
    radius 1.2. For meta-learning a goal is a task, to be inferred from a few rewards; one reward tells the distance,
    and the groups then leave few places.

    ## Action Space
    `Box(-1, 1, (2,), float32)`: the stride, in fifths of a unit.

    ## Observation Space
    `Box(-2, 2, (4,), float32)`: the point (2) and the goal (2), if the context is visible. `info["context"]` is the
    goal's group, `info["goal"]` the goal.

    ## Rewards
    Minus the distance to the goal after the step.

    ## Starting State
    The point is uniform in [-.5, .5]^2. The group is `task`, or drawn uniformly; the goal is uniform in its disc.

    ## Episode End
    Truncated after 20 steps (`gymnasium.make` sees to that); never terminated.

    ## Arguments
    - `num_contexts`: K, the number of groups.
    - `task`: the group of every episode, from 0; None draws one for each. `reset(options={"task": k})` sets it once,
      `reset(options={"goal": (x, y)})` the goal itself, so that a task can have several episodes.
    - `context`: "visible", "hidden" (zeros in place of the goal) or "noisy" (with noise, drawn anew at each step).
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
        super().__init__(GoalsWorld(1, num_contexts, task, ContextView(context, context_noise)), render_mode)


class PointGoalsVector(WorldVectorEnv):
    """n ``PointGoals`` side by side in numpy; equal to n single ones. Arguments: those of both.

    The reset option "goal" may be (n, 2), one for each row that is reset.
    """

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
        world = GoalsWorld(num_envs, num_contexts, task, ContextView(context, context_noise))
        super().__init__(world, max_episode_steps, autoreset_mode, render_mode)
