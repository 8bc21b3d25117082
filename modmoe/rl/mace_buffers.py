"""MACE's replay memory: one ring of transitions, and which of them teach critics and which teach actors."""

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

PAIR = "mace_pair"  # keys of a step's info, by which the algorithm tells the buffer what it did
NOISY = "mace_noisy"


class PairSamples(NamedTuple):
    """A batch of transitions; ``pairs`` holds the stable id of the pair that acted."""

    observations: Tensor  # (B, *obs_shape)
    actions: Tensor  # (B, A) as executed, scaled to [-1, 1]
    next_observations: Tensor  # (B, *obs_shape)
    dones: Tensor  # (B,) float, 1 where the episode ended by a fall; a time limit is no fall
    rewards: Tensor  # (B,)
    pairs: Tensor  # (B,) int64


class PairReplayBuffer(ReplayBuffer):
    """A replay buffer whose transitions belong to the critic buffer or to the actor buffer.

    A transition with a noisy action (exploration noise, or a random base action) goes to the actor buffer. Every other
    one goes to the critic buffer, also where the pair was not the one of highest value. Both are sets of places in one
    ring, so that a transition is overwritten after ``buffer_size`` newer ones, whatever their kind.

    Args:
        buffer_size: transitions of all environments together.
        observation_space: of the environment; no dict.
        action_space: Box.
        device: of the samples.
        n_envs: environments that step together.
        optimize_memory_usage: not supported.
        handle_timeout_termination: as in :class:`stable_baselines3.common.buffers.ReplayBuffer`.
    Raises:
        ValueError: on ``optimize_memory_usage``.
    Source:
        Peng, Berseth, van de Panne 2016, section 5 (actor and critic buffers); the pending actor batch as in the
        authors' published code.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
    ):
        if optimize_memory_usage:
            raise ValueError("MACE's buffer does not know optimize_memory_usage")
        super().__init__(
            buffer_size,
            observation_space,
            action_space,
            device,
            n_envs=n_envs,
            handle_timeout_termination=handle_timeout_termination,
        )
        places = self.buffer_size * self.n_envs
        self.pairs = np.zeros((self.buffer_size, self.n_envs), dtype=np.int64)
        self.critic = PlaceSet(places)
        self.actor = PlaceSet(places)
        self.pending: list[int] = []  # places that passed the CACLA condition and wait for a full batch

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Store one step of all environments; ``infos`` say the acting pair and whether the action was noisy."""
        first = self.pos * self.n_envs
        if self.full:
            self._discard(range(first, first + self.n_envs))
        self.pairs[self.pos] = [info[PAIR] for info in infos]
        super().add(obs, next_obs, action, reward, done, infos)
        for offset, info in enumerate(infos):
            (self.actor if info[NOISY] else self.critic).add(first + offset)

    def draw_critic(self, batch_size: int, rng: np.random.Generator) -> np.ndarray | None:
        """(batch_size,) places of the critic buffer, drawn with replacement; None while it holds fewer."""
        return self.critic.draw(batch_size, rng) if len(self.critic) >= batch_size else None

    def draw_actor(self, batch_size: int, rng: np.random.Generator) -> np.ndarray:
        """Up to batch_size places of the actor buffer, each once, without those that are pending already."""
        drawn = self.actor.draw(min(batch_size, len(self.actor)), rng).tolist()
        waiting = set(self.pending)
        return np.array([place for place in dict.fromkeys(drawn) if place not in waiting], dtype=np.int64)

    def take_pending(self, batch_size: int) -> np.ndarray | None:
        """(batch_size,) places that have waited longest, no longer pending then; None while there are fewer."""
        if len(self.pending) < batch_size:
            return None
        taken, self.pending = self.pending[:batch_size], self.pending[batch_size:]
        return np.array(taken, dtype=np.int64)

    def at(self, places: np.ndarray, env: VecNormalize | None = None) -> PairSamples:
        """The transitions at given places; normalised if an environment is given that does so."""
        step, column = np.divmod(places, self.n_envs)
        observations = self._normalize_obs(self.observations[step, column], env)
        next_observations = self._normalize_obs(self.next_observations[step, column], env)
        fell = self.dones[step, column] * (1 - self.timeouts[step, column])
        return PairSamples(
            observations=self.to_torch(np.asarray(observations)),
            actions=self.to_torch(self.actions[step, column]),
            next_observations=self.to_torch(np.asarray(next_observations)),
            dones=self.to_torch(fell),
            rewards=self.to_torch(self._normalize_reward(self.rewards[step, column], env)),
            pairs=self.to_torch(self.pairs[step, column]),
        )

    def forget(self, pairs: list[int]) -> None:
        """Leave out the transitions of pairs that were removed."""
        stored = np.arange(self.size() * self.n_envs)
        self._discard(stored[np.isin(self.pairs.reshape(-1)[: len(stored)], pairs)].tolist())

    def _discard(self, places: range | list[int]) -> None:
        for place in places:
            self.critic.discard(place)
            self.actor.discard(place)
        if self.pending:
            gone = set(places)
            self.pending = [place for place in self.pending if place not in gone]


class PlaceSet:
    """A set of places in [0, capacity) from which one can draw: constant time for each operation."""

    def __init__(self, capacity: int):
        self._members = np.empty(capacity, dtype=np.int64)
        self._position = np.full(capacity, -1, dtype=np.int64)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, place: int) -> bool:
        return bool(self._position[place] >= 0)

    def add(self, place: int) -> None:
        if place not in self:
            self._members[self._size] = place
            self._position[place] = self._size
            self._size += 1

    def discard(self, place: int) -> None:
        """Take it out if it is there; the last member takes its position."""
        if place in self:
            self._size -= 1
            last, hole = self._members[self._size], self._position[place]
            self._members[hole] = last
            self._position[last] = hole
            self._position[place] = -1

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count,) int64 members, uniformly with replacement; none from an empty set."""
        if not self._size:
            return np.empty(0, dtype=np.int64)
        return self._members[rng.integers(self._size, size=count)]
