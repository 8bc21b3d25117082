"""MACE: a mixture of actor-critic experts that learns from replay, on Stable-Baselines3."""

from typing import Any, ClassVar, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, RolloutReturn, Schedule
from torch import Tensor

from modmoe.rl.mace_buffers import NOISY, PAIR, PairReplayBuffer, PairSamples
from modmoe.rl.mace_growth import GrowingPairs
from modmoe.rl.mace_policy import MACEPolicy
from modmoe.rl.mace_rules import Decay, anneal, boltzmann_probabilities, critic_target, improves


class MACE(GrowingPairs):
    """K actor-critic pairs, a Boltzmann choice between them by their critics, and CACLA updates of their actors.

    With V' of the target network, on every update

    - critic of the pair i that acted, from the critic buffer: V_i(s) -> y = (1-g) r + g max_j V'_j(s'),
      and y = (1-g) r on a fall (an episode that terminated);
    - actor of the pair i that acted, from the actor buffer: A_i(s) -> the executed action, where
      y > max_j V'_j(s) (CACLA); such transitions are gathered until they fill a batch.

    Values are in units of the reward, whatever g. Random numbers come from a generator of the algorithm's own, which is
    saved with it: a run that is saved with its replay buffer and loaded goes on as if it had never stopped, if its
    environments stand where they stood (``MACE.load(path, env, force_reset=False)``).

    Args:
        policy: "MlpPolicy" or :class:`MACEPolicy`, which takes K, biases and sizes by ``policy_kwargs``.
        env: with a Box action space and any observations but dicts; several environments may step together.
        learning_rate: a number, or a function of the remaining progress.
        buffer_size: transitions in the replay memory.
        learning_starts: transitions before the first update; exploration is that of the start until then.
        batch_size: transitions in a critic's update, and in an actor's.
        gamma: g.
        train_freq: steps of the environments between updates, as in SB3.
        gradient_steps: updates each time.
        target_update_interval: updates between copies to the target network.
        anneal_updates: updates over which the three following go from their first value to their second.
        temperature: of the Boltzmann choice.
        noise_probability: that Gaussian noise is added to an action.
        base_action_probability: that a random pair's hand-made controller acts instead of its actor (where the policy
            has no biases: a uniform action).
        noise_std: of the noise, in units of half the action space's range.
        temperature_decay: "linear" or "geometric".
        critic_weight: of the critics' squared error beside the actors', which is summed over action parameters.
        update_actors: False leaves the actors as they started: only the choice between them is learned.
        policy_kwargs: see :class:`MACEPolicy`.
        seed: as in SB3, and of the algorithm's generator. The arguments around it are SB3's.
    Raises:
        ValueError: on another action space, dict observations, or arguments out of range.
    Source:
        Peng, Berseth, van de Panne 2016, "Terrain-Adaptive Locomotion Skills Using Deep Reinforcement Learning",
        algorithm 1; what the paper leaves open (annealing per update, 32 transitions for an update, critics that start
        at .5 and weigh 4, noise on no base action) as in the authors' published settings. Different here: both losses
        are one step of one optimizer, where they take two; noise is added to actions only, where they also disturb a
        layer.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MACEPolicy}

    def __init__(
        self,
        policy: str | type[MACEPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        buffer_size: int = 500_000,
        learning_starts: int = 50_000,
        batch_size: int = 32,
        gamma: float = 0.9,
        train_freq: int | tuple[int, str] = 32,
        gradient_steps: int = 1,
        target_update_interval: int = 500,
        anneal_updates: int = 50_000,
        temperature: tuple[float, float] = (20.0, 0.025),
        noise_probability: tuple[float, float] = (0.9, 0.2),
        base_action_probability: tuple[float, float] = (0.9, 0.002),
        noise_std: float = 0.2,
        temperature_decay: Decay = "linear",
        critic_weight: float = 4.0,
        update_actors: bool = True,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        device: torch.device | str = "auto",
        seed: int | None = None,
        _init_setup_model: bool = True,
    ):
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            replay_buffer_class=PairReplayBuffer,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            support_multi_env=True,
        )
        if env is not None and not isinstance(self.action_space, spaces.Box):
            raise ValueError(f"MACE's actors give action parameters: a Box is needed, got {self.action_space}")
        if env is not None and isinstance(self.observation_space, spaces.Dict):
            raise ValueError("MACE's replay memory holds no dict observations: flatten them")
        if temperature_decay not in ("linear", "geometric"):
            raise ValueError(f"temperature_decay is 'linear' or 'geometric', got {temperature_decay!r}")
        if min(temperature) <= 0 or min(target_update_interval, anneal_updates, batch_size) < 1:
            raise ValueError(
                f"temperatures are above 0, and target_update_interval, anneal_updates and batch_size at least 1: got "
                f"{temperature}, {target_update_interval}, {anneal_updates}, {batch_size}"
            )
        if not all(0 <= p <= 1 for p in (*noise_probability, *base_action_probability, gamma)):
            raise ValueError(
                f"probabilities and gamma are in [0, 1], got {noise_probability}, {base_action_probability}, {gamma}"
            )
        self.target_update_interval = target_update_interval
        self.anneal_updates = anneal_updates
        self.temperature = temperature
        self.noise_probability = noise_probability
        self.base_action_probability = base_action_probability
        self.noise_std = noise_std
        self.temperature_decay: Decay = temperature_decay
        self.critic_weight = critic_weight
        self.update_actors = update_actors
        self.num_actor_updates = 0
        self._generator: np.random.Generator | None = None
        self._choice = None
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        if self._generator is None:  # else it was loaded
            self._generator = np.random.default_rng(self.seed)

    @property
    def rng(self) -> np.random.Generator:
        assert self._generator is not None
        return self._generator

    # -- acting ------------------------------------------------------------------------------------

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """The exploring action of each environment: as the environment takes it, and scaled for the buffer."""
        policy, rng = self.policy, self.rng
        assert self._last_obs is not None
        done = min(1.0, self._n_updates / self.anneal_updates)
        policy.temperature.fill_(anneal(self.temperature, done, self.temperature_decay))
        with torch.no_grad():
            values, actions = policy.net(policy.obs_to_tensor(self._last_obs)[0])
        cumulated = boltzmann_probabilities(values.double(), policy.temperature).cumsum(1).cpu().numpy()
        chosen = (rng.random((n_envs, 1)) >= cumulated[:, :-1]).sum(1)
        base = rng.random(n_envs) < anneal(self.base_action_probability, done)
        noisy = (rng.random(n_envs) < anneal(self.noise_probability, done)) & ~base
        chosen = np.where(base, rng.integers(values.shape[1], size=n_envs), chosen)
        executed = actions.cpu().numpy()[np.arange(n_envs), chosen].astype(np.float64)
        noise = rng.normal(0.0, self.noise_std, executed.shape)
        executed = np.clip(executed + noise * noisy[:, None], -1.0, 1.0)
        if base.any():
            controllers = rng.uniform(-1.0, 1.0, executed.shape)
            if policy.biases is not None:
                controllers = policy.net.pool.namespace("controller")["action"].cpu().numpy()[chosen]
            executed[base] = controllers[base]
        self._choice = (np.array(policy.net.pool.ids)[chosen], base | noisy)
        scaled = executed.astype(np.float32).reshape(n_envs, *cast(tuple[int, ...], self.action_space.shape))
        return policy.unscale_action(scaled), scaled

    def _store_transition(self, replay_buffer, buffer_action, new_obs, reward, dones, infos) -> None:
        assert self._choice is not None
        told = [{**info, PAIR: pair, NOISY: noisy} for info, pair, noisy in zip(infos, *self._choice, strict=True)]
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, told)
        self._choice = None

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """As in SB3; a rollout that a callback has broken off leaves no half step behind."""
        try:
            return super().collect_rollouts(*args, **kwargs)
        finally:
            self._choice = None

    # -- learning ----------------------------------------------------------------------------------

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Update critics and actors; see the class.

        Raises:
            ValueError: if every pair is frozen.
        """
        pool = self.policy.net.pool
        if len(pool.frozen_ids) == pool.num_experts:
            raise ValueError("every pair is frozen: nothing learns; add a pair or unfreeze one")
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        for _ in range(gradient_steps):
            places = self.replay_buffer.draw_critic(batch_size, self.rng)
            if places is None:
                return  # hardly any step without noise so far
            tried = self.replay_buffer.draw_actor(batch_size if self.update_actors else 0, self.rng)
            batch, y, better = self._look_ahead(places, tried)
            self.replay_buffer.pending += tried[better].tolist()
            loss = self.critic_weight * self._critic_loss(batch, y)
            taught = self.replay_buffer.take_pending(batch_size)
            if taught is not None:
                loss = loss + self._actor_loss(self.replay_buffer.at(taught, self._vec_normalize_env))
            self.policy.optimizer.zero_grad()
            loss.backward()
            self.policy.optimizer.step()
            self._n_updates += 1
            if self._n_updates % self.target_update_interval == 0:
                self.policy.update_target()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/actor_updates", self.num_actor_updates)
        self.logger.record("rollout/temperature", self.policy.temperature.item())

    def _look_ahead(self, places: np.ndarray, tried: np.ndarray) -> tuple[PairSamples, Tensor, np.ndarray]:
        """Ask the target network about a critic batch and transitions of the actor buffer, all at once.

        Returns:
            The critic batch, its targets (B,), and which of ``tried`` meet the CACLA condition.
        """
        both = self.replay_buffer.at(np.concatenate([places, tried]), self._vec_normalize_env)
        num, total = len(places), len(places) + len(tried)
        with torch.no_grad():
            values = self.policy.target.values(torch.cat([both.next_observations, both.observations[num:]]))
        y = critic_target(both.rewards, both.dones, values[:total], self.gamma)
        better = improves(y[num:], values[total:]) & self._positions(both.pairs[num:])[1]
        return PairSamples(*(tensor[:num] for tensor in both)), y[:num], better.cpu().numpy()

    def _critic_loss(self, batch: PairSamples, y: Tensor) -> Tensor:
        """() mean squared error of the acting pairs' values; frozen pairs give none."""
        positions, live = self._positions(batch.pairs)
        values = self.policy.net.values(batch.observations).gather(1, positions.unsqueeze(1)).squeeze(1)
        loss = (live * (values - y) ** 2).mean()
        self.logger.record("train/critic_loss", loss.item())
        return loss

    def _actor_loss(self, batch: PairSamples) -> Tensor:
        """() mean squared distance between the acting pairs' actions and the executed ones; frozen pairs give none."""
        positions, live = self._positions(batch.pairs)
        actions = self.policy.net.actions_of(batch.observations, positions)
        loss = (live * ((actions - batch.actions) ** 2).sum(1)).mean()
        self.num_actor_updates += 1
        self.logger.record("train/actor_loss", loss.item())
        return loss

    def _positions(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) int64 the pairs' positions in the pool, (B,) bool True where they learn."""
        pool = self.policy.net.pool
        table = np.full(max(pool.ids) + 1, -1)
        table[list(pool.ids)] = np.arange(pool.num_experts)
        learns = ~np.isin(pool.ids, pool.frozen_ids)
        positions = torch.as_tensor(table, device=pairs.device)[pairs]
        return positions, torch.as_tensor(learns, device=pairs.device)[positions]

    # -- saving ------------------------------------------------------------------------------------

    def load_replay_buffer(self, path: Any, truncate_last_traj: bool = True) -> None:
        """As in SB3; transitions of pairs that are not there (any more) are left out.

        Raises:
            ValueError: if it is another kind of buffer, which does not say which pair acted.
        """
        before = self.replay_buffer
        super().load_replay_buffer(path, truncate_last_traj)
        if not isinstance(self.replay_buffer, PairReplayBuffer):
            kind, self.replay_buffer = type(self.replay_buffer).__name__, before
            raise ValueError(f"MACE needs a PairReplayBuffer, which knows the pair that acted, got a {kind}")
        stored = np.unique(self.replay_buffer.pairs[: self.replay_buffer.size()])
        self.replay_buffer.forget(np.setdiff1d(stored, self.policy.net.pool.ids).tolist())

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_choice"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
