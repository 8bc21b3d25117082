"""Multi-head policies: one trunk for all contexts, and an output head for each, chosen by the visible context."""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN, Actor, SACPolicy
from torch import Tensor, nn

from modmoe.rl.actor_critic import num_outputs


class ContextHeads(nn.Module):
    """y_b = W_c h(x_b) + b_c, where c is the context of b and h is shared by all contexts.

    Args:
        in_features: of x.
        hidden_features: H of each of the two layers of h.
        out_features: of y.
        context: (start, stop): where x says the context, as one of K.
        activation: of h.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        context: tuple[int, int],
        activation: type[nn.Module],
    ):
        super().__init__()
        self.start, self.stop = context
        self.out_features = out_features
        self.trunk = nn.Sequential(*create_mlp(in_features, -1, [hidden_features] * 2, activation))
        self.heads = nn.Linear(hidden_features, (self.stop - self.start) * out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features) -> (B, out_features)."""
        chosen = x[:, self.start : self.stop].argmax(1)
        outputs = self.heads(self.trunk(x)).unflatten(1, (-1, self.out_features))
        return outputs[torch.arange(len(x), device=x.device), chosen]


class MultiHeadActorCriticPolicy(ActorCriticPolicy):
    """PPO's policy with a trunk and heads for the actor, and others for the critic.

    Args:
        observation_space: flat, with the context as one of K in its last K numbers.
        action_space: of SB3.
        lr_schedule: of SB3.
        num_contexts: K.
        hidden_features: of each of a trunk's two layers.
        kwargs: of SB3.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        num_contexts: int,
        hidden_features: int,
        **kwargs: Any,
    ):
        self.num_contexts, self.hidden_features = num_contexts, hidden_features
        super().__init__(observation_space, action_space, lr_schedule, **{**kwargs, "net_arch": []})

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        width = self.features_dim
        context = (width - self.num_contexts, width)
        sizes = {"action_net": (num_outputs(self.action_space), 0.01), "value_net": (1, 1.0)}
        for name, (size, gain) in sizes.items():
            net = ContextHeads(width, self.hidden_features, size, context, self.activation_fn)
            # as SB3 draws its MlpPolicy
            net.trunk.apply(lambda module: self.init_weights(module, np.sqrt(2)))
            self.init_weights(net.heads, gain)
            setattr(self, name, net)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]


class MultiHeadActor(Actor):
    """SAC's actor with one trunk; a head gives means and log standard deviations.

    Args:
        num_contexts: K.
        hidden_features: of each of the trunk's two layers; the others are SB3's.
    """

    def __init__(self, num_contexts: int, hidden_features: int, **kwargs: Any):
        super().__init__(**{**kwargs, "net_arch": []})
        del self.latent_pi, self.mu, self.log_std
        width = self.features_dim
        size = 2 * get_action_dim(self.action_space)
        self.net = ContextHeads(width, hidden_features, size, (width - num_contexts, width), self.activation_fn)

    def get_action_dist_params(self, obs: PyTorchObs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        mean, log_std = self.net(self.extract_features(obs, self.features_extractor)).chunk(2, 1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX), {}


class MultiHeadCritic(ContinuousCritic):
    """SAC's critics, each with a trunk that reads state and action, and a head for each context.

    Args:
        num_contexts: K.
        hidden_features: of each of a trunk's two layers; the others are SB3's.
    """

    def __init__(self, num_contexts: int, hidden_features: int, **kwargs: Any):
        super().__init__(**{**kwargs, "net_arch": []})
        width = kwargs["features_dim"]
        context = (width - num_contexts, width)
        in_features = width + get_action_dim(self.action_space)
        self.q_networks = []
        for index in range(self.n_critics):
            net = ContextHeads(in_features, hidden_features, 1, context, kwargs["activation_fn"])
            self.add_module(f"qf{index}", net)
            self.q_networks.append(net)


class MultiHeadSACPolicy(SACPolicy):
    """SAC's policy of a multi-head actor and multi-head critics.

    Args:
        observation_space: flat, with the context as one of K in its last K numbers.
        action_space: Box.
        lr_schedule: of SB3.
        num_contexts: K.
        hidden_features: of each of a trunk's two layers.
        kwargs: of SB3.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        num_contexts: int,
        hidden_features: int,
        **kwargs: Any,
    ):
        self.heads = {"num_contexts": num_contexts, "hidden_features": hidden_features}
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
        return MultiHeadActor(**self.heads, **kwargs).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return MultiHeadCritic(**self.heads, **kwargs).to(self.device)
