"""Small models and environments that the tests of policies share."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv

from modmoe.rl import MoEActorCriticPolicy, MoEDQNPolicy, MoEPolicy, MoESACPolicy, MoETD3Policy

ON_POLICY = {"n_steps": 16, "batch_size": 16, "n_epochs": 2}
OFF_POLICY = {"learning_starts": 16, "buffer_size": 200, "batch_size": 16, "train_freq": 4, "gradient_steps": 2}
ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], type[MoEPolicy], dict[str, Any], bool]] = {
    "ppo": (PPO, MoEActorCriticPolicy, ON_POLICY, True),
    "ppo_discrete": (PPO, MoEActorCriticPolicy, ON_POLICY, False),
    "a2c": (A2C, MoEActorCriticPolicy, {"n_steps": 8}, True),
    "sac": (SAC, MoESACPolicy, OFF_POLICY, True),
    "td3": (TD3, MoETD3Policy, OFF_POLICY, True),
    "dqn": (DQN, MoEDQNPolicy, {**OFF_POLICY, "target_update_interval": 8, "tau": 0.5}, False),
}


class ReachEnv(gym.Env):
    """Push a point to a goal in 8 steps; the goal's side is the task, which the last two numbers tell (one-hot).

    Args:
        task: 0 or 1.
        continuous: whether actions are forces in [-2, 2]^2, or one of four directions.
        observe: "flat", "dict" or "image".
    """

    def __init__(self, task: int = 0, continuous: bool = True, observe: str = "flat"):
        self.task, self.observe = task, observe
        flat = spaces.Box(-10, 10, (4,), np.float32)
        image = spaces.Box(0, 255, (36, 36, 1), np.uint8)
        both = spaces.Dict({"where": spaces.Box(-10, 10, (2,), np.float32), "task": spaces.Box(0, 1, (2,), np.float32)})
        self.observation_space = {"flat": flat, "dict": both, "image": image}[observe]
        self.action_space = spaces.Box(-2, 2, (2,), np.float32) if continuous else spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.where = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        self.steps = 0
        return self._observation(), {"context": self.task}

    def step(self, action):
        moves = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
        move = action / 2 if isinstance(self.action_space, spaces.Box) else moves[int(action)]
        self.where = np.clip(self.where + 0.3 * move, -3, 3).astype(np.float32)
        self.steps += 1
        goal = np.array([1.0, 0.0] if self.task == 0 else [-1.0, 0.0])
        reward = -float(np.abs(self.where - goal).sum())
        return self._observation(), reward, False, self.steps == 8, {"context": self.task}

    def _observation(self):
        task = np.eye(2, dtype=np.float32)[self.task]
        if self.observe == "dict":
            return {"where": self.where.copy(), "task": task}
        if self.observe == "image":
            return np.full((36, 36, 1), 100 * self.task + 50, np.uint8)
        return np.concatenate([self.where, task]).astype(np.float32)


@pytest.fixture
def envs() -> Callable[..., DummyVecEnv]:
    def build(n: int = 2, **options: Any) -> DummyVecEnv:
        env = DummyVecEnv([lambda: gym.wrappers.RecordEpisodeStatistics(ReachEnv(**options)) for _ in range(n)])
        env.seed(0)
        return env

    return build


@pytest.fixture
def make(envs) -> Callable[..., BaseAlgorithm]:
    """A model by its short name: make("sac", router="dense"); names that start with ``alg_`` go to the algorithm."""

    def build(name: str, env: DummyVecEnv | None = None, seed: int = 0, **options: Any) -> BaseAlgorithm:
        algorithm, policy, settings, continuous = ALGORITHMS[name]
        env = envs(continuous=continuous) if env is None else env
        own = {key.removeprefix("alg_"): value for key, value in options.items() if key.startswith("alg_")}
        kwargs = {"num_experts": 2, "hidden_features": 8, "router": "dense"}
        kwargs |= {key: value for key, value in options.items() if not key.startswith("alg_")}
        kwargs.setdefault("optimizer_class", torch.optim.AdamW)
        kwargs.setdefault("optimizer_kwargs", {"weight_decay": 0.1})
        return algorithm(policy, env, policy_kwargs=kwargs, seed=seed, device="cpu", **{**settings, **own})  # type: ignore[call-arg]

    return build
