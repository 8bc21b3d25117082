"""MACE on LeapTerrain, beside one pair, pairs without a start, fixed actors, and PPO with and without pairs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modmoe.analysis import Matrix, MethodRecord, Picture, mutual_information
from modmoe.experiments.rl.film import film
from modmoe.experiments.rl.mace_settings import ENV, SINGLE, MaceSettings, Method, make_learner
from modmoe.rl import MACEPolicy, MoEActorCriticPolicy

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

# Seeds of courses: learners train on small ones. A choice never sees the courses of the test.
FIRST_TEST, FIRST_CHOICE, FIRST_CHOICE_RUN = 1_000_000, 2_000_000, 100_000
CURVE_POINTS = 8
TERRAINS = ["open", "gap", "wall", "step"]

ABOUT = {
    "mace_k3": "MACE: three actor-critic pairs, started at weak leaps of their own, chosen by their critics",
    "mace_k1": "MACE with one pair of as many parameters",
    "mace_k3_no_bias": "three pairs that all start at the middle of the action space",
    "mace_k3_frozen_actors": "three pairs whose actors stay at their weak leaps: only the choice is learned",
    "ppo": "Stable-Baselines3's PPO with its plain policy, of as many parameters",
    "mace_ppo": "PPO over three actor-critic pairs that start as those of 'mace_k3', mixed by a softmax gate",
    "bound_weak": "no learner: the best choice among the weak leaps, knowing the course four leaps beyond the next",
    "bound_constant": "no learner: the one action that gets furthest on these very courses",
    "bound_grid": "no learner: the best choice from a grid of 169 actions, knowing the course one leap beyond the next",
}


@dataclass
class MaceConfig(MaceSettings):
    """Leaps over gaps, walls and steps: what pairs, their starts and their learning are each worth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # what is the same for every seed of a run
        self._choices: dict[Method, Choice] = {}
        self._bounds: dict[str, float] = {}

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        """Run every method with one seed; see `modmoe.experiments.registry.ExperimentConfig`."""
        records = {}
        for method in self.methods:
            choice = self.choose_bias(method, progress) if method in SINGLE else None
            progress(method)
            records[method] = self.train(method, seed, choice)
        progress("bounds")
        for name, distance in self.bounds().items():
            records[name] = MethodRecord({"distance": distance}, about=ABOUT[name])
        return records

    def train(self, method: Method, seed: int, choice: "Choice | None") -> MethodRecord:
        """Train one method and test it on fresh courses.

        Args:
            method: which one.
            seed: of the training.
            choice: where its only actor starts; None where there are several.
        """
        model = make_learner(self, method, seed, choice.bias if choice else None)
        curve, seconds = learn(model, self.leaps, lambda: float(walk(model, FIRST_TEST, self.courses).distance.mean()))
        walks = walk(model, FIRST_TEST, self.courses)
        distance = float(walks.distance.mean())
        record = MethodRecord({"distance": distance}, series={"distance": [*curve, distance]})
        record.metrics |= {"parameters": float(num_parameters(model)), "seconds": seconds}
        record.about = ABOUT[method]
        if choice is not None:
            record.about += f", started at {choice.bias}"
            if choice.distances is not None:
                record.about += f", the best of {len(self.candidates)} starts on other courses"
                record.matrices["choice of the start"] = choice.distances
        if walks.shares.shape[1] > 1:
            joint = joint_of(walks)
            record.metrics["mutual_information"] = mutual_information(joint, normalize=True)
            names = [f"expert {position}" for position in range(joint.shape[1])]
            usage = (joint / joint.sum(1, keepdim=True)).numpy()
            record.matrices["routing"] = Matrix(usage, "terrain", "expert", TERRAINS, names)
        record.pictures["leaps"] = self.film(model, method, walks.distance[0])
        return record

    def choose_bias(self, method: Method, progress: Callable[[str], None]) -> "Choice":
        """Where an actor should start: the candidate with which trainings of their own get furthest.

        Made once, the same for every seed of a run. Neither the seeds of these trainings nor the courses on which they
        are compared are used again.
        """
        if len(self.candidates) == 1:
            return Choice(self.candidates[0], None)
        if method not in self._choices:
            distances = np.zeros((len(self.candidates), self.choice_runs))
            for row, run in np.ndindex(*distances.shape):
                progress(f"{method} from {self.candidates[row]}")
                model = make_learner(self, method, FIRST_CHOICE_RUN + run, self.candidates[row])
                model.learn(self.leaps)
                distances[row, run] = walk(model, FIRST_CHOICE, self.courses).distance.mean()
            best = self.candidates[int(distances.mean(1).argmax())]
            runs = [f"run {run}" for run in range(self.choice_runs)]
            table = Matrix(distances, "initial action", "distance", [str(bias) for bias in self.candidates], runs)
            self._choices[method] = Choice(best, table)
        return self._choices[method]

    def bounds(self) -> dict[str, float]:
        """Mean distances on the test's courses without learning, by lookahead; computed once."""
        import gymnasium as gym

        if not self._bounds:
            seeds = range(FIRST_TEST, FIRST_TEST + self.courses)
            found = gym.make(ENV).get_wrapper_attr("bounds")(self.biases, seeds)
            self._bounds = {f"bound_{name}": float(distances.mean()) for name, distances in found.items()}
        return self._bounds

    def film(self, model: "BaseAlgorithm", method: str, distance: float) -> Picture:
        """The trained policy on the first course of the test."""
        import gymnasium as gym

        env = gym.make(ENV, render_mode="rgb_array")
        caption = f"{method} on the first course of the test: {distance:.1f} of 50 m"
        return film(env, lambda observation: model.predict(observation, deterministic=True)[0], caption, FIRST_TEST)


