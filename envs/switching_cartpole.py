"""SwitchingCartPole: Gymnasium's CartPole under a gravity, pole mass or pole length that switches."""

import math
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from numpy.typing import NDArray

from .canvas import CONTEXT_COLORS, FAINT, INK, RED, Canvas
from .context import CONTEXT_BOUND, ContextView, check_choice
from .switching import Switcher

DEFAULTS = {"gravity": (5.0, 9.8, 20.0), "mass": (0.05, 0.1, 0.5), "length": (0.25, 0.5, 1.0)}
ATTRIBUTES = {"gravity": "gravity", "mass": "masspole", "length": "length"}  # of CartPoleEnv
MAX_SPEED = 20.0  # m/s and rad/s observed: CartPole-v1's bounds are infinite
METER, RAIL = 110.0, 300.0


class SwitchingCartPole(CartPoleEnv):
    """Gymnasium's CartPole under a gravity, pole mass or pole length that switches.

    ## Description
    Keep the pole upright by pushing the cart. The physics are those of ``gymnasium``'s ``CartPole-v1``; one parameter
    takes one of K values, drawn at each reset, and moves on to the next after every `switch_every` steps.

    ## Action Space
    `Discrete(2)`: push the cart to the left (0) or right (1) with 10 N.

    ## Observation Space
    `Box(float32)` of 4 + K numbers: the cart's position (within [-4.8, 4.8]) and velocity, the pole's angle (within
    [-.418, .418]) and angular velocity (both velocities cut at 20), and the context as one of K (within [-2, 2], which
    leaves room for noise). `info` holds "context" (its number) and the parameter's value under the parameter's name.

    ## Rewards
    1 for each step, the last one included.

    ## Starting State
    Four numbers uniform in [-.05, .05]; the context is `task`, or drawn uniformly. `reset(options={"task": k})` sets it
    once; "low" and "high" are CartPole-v1's.

    ## Episode End
    Terminated when the pole leans more than 12 degrees or the cart is more than 2.4 m from the middle. Truncated after
    500 steps (`gymnasium.make` sees to that).

    ## Arguments
    - `parameter`: "gravity" (5, 9.8, 20 m/s^2), the pole's "mass" (.05, .1, .5 kg) or half "length" (.25, .5, 1 m).
    - `values`: other values of it.
    - `switch_every`: steps between switches inside an episode; None switches between episodes only.
    - `task`: the context at every reset, from 0; None draws one for each.
    - `context`: "visible", "hidden" (zeros) or "noisy" (with noise, drawn anew at each step).
    - `context_noise`: the noise's standard deviation.
    - `render_mode`: None, "rgb_array" or "human".

    ## Version History
    - v0: first version, on CartPole-v1.
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
        angle = 2 * self.theta_threshold_radians
        tail = [CONTEXT_BOUND] * self.switcher.num_contexts
        bound = np.array([2 * self.x_threshold, MAX_SPEED, angle, MAX_SPEED, *tail], np.float32)
        self.observation_space = spaces.Box(-bound, bound)
        self.canvas = Canvas((600, 400))
        self.render_mode = render_mode
        self.last_action: int | None = None
        self._apply()

    def _apply(self) -> None:
        setattr(self, ATTRIBUTES[self.switcher.parameter], self.switcher.value)
        self.total_mass = self.masscart + self.masspole
        self.polemass_length = self.masspole * self.length

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        gym.Env.reset(self, seed=seed)
        self.switcher.begin(self.np_random, options, ("low", "high"))
        self._apply()
        self.last_action = None
        start = {name: value for name, value in (options or {}).items() if name != "task"}
        observation, _ = super().reset(options=start or None)
        return self._extend(observation), self.switcher.info()

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        if self.state is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        self.last_action = int(action)
        observation, reward, terminated, truncated, _ = super().step(action)
        self.switcher.count_step()
        self._apply()
        return self._extend(observation), float(reward), terminated, truncated, self.switcher.info()

    def _extend(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        assert isinstance(self.observation_space, spaces.Box)
        cut = np.clip(observation, self.observation_space.low[:4], self.observation_space.high[:4])
        return self.switcher.extend(cut, self.np_random)

    def render(self) -> NDArray[np.uint8] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.render_mode is None:
            gym.logger.warn('render() shows nothing without a render_mode: use render_mode="rgb_array" or "human"')
            return None
        if self.state is None:
            raise gym.error.ResetNeeded("call reset() before render()")
        self.canvas.begin()
        self._draw(float(self.state[0]), float(self.state[2]))
        return self.canvas.show(self.render_mode, self.metadata["render_fps"])

    def _draw(self, position: float, angle: float) -> None:
        canvas, color = self.canvas, CONTEXT_COLORS[self.switcher.context % len(CONTEXT_COLORS)]
        x = 300 + METER * position
        canvas.line((0, RAIL), (600, RAIL), INK, 2)
        for side in (-1, 1):
            edge = 300 + side * METER * self.x_threshold
            canvas.line((edge, RAIL - 18), (edge, RAIL + 18), RED, 3)
        canvas.polygon([(x - 32, RAIL - 18), (x + 32, RAIL - 18), (x + 32, RAIL + 10), (x - 32, RAIL + 10)], INK)
        for side in (-18, 18):
            canvas.circle((x + side, RAIL + 12), 7, FAINT)
        hinge, pole = (x, RAIL - 14), 2 * METER * self.length
        tip = (x + pole * math.sin(angle), hinge[1] - pole * math.cos(angle))
        canvas.line(hinge, tip, color, 26 * self.masspole**0.5 + 3)
        canvas.circle(hinge, 5, FAINT)
        if self.last_action is not None:
            way = 1 if self.last_action == 1 else -1
            start = x + way * 36
            canvas.line((start, RAIL - 4), (start + way * 22, RAIL - 4), RED, 5)
            canvas.polygon(
                [(start + way * 34, RAIL - 4), (start + way * 20, RAIL - 12), (start + way * 20, RAIL + 4)], RED
            )
        canvas.text(f"context {self.switcher.context}: {self.switcher.describe()}", (14, 9), color)
        canvas.text(f"angle {math.degrees(angle):+.1f}°", (586, 9), align="right")

    def close(self) -> None:
        self.canvas.close()
