"""What every mixture policy has in common: which networks it has, and optimizers that follow their pools."""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor, nn
from torch.optim import Optimizer

from modmoe.growable import Growable, GrowableBuffer, is_frozen
from modmoe.optim import sync_optimizer
from modmoe.rl.network import MoENetwork
from modmoe.rl.options import MoEOptions


class Part(NamedTuple):
    """One trained part of a policy.

    Args:
        name: "" where there is only one.
        network: trained.
        target: its slow copy, or None.
        module: what the optimizer trains: the network, with the extractor where that is trained too.
        optimizer: of the module.
    """

    name: str
    network: MoENetwork
    target: MoENetwork | None
    module: nn.Module
    optimizer: Optimizer


class MoEPolicy(BasePolicy):
    """A policy made of MoENetworks; SB3's class for the algorithm comes after it in the bases.

    ``load_state_dict`` rebuilds the pools and then brings the optimizers in line, which is why SB3's ``load`` works:
    it loads the policy first and the optimizers' states after it.
    """

    options: MoEOptions

    def parts(self) -> list[Part]:
        """Every trained part, the same ones in each call."""
        raise NotImplementedError

    def features_of(self, part: Part, obs: PyTorchObs) -> Tensor:
        """(B, features_dim): what a part's network is given for observations."""
        module = part.module if isinstance(part.module, BaseModel) else self.get_submodule(part.name)
        assert isinstance(module, BaseModel)
        assert module.features_extractor is not None
        return BaseModel.extract_features(module, obs, module.features_extractor)

    def num_actions(self) -> int:
        """Numbers in the action outputs: means, logits or Q-values."""
        raise NotImplementedError

    def action_bias(self, actions: Tensor) -> Tensor:
        """The bias of the action outputs that gives such actions, (n, A) -> (n, A)."""
        return actions

    def freeze_shared(self) -> None:
        """Freeze what stands outside the pools, and remember it for whoever rebuilds the policy."""
        for part in self.parts():
            for network in (part.network, part.target):
                if network is not None:
                    network.freeze_shared()
        for module in self.modules():
            if isinstance(module, BaseFeaturesExtractor):
                module.requires_grad_(False)
        self.options = MoEOptions(**{**self.options.as_kwargs(), "shared_frozen": True})

    def sync_optimizers(self) -> None:
        """Bring every optimizer in line with its part, after any change of a pool."""
        for part in self.parts():
            sync_optimizer(part.optimizer, part.module)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module: pools become what the state dict holds, and the optimizers follow.

        Raises:
            ValueError: on the state of a policy that has no pools.
        """
        if not any(name.endswith(".pool._extra_state") for name in state_dict):
            raise ValueError(
                f"these parameters belong to a policy without experts, they do not fit {type(self).__name__}: "
                f"{sorted(state_dict)[:3]}, ..."
            )
        result = super().load_state_dict(state_dict, strict, assign)
        self.sync_optimizers()
        self.options_from_pools()
        return result

    def options_from_pools(self) -> None:
        """Write the number of experts into the options, which a saved policy is rebuilt from."""
        num_experts = self.parts()[0].network.pool.num_experts
        self.options = MoEOptions(**{**self.options.as_kwargs(), "num_experts": num_experts})

    def set_training_mode(self, mode: bool) -> None:
        """As of SB3's policies; SB3 calls it with True when an update begins, and with False when a rollout does.

        Raises:
            ValueError: when an update begins and an optimizer has nothing to train.
        """
        if mode:
            for part in self.parts():
                if not any(group["params"] for group in part.optimizer.param_groups):
                    where = f" of the {part.name}" if part.name else ""
                    raise ValueError(
                        f"every expert{where} is frozen and nothing else is trained: grow(model) before learning on"
                    )
        elif self.training:
            for part in self.parts():
                part.network.update_router()
                if part.target is not None and part.network.last_routing is None:
                    copy_buffers(part.network, part.target)
        super().set_training_mode(mode)

    @property
    def device(self) -> torch.device:
        """Where the policy lives, also if all of it is frozen."""
        return next(chain(self.parameters(), self.buffers()), torch.empty(0)).device

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        return {**{k: v for k, v in data.items() if k not in ("net_arch", "activation_fn")}, **self.options.as_kwargs()}


def growables(network: nn.Module) -> Iterator[tuple[str, Growable]]:
    """Every kind of row by its name."""
    for name, module in network.named_modules():
        if isinstance(module, Growable):
            yield name, module


@torch.no_grad()
def copy_buffers(online: nn.Module, target: nn.Module) -> None:
    """Copy the statistics of rows, which polyak averaging leaves out; the pools must have the same structure."""
    for (_, source), (_, copy) in zip(growables(online), growables(target), strict=True):
        if isinstance(source, GrowableBuffer):
            for (values, _, _), (old, _, _) in zip(source.banks(), copy.banks(), strict=True):
                old.copy_(values)


@torch.no_grad()
def mirror(online: MoENetwork, target: MoENetwork) -> None:
    """Give a target network the structure of its online network, row by row in the same order.

    Rows that the target had and that are live keep the target's (slow) values; new rows, statistics and frozen rows,
    which polyak averaging leaves out, take the online network's. What stands outside the pools is left alone.
    """
    kept = {
        (name, row.number): values[index].clone()
        for name, growable in growables(target)
        if not isinstance(growable, GrowableBuffer)
        for values, rows, _ in growable.banks()
        for index, row in enumerate(rows)
    }
    inside = "layer.pool."
    outside = {name: value for name, value in target.state_dict().items() if not name.startswith(inside)}
    target.load_state_dict(outside | {k: v for k, v in online.state_dict().items() if k.startswith(inside)})
    for name, growable in growables(target):
        for bank, rows in growable._banks.items():
            for index, row in enumerate(rows):
                if not is_frozen(bank) and (name, row.number) in kept:
                    getattr(growable, bank)[index] = kept[name, row.number]


def choose_extractor(space: spaces.Space, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments with the extractor that fits the observations, unless one is given."""
    if "features_extractor_class" in kwargs:
        return kwargs
    chosen: type[BaseFeaturesExtractor] = FlattenExtractor
    if isinstance(space, spaces.Dict):
        chosen = CombinedExtractor
    elif is_image_space(space, normalized_image=not kwargs.get("normalize_images", True)):
        chosen = NatureCNN
    return {**kwargs, "features_extractor_class": chosen}


def check_action_space(policy: str, space: spaces.Space, served: tuple[type[spaces.Space], ...]) -> None:
    """Raise ValueError unless the policy can serve actions of this kind."""
    if not isinstance(space, served):
        names = ", ".join(kind.__name__ for kind in served)
        raise ValueError(f"{policy} serves actions in {names}, got {space}")
