"""The critics of SAC and TD3: each expert owns one Q-function of each."""

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor

from modmoe.rl.network import MoENetwork
from modmoe.rl.options import MoEOptions


class MoEContinuousCritic(ContinuousCritic):
    """(Q_1(s, a), ..., Q_n(s, a)): the gate sees the state only, the experts state and action.

    So an auxiliary loss of the gate never reaches the actor through the action.

    Args:
        observation_space: of SB3.
        action_space: Box.
        features_extractor: of SB3.
        features_dim: its size.
        options: of the mixture.
        normalize_images: of SB3.
        n_critics: n.
        share_features_extractor: of SB3.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        options: MoEOptions,
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = False,
    ):
        super().__init__(
            observation_space,
            action_space,
            net_arch=[],
            features_extractor=features_extractor,
            features_dim=features_dim,
            normalize_images=normalize_images,
            n_critics=0,
            share_features_extractor=share_features_extractor,
        )
        self.n_critics = n_critics
        outputs = {f"qf{index}": 1 for index in range(n_critics)}
        self.moe = MoENetwork(
            observation_space, features_dim, outputs, options, extra_features=get_action_dim(action_space)
        )

    def forward(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.share_features_extractor):
            features = self.extract_features(obs, self.features_extractor)
        return self.moe(features, obs, actions).outputs.split(1, 1)

    def q1_forward(self, obs: PyTorchObs, actions: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.extract_features(obs, self.features_extractor)
        return self.moe(features, obs, actions).outputs[:, :1]
