"""Mixture policies beside plain ones of the same size, on one environment with one seed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor, safe_mean

from modmoe.analysis import Matrix, MethodRecord, Picture, mutual_information
from modmoe.experiments.rl.film import film
from modmoe.experiments.rl.policies_envs import (
    HELD_OUT,
    Env,
    InTurn,
    check_environments,
    make_each_context,
    make_training_envs,
)
from modmoe.experiments.rl.policies_methods import describe, equal_sizes, make_model, num_parameters
from modmoe.experiments.rl.policies_settings import Method, PoliciesSettings
from modmoe.rl import MoEPolicy

CURVE_POINTS = 20
FRAMES = 180  # of a film; its contexts share them
FILM_WIDTH = 280


@dataclass
class PoliciesConfig(PoliciesSettings):
    """Mixture policies and plain ones of equal size, trained alike and judged on episodes that no training saw."""

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        """Run every method with one seed; see `modmoe.experiments.registry.ExperimentConfig`."""
        sizes = equal_sizes(self, *check_environments(self))
        records: dict[str, MethodRecord] = {}
        for method, hidden in sizes.items():
            progress(method)
            records[method] = run_method(self, method, hidden, seed)
        return records


def run_method(config: PoliciesSettings, method: Method, hidden: int, seed: int) -> MethodRecord:
    """Train a method and judge it.

    Args:
        config: the settings.
        method: one of ``config.methods``.
        hidden: units in each of its two hidden layers.
        seed: of the training; the episodes of the evaluation are the same for all seeds.
    Returns:
        ``return`` is the mean over all held-out episodes, acting without noise; ``success`` is given where infos
        have it. ``training_return`` is the mean of the learning curve: who is at the ceiling in the end may have been
        there sooner. ``parameters`` are those that are trained. ``seconds`` are of the training alone.
    """
    envs = make_training_envs(config)
    model = make_model(method, config, envs, hidden, seed)
    curve = ReturnCurve(config.timesteps)
    start = time.perf_counter()
    model.learn(config.timesteps, callback=curve)
    seconds = time.perf_counter() - start
    envs.close()

    played = play(config, model)
    metrics = {"return": float(np.mean(played.returns))}
    if config.context_width:
        metrics |= {f"return/context_{context}": float(np.mean(row)) for context, row in enumerate(played.returns)}
    if played.successes is not None:
        metrics["success"] = float(np.mean(played.successes))
    metrics |= {
        "training_return": curve.mean(),
        "parameters": float(num_parameters(model.policy)),
        "seconds": seconds,
        "steps_per_second": model.num_timesteps / seconds,
    }
    record = MethodRecord(metrics, series={"training_return": curve.means}, about=describe(method, config, hidden))
    if method in ("moe", "moe_oracle") and config.context_width:
        joint, names = context_by_expert(model, played, config.context_width)
        record.metrics["mutual_information"] = mutual_information(joint)
        share = joint / joint.sum(1, keepdims=True).clip(min=1e-12)
        contexts = [f"context {context}" for context in range(config.context_width)]
        record.matrices["routing"] = Matrix(share, "context", "expert", contexts, names)
    if config.film:
        record.pictures["policy"] = film_policy(config, model)
    return record


class ReturnCurve(BaseCallback):
    """The mean return of the last episodes in training, with the noise of exploration, at 20 points of the run.

    Args:
        timesteps: of the run.
    """

    def __init__(self, timesteps: int):
        super().__init__()
        self.every = max(1, timesteps // CURVE_POINTS)
        self.means: list[float] = []

    def _on_step(self) -> bool:
        while self.num_timesteps >= (len(self.means) + 1) * self.every and len(self.means) < CURVE_POINTS:
            # nan as long as no episode is over
            self.means.append(float(safe_mean([episode["r"] for episode in self.model.ep_info_buffer or []])))
        return True

    def mean(self) -> float:
        """Of the curve, from the first episode that was over; nan if none was."""
        known = [value for value in self.means if np.isfinite(value)]
        return float(np.mean(known)) if known else float("nan")


class Played(NamedTuple):
    """What was seen in held-out episodes.

    Args:
        returns: (contexts, episodes).
        successes: of the same shape, 0 or 1; None where no info tells.
        observations: (N, D), what was acted on.
        contexts: (N,) the context at that time; 0 where there is none.
    """

    returns: np.ndarray
    successes: np.ndarray | None
    observations: np.ndarray
    contexts: np.ndarray


class Lane:
    """The held-out episodes of one context, one after the other."""

    def __init__(self, env: Env, options: dict[str, Any] | None, episodes: int):
        self.env, self.options, self.episodes = env, options, episodes
        self.returns: list[float] = []
        self.successes: list[float] = []
        self.observation: Any = None
        self.context = 0
        self._begin()

    @property
    def over(self) -> bool:
        return len(self.returns) == self.episodes

    def step(self, action: Any) -> None:
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        self.context = info.get("context", 0)
        self.total += float(reward)
        if "success" in info:
            self.success = max(self.success or 0.0, float(info["success"]))
        if terminated or truncated:
            self.returns.append(self.total)
            if self.success is not None:
                self.successes.append(self.success)
            if not self.over:
                self._begin()

    def _begin(self) -> None:
        self.observation, info = self.env.reset(seed=HELD_OUT + len(self.returns), options=self.options)
        self.context = info.get("context", 0)
        self.total, self.success = 0.0, None


def play(config: PoliciesSettings, model: BaseAlgorithm) -> Played:
    """Play the held-out episodes of all contexts, acting by the mean or the most likely action."""
    envs, options = make_each_context(config)
    lanes = [Lane(env, chosen, config.evaluation_episodes) for env, chosen in zip(envs, options, strict=True)]
    observations, contexts = [], []
    while active := [lane for lane in lanes if not lane.over]:
        observations.append(np.stack([lane.observation for lane in active]))
        contexts += [lane.context for lane in active]
        actions, _ = model.predict(observations[-1], deterministic=True)
        for lane, action in zip(active, actions, strict=True):
            lane.step(action)
    for env in envs:
        env.close()
    successes = np.array([lane.successes for lane in lanes]) if all(lane.successes for lane in lanes) else None
    return Played(
        np.array([lane.returns for lane in lanes]), successes, np.concatenate(observations), np.array(contexts)
    )


def context_by_expert(model: BaseAlgorithm, played: Played, num_contexts: int) -> tuple[np.ndarray, list[str]]:
    """p(c, e), (contexts, E): the weight of experts in the states of each context, all contexts alike; and names.

    Of the actor, where it is routed by itself.
    """
    policy = model.policy
    assert isinstance(policy, MoEPolicy)
    part = policy.parts()[0]
    obs = obs_as_tensor(played.observations, policy.device)
    assert isinstance(obs, torch.Tensor)
    with torch.no_grad():
        weights = part.network.route(policy.features_of(part, obs.float()), obs).matrix().double().cpu().numpy()
    joint = np.zeros((num_contexts, weights.shape[1]))
    np.add.at(joint, played.contexts, weights)
    # a context in which episodes last longer does not count for more
    joint /= joint.sum(1, keepdims=True).clip(min=1e-12)
    return joint / joint.sum(), [f"expert {expert_id}" for expert_id in part.network.pool.ids]


def film_policy(config: PoliciesSettings, model: BaseAlgorithm) -> Picture:
    """The trained policy in each context in turn."""
    envs, options = make_each_context(config, draw=True)
    in_turn = InTurn(envs, options, FRAMES // len(envs))
    caption = "one held-out episode of each context, cut" if config.context_width else "a held-out episode, cut"
    picture = film(
        in_turn,
        lambda observation: model.predict(observation, deterministic=True)[0],
        caption,
        seed=HELD_OUT,
        max_frames=FRAMES + 1,
        max_width=FILM_WIDTH,
    )
    for env in envs:
        env.close()
    return picture
