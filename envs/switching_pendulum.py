"""SwitchingPendulum: Gymnasium's Pendulum under a gravity, mass or length that switches."""

import math
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from numpy.typing import NDArray

from .canvas import CONTEXT_COLORS, FAINT, INK, RED, Canvas
from .context import CONTEXT_BOUND, ContextView, check_choice
from .switching import Switcher

DEFAULTS = {"gravity": (5.0, 10.0, 15.0), "mass": (0.7, 1.0, 1.4), "length": (0.7, 1.0, 1.4)}
ATTRIBUTES = {"gravity": "g", "mass": "m", "length": "l"}  # of PendulumEnv
PIVOT, METER = (250.0, 262.0), 140.0


class SwitchingPendulum(PendulumEnv):
    """Gymnasium's Pendulum under a gravity, mass or length that switches.

    ## Description
    Swing the pendulum up and keep it there. The physics are those of ``gymnasium``'s ``Pendulum-v1``; one parameter
    takes one of K values, drawn at each reset, and moves on to the next after every `switch_every` steps.

    ## Action Space
    `Box(-1, 1, (1,), float32)`: the torque in units of 2 N m. (Pendulum-v1 takes N m.)

    ## Observation Space
    `Box(float32)` of 3 + K numbers: cos and sin of the angle (0 is upright), the angular velocity (within [-8, 8]), and
    the context as one of K (within [-2, 2], which leaves room for noise). `info` holds "context" (its number) and the
    parameter's value under the parameter's name.

    ## Rewards
    -(angle^2 + .1 velocity^2 + .001 torque^2), as in Pendulum-v1.

    ## Starting State
    Angle uniform in [-pi, pi], velocity in [-1, 1]; the context is `task`, or drawn uniformly.
    `reset(options={"task": k})` sets it once; "x_init" and "y_init" are Pendulum-v1's.

    ## Episode End
    Truncated after 200 steps (`gymnasium.make` sees to that); never terminated.

    ## Arguments
    - `parameter`: "gravity" (5, 10, 15 m/s^2), "mass" (.7, 1, 1.4 kg) or "length" (.7, 1, 1.4 m).
    - `values`: other values of it.
    - `switch_every`: steps between switches inside an episode; None switches between episodes only.
    - `task`: the context at every reset, from 0; None draws one for each.
    - `context`: "visible", "hidden" (zeros) or "noisy" (with noise, drawn anew at each step).
    - `context_noise`: the noise's standard deviation.
    - `render_mode`: None, "rgb_array" or "human".

    ## Version History
    - v0: first version, on Pendulum-v1.
    """

    def __init__(
        self,
        parameter: str = "gravity",
        values: Sequence[float] | None = None,
        switch_every: int | None = None,
        task: int | None = None,
        context: str = "visible",
        context_noise: float = 0.5,
        render_mode: str | None = None,
    ):
        super().__init__()
        check_choice("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        view = ContextView(context, context_noise)
        self.switcher = Switcher(parameter, values, switch_every, task, view, DEFAULTS)
        bound = np.array([1, 1, self.max_speed, *[CONTEXT_BOUND] * self.switcher.num_contexts], np.float32)
        self.observation_space = spaces.Box(-bound, bound)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.canvas = Canvas((500, 500))
        self.render_mode = render_mode
        self.state = np.zeros(2)
        self.last_u = None
        self._begun = False
        self._apply()

    def _apply(self) -> None:
        setattr(self, ATTRIBUTES[self.switcher.parameter], self.switcher.value)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        gym.Env.reset(self, seed=seed)
        self.switcher.begin(self.np_random, options, ("x_init", "y_init"))
        self._apply()
        self._begun = True
        start = {name: value for name, value in (options or {}).items() if name != "task"}
        observation, _ = super().reset(options=start or None)
        return self.switcher.extend(observation, self.np_random), self.switcher.info()

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, action: NDArray[Any]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        if not self._begun:
            raise gym.error.ResetNeeded("call reset() before step()")
        observation, reward, terminated, truncated, _ = super().step(self.max_torque * np.clip(action, -1.0, 1.0))
        self.switcher.count_step()
        self._apply()
        extended = self.switcher.extend(observation, self.np_random)
        return extended, float(reward), terminated, truncated, self.switcher.info()

    def render(self) -> NDArray[np.uint8] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.render_mode is None:
            gym.logger.warn('render() shows nothing without a render_mode: use render_mode="rgb_array" or "human"')
            return None
        if not self._begun:
            raise gym.error.ResetNeeded("call reset() before render()")
        self.canvas.begin()
        self._draw()
        return self.canvas.show(self.render_mode, self.metadata["render_fps"])

    def _draw(self) -> None:
        color = CONTEXT_COLORS[self.switcher.context % len(CONTEXT_COLORS)]
        angle, speed = self.state
        length = METER * self.l
        tip = (PIVOT[0] - length * math.sin(angle), PIVOT[1] - length * math.cos(angle))
        self.canvas.circle(PIVOT, length, FAINT, 1.5)
        self.canvas.line(PIVOT, tip, color, 14 * self.m**0.5)
        self.canvas.circle(PIVOT, 9, INK)
        self.canvas.circle(tip, 11 * self.m**0.5, color)
        self.canvas.text(f"context {self.switcher.context}: {self.switcher.describe()}", (14, 9), color)
        self.canvas.text(f"speed {speed:+.1f}", (486, 9), align="right")
        torque = 0.0 if self.last_u is None else float(self.last_u)
        self.canvas.text("torque", (14, 468))
        self.canvas.line((250, 477), (250 + 80 * torque, 477), RED, 12)
        self.canvas.line((250, 468), (250, 486), INK, 2)

    def close(self) -> None:
        self.canvas.close()
