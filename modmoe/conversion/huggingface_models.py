"""Whole models of ``transformers`` whose sparse blocks can grow: in place, and back.

``transformers`` is not imported: blocks are known by the names of their classes. After :func:`replace_moe_blocks`, a
model computes what it did, generates, and trains; ``modmoe.grow``, ``freeze``, ``sync_optimizer`` and
``save_checkpoint`` take it as any other module. ``save_pretrained`` needs :func:`restore_moe_blocks` first.
"""

from typing import cast

import torch
from torch import Tensor, nn

from modmoe.conversion.huggingface import expert_order, from_transformers, to_transformers, transformers_config
from modmoe.conversion.huggingface_formats import Kind
from modmoe.layer import MoELayer

BLOCKS: dict[str, Kind] = {
    "MixtralSparseMoeBlock": "mixtral",
    "Qwen2MoeSparseMoeBlock": "qwen2_moe",
    "DeepseekV3MoE": "deepseek_v3",
}


def replace_moe_blocks(model: nn.Module) -> dict[str, MoELayer]:
    """Put a growable layer in the place of each sparse block, one after the other.

    Equal to the model before in outputs, generation, and ``output_router_logits`` with the loss made of them. A block
    of which no parameter asks for a gradient becomes a frozen layer. What refers to the old parameters (an optimizer)
    has to be made anew.

    Args:
        model: a Mixtral, Qwen2-MoE or DeepSeek-V3 model with its ``config``, in any head (CausalLM, ...).
    Returns:
        the layers by the qualified names of the blocks' places.
    Raises:
        ValueError: if there is no such block, or on what :func:`from_transformers` refuses.
    """
    found = {name: module for name, module in model.named_modules() if name and type(module).__name__ in BLOCKS}
    if not found:
        raise ValueError(f"{type(model).__name__} contains none of {sorted(BLOCKS)}")
    layers = {}
    for name, block in found.items():
        kind = BLOCKS[type(block).__name__]
        layers[name] = from_transformers(kind, block.state_dict(), model.config)
        if not any(parameter.requires_grad for parameter in block.parameters()):
            layers[name].freeze()
        _put(model, name, GrowableBlock(kind, layers[name], block).train(block.training))
    return layers


def restore_moe_blocks(model: nn.Module) -> None:
    """Put blocks of transformers back in the place of the growable layers, with the experts that these have now.

    The config and the model are brought in line as :func:`sync_config` does. A layer whose experts are all frozen gives
    a block without gradients; of others, and of tasks, nothing is left.

    Args:
        model: as :func:`replace_moe_blocks` makes it.
    Raises:
        ValueError: as :func:`sync_config`; nothing is changed then.
    """
    sync_config(model)
    for name, place in _places(model).items():
        with torch.device("meta"):
            block = place.block_class(model.config)
        block.load_state_dict(to_transformers(place.kind, place.layer), assign=True)
        pool = place.layer.pool
        block.requires_grad_(len(pool.frozen_ids) < pool.num_experts)
        vars(cast(nn.Module, block.gate)).update(_hooks(place.gate))
        _put(model, name, block.train(place.training))


def sync_config(model: nn.Module) -> dict[str, int | float | bool]:
    """Write into a model's config, and where the model itself keeps a copy, how many experts its layers have now.

    The load-balancing loss of Mixtral and Qwen2-MoE reads ``model.num_experts``: call this after growth or removal.

    Args:
        model: as :func:`replace_moe_blocks` makes it.
    Returns:
        what was written, see :func:`transformers_config`.
    Raises:
        ValueError: if there is no growable block, if the layers do not agree, or on a layer that transformers has no
            block for; nothing is changed then.
    """
    configs = {name: transformers_config(place.kind, place.layer) for name, place in _places(model).items()}
    first, *others = configs.values()
    if any(other != first for other in others):
        raise ValueError(f"one config serves all blocks, but they need {configs}")
    for name, value in first.items():
        setattr(model.config, name, value)
    for name in ("num_experts", "num_experts_per_tok"):
        if hasattr(model, name):
            setattr(model, name, getattr(model.config, name))
    return first


class GrowableBlock(nn.Module):
    """What stands in a decoder layer in place of a sparse block: a MoELayer, and the recorder of its logits.

    Args:
        kind: "mixtral", "qwen2_moe" or "deepseek_v3".
        layer: the layer.
        block: the block that it replaces.
    """

    def __init__(self, kind: Kind, layer: MoELayer, block: nn.Module):
        super().__init__()
        self.kind: Kind = kind
        self.layer = layer
        self.block_class = type(block)
        self.gate = _recorder(cast(nn.Module, block.gate))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        y = self.layer(hidden_states)
        if self.layer.routing is not None and _hooks(self.gate)["_forward_hooks"]:  # somebody listens
            self.gate(self.layer.routing.logits[:, expert_order(self.layer)])
        return y


def _recorder(gate: nn.Module) -> nn.Module:
    """A module of the gate's class that hands on logits (T, E), and nothing else.

    transformers collects router logits by forward hooks on the modules of that class, whose output's first part they
    keep; it adds the hooks once, so those of the gate have to come along.
    """
    recorder = type(gate).__new__(type(gate))
    nn.Module.__init__(recorder)
    vars(recorder).update(_hooks(gate), forward=_in_tuple)
    return recorder


def _in_tuple(logits: Tensor) -> tuple[Tensor]:
    return (logits,)


def _hooks(module: nn.Module) -> dict[str, object]:
    return {name: hooks for name, hooks in vars(module).items() if name.startswith("_forward_hooks")}


def _places(model: nn.Module) -> dict[str, GrowableBlock]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, GrowableBlock)}
    if not found:
        raise ValueError(f"{type(model).__name__} contains no growable block: call replace_moe_blocks first")
    return found


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