class Choice(NamedTuple):
    """A bias, and the distances (candidates, runs) by which it was chosen; None where there was no choice."""

    bias: list[float]
    distances: Matrix | None


class Walks(NamedTuple):
    """What a policy did on some courses.

    Args:
        distance: (n,) metres.
        terrain: (N,) int64, what the body stood before at each of its leaps on all courses.
        shares: (N, E) how much each expert had in that leap; no columns where there are no experts.
    """

    distance: np.ndarray
    terrain: Tensor
    shares: Tensor


def learn(model: "BaseAlgorithm", leaps: int, test: Callable[[], float]) -> tuple[list[float], float]:
    """Train a model.

    Args:
        model: untrained.
        leaps: how long.
        test: called at equal distances on the way, not at the end.
    Returns:
        What the tests gave, and the seconds of training without them.
    """
    curve, testing = [], 0.0

    def watch(*_) -> bool:
        nonlocal testing
        if model.num_timesteps < leaps and model.num_timesteps * CURVE_POINTS // leaps > len(curve):
            begun = time.perf_counter()
            curve.append(test())
            testing += time.perf_counter() - begun
        return True

    start = time.perf_counter()
    model.learn(leaps, callback=watch)
    return curve, time.perf_counter() - start - testing


def walk(model: "BaseAlgorithm", first_seed: int, courses: int) -> Walks:
    """Run a policy, without exploration, over courses side by side."""
    import gymnasium as gym

    env = gym.make_vec(ENV, num_envs=courses, vectorization_mode="vector_entry_point")
    observations, info = env.reset(seed=list(range(first_seed, first_seed + courses)))  # type: ignore[arg-type]
    distance, running = info["distance"], np.ones(courses, np.bool_)
    terrain, shares = [], []
    while running.any():
        terrain.append(torch.as_tensor(info["terrain"][running]))
        shares.append(expert_shares(model, observations[running]))
        actions, _ = model.predict(observations, deterministic=True)
        observations, _, terminated, truncated, info = env.step(actions)
        distance = np.where(running, info["distance"], distance)
        running &= ~(terminated | truncated)
    return Walks(distance, torch.cat(terrain), torch.cat(shares))


@torch.no_grad()
def expert_shares(model: "BaseAlgorithm", observations: np.ndarray) -> Tensor:
    """(B, E): each expert's part in the deterministic action; no columns for a policy without experts."""
    policy = model.policy
    seen, _ = policy.obs_to_tensor(observations)
    if isinstance(policy, MACEPolicy):
        values = policy.net.values(seen)
        return torch.nn.functional.one_hot(values.argmax(1), values.shape[1]).double()
    if isinstance(policy, MoEActorCriticPolicy):
        features = policy.extract_features(seen, policy.features_extractor)
        assert isinstance(features, Tensor)
        return policy.moe.route(features, seen).matrix().double()
    return torch.zeros(len(observations), 0, dtype=torch.float64)


def joint_of(walks: Walks) -> Tensor:
    """(terrains, E): the joint distribution of the terrain before a leap and the expert that leaps."""
    terrain = torch.nn.functional.one_hot(walks.terrain, len(TERRAINS)).double()
    return terrain.T @ walks.shares / len(terrain)


def num_parameters(model: "BaseAlgorithm") -> int:
    """What is trained; a target network is a copy."""
    policy = model.policy
    return sum(
        parameter.numel() for parameter in (policy.net if isinstance(policy, MACEPolicy) else policy).parameters()
    )
