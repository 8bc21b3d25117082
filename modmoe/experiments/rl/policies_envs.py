"""The environments of a comparison: made by name, with their contexts in sight, checked before any training."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from modmoe.errors import MissingExtraError
from modmoe.experiments.keys import UsageError
from modmoe.experiments.rl.policies_settings import NEEDS_CONTEXTS, PoliciesSettings

HELD_OUT = 1_000_000  # evaluation uses the seeds from here on
EXTRAS = ("box2d", "mujoco", "metaworld")

Env = gym.Env[Any, Any]


class OneHotContext(gym.ObservationWrapper[Any, Any, Any]):
    """Append which of K contexts an environment stands for to its observations, and put it into its infos.

    Args:
        env: with flat observations.
        context: its number, from 0.
        num_contexts: K.
    Raises:
        UsageError: on other observations.
    """

    def __init__(self, env: Env, context: int, num_contexts: int):
        super().__init__(env)
        space = env.observation_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise UsageError(f"contexts are appended to flat observations, those of {env} are in {space}")
        self.context = context
        self.one_hot = np.eye(num_contexts, dtype=space.dtype)[context]
        low, high = np.zeros_like(self.one_hot), np.ones_like(self.one_hot)
        bounds = np.concatenate([space.low, low]), np.concatenate([space.high, high])
        self.observation_space = spaces.Box(*bounds, dtype=space.dtype.type)  # type: ignore[union-attr]

    def observation(self, observation: Any) -> Any:
        return np.concatenate([observation, self.one_hot])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        return observation, {**info, "context": self.context}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, {**info, "context": self.context}


class InTurn(gym.Env[Any, Any]):
    """Each context for some steps, one after the other, as one long episode for a film.

    Args:
        envs: one for each context, with ``render_mode="rgb_array"``.
        options: of each one's reset.
        steps: of a context at most; an episode that ends earlier ends the context's turn.
    """

    def __init__(self, envs: list[Env], options: list[dict[str, Any] | None], steps: int):
        self.envs, self.options, self.steps = envs, options, steps
        self.render_mode = envs[0].render_mode
        self.metadata = envs[0].metadata
        self.turn, self.count = 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.turn, self.count, self.seed = 0, 0, seed
        return self.envs[0].reset(seed=seed, options=self.options[0])

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.envs[self.turn].step(action)
        self.count += 1
        if not (terminated or truncated or self.count >= self.steps):
            return observation, reward, False, False, info
        if self.turn + 1 == len(self.envs):
            return observation, reward, terminated, True, info
        self.turn, self.count = self.turn + 1, 0
        observation, info = self.envs[self.turn].reset(seed=self.seed, options=self.options[self.turn])
        return observation, reward, False, False, info

    def render(self) -> Any:
        return self.envs[self.turn].render()


def make_env(config: PoliciesSettings, context: int | None = None, draw: bool = False) -> Env:
    """One environment.

    Args:
        config: the settings.
        context: of ``config.contexts``; ignored where the environment has its own, and where there is none.
        draw: whether it is to be rendered.
    Raises:
        MissingExtraError: if a library that it needs is not installed; the message holds the command.
        UsageError: if there is no such environment, or it does not take these arguments.
    """
    kwargs = dict(config.env_kwargs)
    if config.contexts:
        kwargs |= config.contexts[context or 0]
    if draw:
        kwargs["render_mode"] = "rgb_array"
    try:
        # the checker is for who writes an environment, and takes time in each step
        env = gym.make(config.env, disable_env_checker=True, **kwargs)
    except (gym.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        text = f"{config.env} {error}".lower()
        extra = next((name for name in EXTRAS if name in text), None)
        how = f"Install it with: pip install 'modmoe[{extra}]'" if extra else str(error)
        raise MissingExtraError(f"{config.env} needs a library that is not installed. {how}") from error
    except (gym.error.Error, TypeError, ValueError) as error:
        raise UsageError(f"{config.env} cannot be made with {kwargs}: {error}") from error
    return OneHotContext(env, context or 0, len(config.contexts)) if config.contexts else env


def make_training_envs(config: PoliciesSettings) -> DummyVecEnv:
    """``num_envs`` of them; listed contexts take turns."""

    def make(index: int) -> Env:
        return Monitor(make_env(config, index % len(config.contexts) if config.contexts else None))

    return DummyVecEnv([lambda index=index: make(index) for index in range(config.num_envs)])


def make_each_context(config: PoliciesSettings, draw: bool = False) -> tuple[list[Env], list[dict[str, Any] | None]]:
    """One environment for each context, or one in all, and the options of a reset that choose the context."""
    count = max(1, config.context_width)
    options = [{"task": context} if config.num_contexts else None for context in range(count)]
    return [make_env(config, context, draw) for context in range(count)], options


def check_environments(config: PoliciesSettings) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
    """Make, reset and draw an environment of each context, so that what is wrong is said before hours of training.

    Args:
        config: the settings.
    Returns:
        The spaces of observations and actions.
    Raises:
        MissingExtraError: as make_env.
        UsageError: as make_env; if contexts differ in their spaces, cannot be drawn, or are not to be seen where a
            method reads them.
    """
    envs, options = make_each_context(config, draw=config.film)
    first = envs[0]
    readers = [name for name in NEEDS_CONTEXTS if name in config.methods]
    for context, (env, option) in enumerate(zip(envs, options, strict=True)):
        if (env.observation_space.shape, env.action_space) != (first.observation_space.shape, first.action_space):
            raise UsageError(f"the contexts 0 and {context} of {config.env} differ in their observations or actions")
        try:
            observation, _ = env.reset(seed=HELD_OUT, options=option)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{config.env} has no context {context} that a reset can choose: {error}") from error
        width = config.context_width
        if readers and not np.array_equal(np.asarray(observation)[..., -width:], np.eye(width)[context]):
            raise UsageError(
                f"{readers} read the context from the last {width} numbers of an observation, as one of {width}; in "
                f"context {context} of {config.env} they are {np.asarray(observation)[..., -width:]}"
            )
        if config.film:
            _check_drawing(config, env)
    for env in envs:
        env.close()
    return first.observation_space, first.action_space


def _check_drawing(config: PoliciesSettings, env: Env) -> None:
    hint = "set film to false (for MuJoCo without a display: set MUJOCO_GL to egl or osmesa)"
    try:
        frame = env.render()
    except Exception as error:  # OpenGL's bindings raise errors of many kinds
        raise UsageError(f"{config.env} cannot be drawn here ({error}): {hint}") from error
    if not isinstance(frame, np.ndarray):
        raise UsageError(f"{config.env} cannot be drawn: {hint}")
