"""The names, settings and shapes of the sparse MoE blocks of ``transformers``, and the check of a state dict."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modmoe.gating.base import at_least_float32

Kind = Literal["mixtral", "qwen2_moe", "deepseek_v3"]
Layout = Literal["fused", "per_expert"]
Shapes = dict[str, tuple[int, ...]]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FIXED = {"hidden_act": "silu", "router_jitter_noise": 0.0, "scoring_func": "sigmoid"}  # where a config has them
MAX_LISTED = 12


@dataclass(frozen=True)
class Family:
    """How one kind of block names its parts.

    Args:
        projections: the names of W_gate, W_in and W_out of one expert, in checkpoints that keep experts apart.
        num_experts: the config's name of E.
        hidden: the config's name of H.
        settings: the config's other names that it needs.
        shared: the name of the shared expert, if there is one.
    """

    projections: tuple[str, str, str]
    num_experts: str
    hidden: str
    settings: tuple[str, ...]
    shared: str | None = None


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FAMILIES: dict[str, Family] = {
    "mixtral": Family(("w1", "w3", "w2"), "num_local_experts", "intermediate_size", ()),
    "qwen2_moe": Family(
        PROJECTIONS,
        "num_experts",
        "moe_intermediate_size",
        ("norm_topk_prob", "shared_expert_intermediate_size"),
        "shared_expert",
    ),
    "deepseek_v3": Family(
        PROJECTIONS,
        "n_routed_experts",
        "moe_intermediate_size",
        ("norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor", "n_shared_experts"),
        "shared_experts",
    ),
}


def family_of(kind: str) -> Family:
    """The names of one kind of block, or ValueError where it is not known."""
    if kind not in FAMILIES:
        raise ValueError(f"unknown kind '{kind}', choose one of {sorted(FAMILIES)}")
    return FAMILIES[kind]


def read_settings(family: Family, config: object) -> dict:
    """What a config (an object, or a mapping) says of a block; ValueError where it lacks or asks for what it cannot."""
    names = ("hidden_size", "num_experts_per_tok", family.num_experts, family.hidden, *family.settings)

    def read(name: str) -> object:
        return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

    missing = [name for name in names if read(name) is None]
    if missing:
        raise ValueError(f"the config lacks {missing}")
    for name, value in FIXED.items():
        if read(name) not in (None, value):
            raise ValueError(f"{name}={read(name)!r} has no counterpart here, only {value!r} has")
    return {name: read(name) for name in names}


def shared_size(kind: str, settings: dict) -> int:
    """S, the hidden size of the shared expert."""
    if kind == "qwen2_moe":
        return settings["shared_expert_intermediate_size"]
    return settings["n_shared_experts"] * settings["moe_intermediate_size"]


def shapes_of(kind: str, settings: dict, layout: str) -> Shapes:
    """What a block must hold."""
    family = FAMILIES[kind]
    E, D, H = (settings[name] for name in (family.num_experts, "hidden_size", family.hidden))
    shapes: Shapes = {"gate.weight": (E, D)}
    if kind == "deepseek_v3":
        shapes["gate.e_score_correction_bias"] = (E,)
    if layout == "fused":
        shapes |= {"experts.gate_up_proj": (E, 2 * H, D), "experts.down_proj": (E, D, H)}
    else:
        for expert in range(E):
            for name, shape in zip(family.projections, ((H, D), (H, D), (D, H)), strict=True):
                shapes[f"experts.{expert}.{name}.weight"] = shape
    if family.shared is not None:
        S = shared_size(kind, settings)
        for name, shape in zip(PROJECTIONS, ((S, D), (S, D), (D, S)), strict=True):
            shapes[f"{family.shared}.{name}.weight"] = shape
    if kind == "qwen2_moe":
        shapes["shared_expert_gate.weight"] = (1, D)
    return shapes


def check_tensors(block: dict[str, Tensor], shapes: Shapes, prefix: str) -> torch.dtype:
    """Raise ValueError on what is missing, unknown, or of a wrong shape or dtype; returns the experts' dtype."""
    missing, unknown = sorted(shapes.keys() - block.keys()), sorted(block.keys() - shapes.keys())
    if missing or unknown:
        raise ValueError(f"the keys under '{prefix}' do not fit: missing {_some(missing)}; unknown {_some(unknown)}")
    wrong = [
        f"{key} {tuple(block[key].shape)}, not {shape}" for key, shape in shapes.items() if block[key].shape != shape
    ]
    if wrong:
        raise ValueError(f"shapes that are not the config's: {_some(wrong)}")
    dtypes = {tensor.dtype for key, tensor in block.items() if not key.startswith("gate.")}
    gate = {tensor.dtype for key, tensor in block.items() if key.startswith("gate.")}
    if len(dtypes) > 1 or not dtypes | gate <= set(DTYPES):
        raise ValueError(
            f"one dtype of {DTYPES} is needed for all but the gate, got {sorted(map(str, dtypes))}, "
            f"the gate {sorted(map(str, gate))}"
        )
    (dtype,) = dtypes
    scoring = {at_least_float32(torch.empty(0, dtype=some)).dtype for some in (dtype, block["gate.weight"].dtype)}
    if len(scoring) > 1:
        raise ValueError(f"experts in {dtype} cannot be scored by a gate in {block['gate.weight'].dtype}")
    return dtype


def expert_weights(
    block: dict[str, Tensor], family: Family, layout: str, expert: int, hidden: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(H, D), (H, D) and (D, H): one expert's W_gate, W_in and W_out, transposed."""
    if layout == "fused":
        gate_up = block["experts.gate_up_proj"][expert]
        return gate_up[:hidden], gate_up[hidden:], block["experts.down_proj"][expert]
    w_gate, w_in, w_out = (block[f"experts.{expert}.{name}.weight"] for name in family.projections)
    return w_gate, w_in, w_out


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{names[:MAX_LISTED]}{more}"
