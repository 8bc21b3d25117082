"""Tasks in sequence: growing pools and single MLPs learn the contexts of RotatedReach one after the other."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from modmoe.analysis import Matrix, MethodRecord, Picture
from modmoe.experiments.rl.film import film
from modmoe.experiments.rl.sequence_methods import METHODS, Method, moe_policy
from modmoe.experiments.rl.sequence_settings import SequenceSettings
from modmoe.growth import count_parameters
from modmoe.rl import MoEActorCriticPolicy

# By name, for modmoe imports no environments: gymnasium.make imports the package before the colon.
SEQUENCE = "modmoe_envs:modmoe/TaskSequence-v0"
TASK = "modmoe/RotatedReach-v0"
FILM_SEED = 7_000_000  # beyond every seed of training
FILM_WIDTH = 240


@dataclass
class SequenceConfig(SequenceSettings):
    """PPO on one task after the other, then again in all of them without learning."""

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        """Run every method with one seed; see `modmoe.experiments.registry.ExperimentConfig`.

        Metrics: ``return`` (mean over tasks in the end), ``return_when_learned`` (of each task right after its own
        training), ``forgetting`` (their difference), ``forward_transfer`` (what earlier tasks gave an untrained one),
        ``parameters`` (all that is kept, densities too), ``seconds`` (of training); of pools ``routing_accuracy``
        (share of the observations that go to their task's expert) and, but for the oracle itself, ``oracle_gap``.
        """
        records: dict[str, MethodRecord] = {}
        for name, method in METHODS.items():
            parameters = int(records["pool_oracle"].metrics["parameters"]) if records else None
            records[name] = run_method(
                self, method, seed, parameters, lambda text, name=name: progress(f"{name}, {text}")
            )
        oracle = records["pool_oracle"].metrics["return"]
        for name in ("pool_learned", "pool_hidden"):
            records[name].metrics["oracle_gap"] = oracle - records[name].metrics["return"]
        return records


def run_method(
    settings: SequenceSettings, method: Method, seed: int, parameters: int | None, progress: Callable[[str], None]
) -> MethodRecord:
    """One method through the sequence.

    Args:
        settings: see there.
        method: of METHODS.
        seed: fixes all randomness; evaluations have seeds of their own, the same in every run.
        parameters: of an MLP, as close as its width allows; pools have the size that the settings say.
        progress: see ``SequenceConfig.run``.
    Raises:
        ValueError: if a method with an MLP is not told its size.
    """
    options = {
        "env_id": TASK,
        "num_tasks": settings.num_tasks,
        "num_contexts": settings.num_tasks,
        "context": method.context,
    }
    env = make_vec_env(SEQUENCE, settings.num_envs, seed=seed, env_kwargs=options)
    stage = gym.make(SEQUENCE, render_mode="rgb_array", **options)
    sequence: Any = stage.unwrapped  # a TaskSequence
    learner = method.make(settings, env, seed, parameters)
    untrained = sequence.evaluate(acting(learner.model), settings.episodes, at_once=True)
    training, rows, seconds = RolloutReturns(), [], 0.0
    for task in range(settings.num_tasks):
        progress(f"task {task + 1} of {settings.num_tasks}")
        start = time.perf_counter()
        env.env_method("set_task", task)
        learner.begin(task)
        learner.model.learn(settings.steps, callback=training)
        seconds += time.perf_counter() - start
        rows.append(sequence.evaluate(acting(learner.model), settings.episodes, at_once=True))
    matrix = np.stack(rows)

    model, found = learner.model, sequence.transfer_metrics(matrix, untrained)
    count = count_parameters(model.policy)
    names = [str(task) for task in range(settings.num_tasks)]
    record = MethodRecord(
        metrics={
            "return": found["average_performance"],
            "return_when_learned": float(matrix.diagonal().mean()),
            "forgetting": found["forgetting"],
            "forward_transfer": found["forward_transfer"],
            "parameters": float(count.total + count.statistics),
            "seconds": seconds,
        },
        matrices={"return": Matrix(matrix, "after task", "task", names, names)},
        series={"training_return": training.means, "return": [float(row.mean()) for row in (untrained, *rows)]},
        about=method.about,
        pictures={"reach": in_turn(stage, model)},
    )
    if isinstance(model.policy, MoEActorCriticPolicy):
        shares = np.stack([expert_shares(model, env, task, settings.rollout) for task in range(settings.num_tasks)])
        experts = [str(expert_id) for expert_id in moe_policy(model).moe.pool.ids]
        record.metrics["routing_accuracy"] = float(shares.diagonal().mean())
        record.matrices["routing"] = Matrix(shares, "task", "expert", names, experts)
    env.close()
    stage.close()
    return record


class RolloutReturns(BaseCallback):
    """The mean return of the episodes that end in each rollout, exploration included; NaN where none does."""

    def __init__(self):
        super().__init__()
        self.means: list[float] = []
        self.ended: list[float] = []

    def _on_step(self) -> bool:
        self.ended += [float(info["episode"]["r"]) for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        self.means.append(float(np.mean(self.ended)) if self.ended else float("nan"))
        self.ended = []


def acting(model: PPO) -> Callable[[Any], Any]:
    """Observation -> action, without exploration."""
    return lambda observation: model.predict(observation, deterministic=True)[0]


def expert_shares(model: PPO, env: VecEnv, task: int, steps: int) -> NDArray[np.float64]:
    """(E,) share of the observations in a task that goes to each expert, while the policy acts without exploring."""
    policy = moe_policy(model)
    (part,) = policy.parts()
    env.env_method("set_task", task)
    observations, loads = env.reset(), np.zeros(policy.moe.pool.num_experts)
    for _ in range(steps):
        actions, _ = model.predict(observations, deterministic=True)  # type: ignore[arg-type]
        obs = obs_as_tensor(observations, policy.device)  # type: ignore[arg-type]
        loads += policy.moe.route(policy.features_of(part, obs), obs).load.numpy()
        observations = env.step(actions)[0]
    return loads / loads.sum()


class InTurn(gym.Wrapper[Any, Any, Any, Any]):
    """An episode of every task, one after the other from the same seed, as if they were one episode."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.seed, self.task = seed, 0
        return self._begin()

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        sequence: Any = self.env.unwrapped
        if (terminated or truncated) and self.task + 1 < sequence.num_tasks:
            self.task += 1
            observation, info = self._begin()
            terminated = truncated = False
        return observation, reward, terminated, truncated, info

    def _begin(self) -> tuple[Any, dict[str, Any]]:
        sequence: Any = self.env.unwrapped
        sequence.set_task(self.task)
        return self.env.reset(seed=self.seed)


def in_turn(stage: gym.Env[Any, Any], model: PPO) -> Picture:
    """A film of one held-out episode in each task."""
    caption = (
        "every task in turn, from the same start to the same goal (ring), after the training on all of them; lower "
        "right: where the action (1, 0) moves the point"
    )
    return film(InTurn(stage), acting(model), caption, seed=FILM_SEED, max_width=FILM_WIDTH)
