"""MACE's network: shared layers, and a pool whose experts are actors that own their critics' heads."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor, nn

from modmoe.experts import MLPExpert
from modmoe.growable import Init, RowSpec
from modmoe.kernels.batched import BatchedOps
from modmoe.pool import ExpertPool

SMALL = 100  # an output row is drawn as if it had so many times its inputs: a new head starts near its bias


class MACENetwork(BaseModel):
    """Shared layers, and a pool whose experts are the actors and own the critics' heads: s -> V (B, K), A (B, K, A).

    Args as of :class:`modmoe.rl.mace_policy.MACEPolicy`.
    """

    features_extractor: BaseFeaturesExtractor
    shared_frozen: Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        features_extractor: BaseFeaturesExtractor,
        normalize_images: bool,
        num_pairs: int,
        trunk: Sequence[int],
        critic_hidden: int,
        actor_hidden: int,
        shared_critic: bool,
    ):
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        sizes = [features_extractor.features_dim, *trunk]
        layers = [(nn.Linear(d_in, d_out), nn.ReLU()) for d_in, d_out in pairwise(sizes)]
        self.trunk = nn.Sequential(*(module for pair in layers for module in pair))
        dim = sizes[-1]
        self.shared_critic = shared_critic
        self.critic_branch = nn.Sequential(nn.Linear(dim, critic_hidden), nn.ReLU()) if shared_critic else nn.Identity()
        num_parameters = get_action_dim(cast(spaces.Box, action_space))
        self.pool = ExpertPool(ActorExpert(dim, actor_hidden, num_parameters, activation="relu"), num_pairs)
        branch = {
            "w_in": RowSpec((dim, critic_hidden), Init("uniform", dim)),
            "b_in": RowSpec((critic_hidden,), Init("uniform", dim)),
        }
        head = {"weight": RowSpec((critic_hidden,), Init("uniform", SMALL * critic_hidden)), "bias": RowSpec(())}
        self.pool.declare("critic", head if shared_critic else branch | head, preserving="tie")
        self.pool.declare("controller", {"action": RowSpec((num_parameters,), trainable=False)}, preserving="tie")
        self.register_buffer("shared_frozen", torch.tensor(False))

    def features(self, obs: PyTorchObs) -> Tensor:
        """What all pairs read: (B, D)."""
        return self.trunk(self.extract_features(obs, self.features_extractor))

    def forward(self, obs: PyTorchObs) -> tuple[Tensor, Tensor]:
        """Every pair's value and action.

        Returns:
            (B, K) values and (B, K, A) scaled actions, in pool order.
        """
        x = self.features(obs)
        return self._values(x), self._actions(x)

    def values(self, obs: PyTorchObs) -> Tensor:
        """(B, K) the critics alone."""
        return self._values(self.features(obs))

    def actions_of(self, obs: PyTorchObs, positions: Tensor) -> Tensor:
        """(B, A) the action of one given pair, by its position in the pool, for each observation."""
        actions = self._actions(self.features(obs))
        return actions[torch.arange(len(positions), device=positions.device), positions]

    def _actions(self, x: Tensor) -> Tensor:
        groups = self.pool.groups()
        outputs = torch.cat([self.pool.expert.compute(x, BatchedOps(group.tensors)) for group in groups])
        if len(groups) > 1:  # frozen pairs and live ones: back into pool order
            order = np.argsort([position for group in groups for position in group.positions])
            outputs = outputs[torch.as_tensor(order, device=x.device)]
        return outputs.transpose(0, 1)

    def _values(self, x: Tensor) -> Tensor:
        rows = self.pool.namespace("critic")
        if self.shared_critic:
            return nn.functional.linear(self.critic_branch(x), rows["weight"], rows["bias"])
        hidden = torch.baddbmm(rows["b_in"].unsqueeze(1), x.expand(self.pool.num_experts, *x.shape), rows["w_in"])
        return (hidden.relu() @ rows["weight"].unsqueeze(2)).squeeze(2).T + rows["bias"]

    def add_pair(self, rows: dict[str, Tensor] | None) -> int:
        """Add one pair, drawn anew or with given rows (as ``ExpertPool.expert_state`` returns them)."""
        (pair,) = self.pool.add_experts(1)
        for name, values in (rows or {}).items():
            self._write(name, pair, values[0])
        return pair

    def start_pair(self, pair: int, value: float, bias: Sequence[float] | None) -> None:
        """Offset a new pair's critic to a value and its actor to a controller's scaled parameters."""
        self._write("critic.bias", pair, torch.tensor(value))
        if bias is not None:
            self._write("expert.b_out", pair, torch.tensor(bias))
            self._write("controller.action", pair, torch.tensor(bias))

    @torch.no_grad()
    def _write(self, name: str, pair: int, values: Tensor) -> None:
        for tensor, rows, frozen in self.pool.growable(*name.split(".")).banks():
            for index, row in enumerate(rows):
                if row.owner == pair:
                    assert not frozen, "only a new pair's rows are written"
                    tensor[index] = values

    def set_shared_frozen(self, frozen: bool) -> None:
        """Freeze what all pairs share, or make it trainable again."""
        self.shared_frozen.fill_(frozen)
        for module in (self.features_extractor, self.trunk, self.critic_branch):
            module.requires_grad_(not frozen)
            module.zero_grad(set_to_none=True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "MACENetwork":
        """As of any module; a frozen extractor stays in evaluation mode, so that its statistics do not move."""
        super().train(mode)
        if bool(self.shared_frozen):
            self.features_extractor.eval()
        return self


class ActorExpert(MLPExpert):
    """W_out ReLU(W_in x + b_in) + b_out with a small W_out and b_out = 0: a new actor does what its bias says."""

    def row_specs(self) -> dict[str, RowSpec]:
        specs = super().row_specs()
        shrunk = Init("uniform", SMALL * self.hidden_features)
        return specs | {"w_out": RowSpec(specs["w_out"].shape, shrunk), "b_out": RowSpec(specs["b_out"].shape)}


class TerrainFeatures(BaseFeaturesExtractor):
    """The paper's features: convolutions over the terrain and a layer of 64, joined with the body's state.

    Args:
        observation_space: Box of one axis: heights first, then the body's state.
        num_heights: how many heights, at least 14.
    Source:
        Peng, Berseth, van de Panne 2016, the network's figure: 16 filters of 8, 32 of 4, 32 of 4, then 64.
    """

    def __init__(self, observation_space: spaces.Box, num_heights: int):
        super().__init__(observation_space, 64 + observation_space.shape[0] - num_heights)
        self.num_heights = num_heights
        self.terrain = nn.Sequential(
            *(nn.Conv1d(1, 16, 8), nn.ReLU(), nn.Conv1d(16, 32, 4), nn.ReLU(), nn.Conv1d(32, 32, 4), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * (num_heights - 13), 64), nn.ReLU()),
        )

    def forward(self, observations: Tensor) -> Tensor:
        terrain, body = observations[:, : self.num_heights], observations[:, self.num_heights :]
        return torch.cat([self.terrain(terrain.unsqueeze(1)), body], 1)
