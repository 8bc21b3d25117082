"""The policies of SAC and TD3: mixtures of actors, of critics, and of their targets."""

from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN, SACPolicy
from stable_baselines3.sac.policies import Actor as SACActor
from stable_baselines3.td3.policies import Actor as TD3Actor
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor

from modmoe.rl.critics import MoEContinuousCritic
from modmoe.rl.network import MoENetwork
from modmoe.rl.options import MoEOptions
from modmoe.rl.policy import MoEPolicy, Part, check_action_space, choose_extractor

LARGEST_ACTION = 1 - 1e-6  # what tanh can still be inverted at in float32


class MoESACActor(SACActor):
    """The squashed Gaussian of SAC, with means and log standard deviations from a mixture.

    Args:
        options: of the mixture; the others are SB3's.
    """

    def __init__(self, options: MoEOptions, **kwargs: Any):
        super().__init__(**kwargs, net_arch=[])
        del self.latent_pi, self.mu, self.log_std
        size = get_action_dim(self.action_space)
        self.moe = MoENetwork(self.observation_space, self.features_dim, {"pi": 2 * size}, options)

    def get_action_dist_params(self, obs: PyTorchObs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        mean, log_std = self.moe(self.extract_features(obs, self.features_extractor), obs).outputs.chunk(2, 1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX), {}


class MoETD3Actor(TD3Actor):
    """The deterministic actor of TD3: tanh of a mixture.

    Args:
        options: of the mixture; the others are SB3's.
    """

    def __init__(self, options: MoEOptions, **kwargs: Any):
        super().__init__(**kwargs, net_arch=[])
        del self.mu
        size = get_action_dim(self.action_space)
        self.moe = MoENetwork(self.observation_space, self.features_dim, {"pi": size}, options)

    def forward(self, obs: PyTorchObs) -> Tensor:
        return self.moe(self.extract_features(obs, self.features_extractor), obs).outputs.tanh()


class _ContinuousPolicy(MoEPolicy):
    """What the policies of SAC and TD3 share."""

    actor: SACActor | TD3Actor
    critic: MoEContinuousCritic
    critic_target: MoEContinuousCritic
    actor_class: type[MoESACActor] | type[MoETD3Actor]
    actor_kwargs: dict[str, Any]
    critic_kwargs: dict[str, Any]
    share_features_extractor: bool

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Box, lr_schedule: Schedule, **kwargs: Any):
        self.options, left = MoEOptions.split(kwargs)
        check_action_space(type(self).__name__, action_space, (spaces.Box,))
        if left.get("use_sde"):
            raise ValueError(f"{type(self).__name__} has no state-dependent exploration: use_sde=False")
        super().__init__(observation_space, action_space, lr_schedule, **choose_extractor(observation_space, left))  # type: ignore[call-arg]

    def _build(self, lr_schedule: Schedule) -> None:
        for kwargs in (self.actor_kwargs, self.critic_kwargs):
            kwargs["options"] = self.options
            for name in ("net_arch", "activation_fn"):
                kwargs.pop(name)
        super()._build(lr_schedule)  # type: ignore[misc]
        if self.options.shared_frozen:
            self.freeze_shared()
        self.sync_optimizers()

    def parts(self) -> list[Part]:
        # SAC's critic does not train an extractor that it shares with the actor
        shared = self.share_features_extractor and isinstance(self, SACPolicy)
        critic, target = self.critic.moe, self.critic_target.moe
        actor, actor_target = self.actor, getattr(self, "actor_target", None)
        return [
            Part("actor", actor.moe, actor_target and actor_target.moe, actor, actor.optimizer),  # type: ignore[union-attr]
            Part("critic", critic, target, critic if shared else self.critic, self.critic.optimizer),  # type: ignore[arg-type]
        ]

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        return self.actor_class(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(
            self.device
        )

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> MoEContinuousCritic:
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return MoEContinuousCritic(**kwargs).to(self.device)

    def num_actions(self) -> int:
        return get_action_dim(self.action_space)

    def action_bias(self, actions: Tensor) -> Tensor:
        return torch.atanh(actions.clamp(-LARGEST_ACTION, LARGEST_ACTION))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # SB3's list has no shared extractor, without which a loaded policy differs
        return {**super()._get_constructor_parameters(), "share_features_extractor": self.share_features_extractor}


class MoESACPolicy(_ContinuousPolicy, SACPolicy):
    """SAC's policy of mixtures: an actor, a critic of several Q-functions, and its target, a pool each.

    The pools have the same expert ids, and grow, freeze and shrink together; each is routed by the state, but not
    necessarily alike unless tasks route (``task_of``).

    Args:
        observation_space: flat, image or dict; the extractor is chosen by it unless one is given.
        action_space: Box.
        lr_schedule: of SB3.
        kwargs: those of ``MoEOptions``, and of SB3's SACPolicy but for ``net_arch`` and ``activation_fn``.
    Raises:
        ValueError: on other action spaces and ``use_sde``, and as MoEOptions.
    """

    actor_class = MoESACActor


class MoETD3Policy(_ContinuousPolicy, TD3Policy):
    """TD3's policy of mixtures: an actor, a critic of several Q-functions, and a target of each.

    Args and raises as of :class:`MoESACPolicy`.
    """

    actor_class = MoETD3Actor
