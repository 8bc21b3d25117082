"""MACE's policy: K actor-critic pairs on one ExpertPool, a target copy, and growth of both together."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor

from modmoe.optim import sync_optimizer
from modmoe.rl.mace_network import MACENetwork
from modmoe.rl.mace_rules import boltzmann_probabilities

PairInit = Literal["fresh", "copy"]


class MACEPolicy(BasePolicy):
    """K pairs of an actor and a critic; act by the actor whose critic is highest, or by a Boltzmann choice.

    argmax_i V_i(s) where deterministic, else P(i) = softmax_i(V_i(s) / temperature); the action is A_i(s). A pair is an
    expert of ``net.pool``: its actor's weights, critic head and hand-made controller are added, frozen, saved and
    removed together. Actions are [low, high] scaled to [-1, 1], linear and clipped there.

    Args:
        observation_space: of the environment.
        action_space: Box.
        lr_schedule: learning rate by progress remaining.
        num_pairs: K at the start.
        biases: (n, *action shape) hand-made controllers in units of the action space; actor i starts at number i mod n.
            None for no bias: every actor starts at the middle of the action space.
        trunk: sizes of the ReLU layers that all pairs share.
        critic_hidden: hidden size of the critics' branch.
        actor_hidden: hidden size of each actor's branch.
        shared_critic: all critics are heads on one branch, as in the paper; False gives each pair a branch of its own.
        initial_value: what critics start at.
        features_extractor_class: SB3's; :class:`modmoe.rl.mace_network.TerrainFeatures` is the paper's.
        features_extractor_kwargs: its arguments.
        normalize_images: as in SB3.
        optimizer_class: any torch optimizer.
        optimizer_kwargs: its arguments, but for the learning rate.
    Raises:
        ValueError: if the action space is no Box, or on biases of another shape or outside of it.
    Source:
        Peng, Berseth, van de Panne 2016, "Terrain-Adaptive Locomotion Skills Using Deep Reinforcement Learning",
        section 5 and the network of its figure. Different here: output layers are drawn small, and Adam is the default
        where the authors used SGD with momentum.
    """

    temperature: Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        num_pairs: int = 3,
        biases: Sequence[Sequence[float]] | None = None,
        trunk: Sequence[int] = (256,),
        critic_hidden: int = 128,
        actor_hidden: int = 128,
        shared_critic: bool = True,
        initial_value: float = 0.5,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ):
        if not isinstance(action_space, spaces.Box):
            raise ValueError(f"MACE's actors give action parameters: a Box action space is needed, got {action_space}")
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
        )
        self.initial_value = initial_value
        self.biases = None if biases is None else [self.scale_bias(bias).tolist() for bias in biases]
        if self.biases == []:
            raise ValueError("biases is empty: give at least one controller, or None")
        self._network_kwargs: dict[str, Any] = {
            "num_pairs": num_pairs,
            "trunk": trunk,
            "critic_hidden": critic_hidden,
            "actor_hidden": actor_hidden,
            "shared_critic": shared_critic,
        }
        self._constructor_kwargs = {**self._network_kwargs, "biases": biases, "initial_value": initial_value}
        self.net = self._make_network()
        for position, pair in enumerate(self.net.pool.ids):
            self.net.start_pair(pair, initial_value, self.biases[position % len(self.biases)] if self.biases else None)
        self.target = self._make_network()
        self.update_target()
        self.train(False)
        self.register_buffer("temperature", torch.tensor(1.0))
        self.optimizer = optimizer_class(self.net.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _make_network(self) -> MACENetwork:
        return MACENetwork(
            self.observation_space,
            self.action_space,
            self.make_features_extractor(),
            self.normalize_images,
            **self._network_kwargs,
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            **self._constructor_kwargs,
            "lr_schedule": self._dummy_schedule,
            "features_extractor_class": self.features_extractor_class,
            "features_extractor_kwargs": self.features_extractor_kwargs,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }

    def scale_bias(self, bias: Sequence[float]) -> np.ndarray:
        """A controller's parameters, in units of the action space, as (A,) in [-1, 1].

        Raises:
            ValueError: on another shape, and outside the action space.
        """
        space = cast(spaces.Box, self.action_space)
        values = np.asarray(bias, dtype=np.float64)
        if values.shape != space.shape or not ((values >= space.low) & (values <= space.high)).all():
            raise ValueError(f"a bias is an action of {space}, got {values.tolist()}")
        return self.scale_action(values).reshape(-1)

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        """Scaled actions (B, A); as :meth:`predict` without the conversions."""
        return self._predict(observation, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        values, actions = self.net(observation)
        if deterministic:
            chosen = values.argmax(1)
        else:
            chosen = torch.multinomial(boltzmann_probabilities(values, self.temperature), 1).squeeze(1)
        return actions[torch.arange(len(chosen), device=chosen.device), chosen].clamp(-1, 1)

    def set_training_mode(self, mode: bool) -> None:
        """As in SB3, which calls it twice for each step: a mode that is set already costs nothing."""
        if mode != self.training:
            self.train(mode)

    def train(self, mode: bool = True) -> "MACEPolicy":
        """As of any module; the target network stays in evaluation mode."""
        super().train(mode)
        self.target.train(False)
        return self

    def update_target(self) -> None:
        """Copy the network to the target network, frozen rows and all."""
        self.target.load_state_dict(self.net.state_dict())

    # -- growing -----------------------------------------------------------------------------------

    def add_pair(
        self, init: PairInit, bias: Sequence[float] | None = None, value: float | None = None, source: int | None = None
    ) -> int:
        """Add one pair to the network and to its target, and list it in the optimizer; see :meth:`MACE.add_pair`."""
        pool = self.net.pool
        if init not in ("fresh", "copy"):
            raise ValueError(f"init is 'fresh' or 'copy', got {init!r}")
        if init == "copy" and (bias is not None or value is not None):
            raise ValueError("init='copy' takes actor and critic of its source: bias and value are for init='fresh'")
        if init == "fresh" and source is not None:
            raise ValueError("init='fresh' has no source, give init='copy'")
        rows = None if init == "fresh" else pool.expert_state(pool.ids[-1] if source is None else source)
        scaled = None if bias is None else self.scale_bias(bias).tolist()
        pair = self.net.add_pair(rows)
        if rows is None:
            self.net.start_pair(pair, self.initial_value if value is None else value, scaled)
        twin = self.target.add_pair(pool.expert_state(pair))
        assert twin == pair, "the network and its target number their pairs alike"
        sync_optimizer(self.optimizer, self.net)
        return pair

    def freeze(self, pairs: Sequence[int] | None = None) -> None:
        """Freeze pairs; None for all of them and the shared layers, after which what they do is fixed for ever."""
        for net in (self.net, self.target):
            net.pool.freeze(pairs)
        if pairs is None:
            for net in (self.net, self.target):
                net.set_shared_frozen(True)
        sync_optimizer(self.optimizer, self.net)

    def unfreeze(self, pairs: Sequence[int] | None = None) -> None:
        """Make pairs trainable again; None for all of them and the shared layers."""
        for net in (self.net, self.target):
            net.pool.unfreeze(net.pool.ids if pairs is None else pairs)
            if pairs is None:
                net.set_shared_frozen(False)
        sync_optimizer(self.optimizer, self.net)

    def remove(self, pairs: Sequence[int]) -> None:
        """Remove pairs from the network, its target and the optimizer."""
        for net in (self.net, self.target):
            net.pool.remove(pairs)
        sync_optimizer(self.optimizer, self.net)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False):
        """As of any module; the pools become those of the state dict, and the optimizer lists their tensors."""
        result = super().load_state_dict(state_dict, strict, assign)
        for net in (self.net, self.target):
            net.set_shared_frozen(bool(net.shared_frozen))
        sync_optimizer(self.optimizer, self.net)
        return result
