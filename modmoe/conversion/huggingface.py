"""Sparse MoE blocks of ``transformers`` as growable layers, and back: Mixtral, Qwen2-MoE and DeepSeek-V3 state dicts.

``transformers`` itself is not needed: a block is its state dict and its config. For whole models see
``huggingface_models.py``.

**The order of experts.** DeepSeek-V3 cuts E experts into G = n_group blocks of consecutive ones; here an expert's group
is its stable id % num_groups, which no growth changes. Its expert g * (E / G) + j therefore becomes our position
j * G + g, and goes back there. A grown pool can be written while every group has equally many experts. The other kinds
keep their order.

**Where the numbers differ from transformers 5** (``tests/conversion/test_huggingface.py`` shows each):

- Scores are computed in float32 here; Mixtral and Qwen2-MoE multiply by the gate in the model's dtype, so that in
  bfloat16 near logits tie there. In float64 ours stay float64, theirs are cast to float32.
- With one expert and normalised weights the weight is 1: their gate gets no gradient, ours that of log p.
- DeepSeek-V3 divides by the sum of the scores + 1e-20; where every selected score is that small, its weights vanish.
- Where top_k experts do not fit into topk_group groups, DeepSeek-V3 takes some of other groups; that is refused here.
  So is Mixtral's router_jitter_noise, which changes its caller's tensor.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modmoe.conversion.huggingface_formats import (
    PROJECTIONS,
    Kind,
    Layout,
    check_tensors,
    expert_weights,
    family_of,
    read_settings,
    shapes_of,
    shared_size,
)
from modmoe.experts import GatedSharedExpert, SwiGLUExpert
from modmoe.gating import DeepSeekV3Router, TopKRouter
from modmoe.layer import MoELayer
from modmoe.pool import ExpertPool


@torch.no_grad()
def from_transformers(kind: Kind, state_dict: Mapping[str, Tensor], config: object, prefix: str = "") -> MoELayer:
    """A growable layer that computes what a sparse block of transformers does.

    Both layouts are read: one tensor for all experts (``experts.gate_up_proj`` (E, 2H, D), ``experts.down_proj``
    (E, D, H)), as modules of transformers 5 hold it, and one for each (``experts.0.gate_proj.weight``, or
    ``experts.0.w1.weight`` in Mixtral's), as checkpoints are published. Everything is checked before anything is
    built, and copied; dtypes are kept (a DeepSeek gate may be in float32 beside bfloat16 experts).

    Args:
        kind: "mixtral", "qwen2_moe" or "deepseek_v3".
        state_dict: of the block, or of any model around it.
        config: the model's config, or a mapping of what its config.json says.
        prefix: what the block's keys begin with, for instance "model.layers.0.mlp." or
            "model.layers.0.block_sparse_moe.".
    Returns:
        A layer of E live experts on the state dict's device. DeepSeek's selection bias moves only where
        ``layer.update_router()`` is called.
    Raises:
        ValueError: on an unknown kind, settings that are missing or have no counterpart here, keys that are missing or
            unknown, shapes that are not the config's, or other dtypes than float16, bfloat16, float32 and float64.
    Source:
        transformers 5.24.0: MixtralSparseMoeBlock (Jiang et al. 2024), Qwen2MoeSparseMoeBlock (Qwen2, 2024) and
        DeepseekV3MoE (DeepSeek-V3, 2024, section 2.1.2). It differs as the module's docstring says.
    """
    family = family_of(kind)
    settings = read_settings(family, config)
    router = _router(kind, settings)
    num_experts, features, hidden = (settings[name] for name in (family.num_experts, "hidden_size", family.hidden))
    router.check_pool(num_experts)
    if isinstance(router, DeepSeekV3Router):
        _check_groups(router, [position % router.num_groups for position in range(num_experts)])
    block = {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    layout = "per_expert" if any(re.match(r"experts\.\d+\.", key) for key in block) else "fused"
    dtype = check_tensors(block, shapes_of(kind, settings, layout), prefix)

    with torch.device("meta"):  # nothing is drawn, and nothing allocated twice
        shared = None if family.shared is None else SharedSwiGLU(features, shared_size(kind, settings))
        gated = GatedSharedExpert(shared, features) if kind == "qwen2_moe" and shared is not None else shared
        layer = MoELayer(ExpertPool(SwiGLUExpert(features, hidden), num_experts), router, shared_expert=gated)
    gate_names = {"weight": "gate.weight", "selection_bias": "gate.e_score_correction_bias"}
    layer.to(dtype)
    for name in layer.pool.namespace(layer.namespace):
        layer.pool.growable(layer.namespace, name).to(block[gate_names[name]].dtype)
    layer.to_empty(device=block["gate.weight"].device)

    for position, source in enumerate(_sources(num_experts, getattr(router, "num_groups", 1))):
        weights = expert_weights(block, family, layout, source, hidden)
        for name, weight in zip(("w_gate", "w_in", "w_out"), weights, strict=True):
            _first_cohort(layer, "expert", name)[position].copy_(weight.T)
        for name in layer.pool.namespace(layer.namespace):
            _first_cohort(layer, layer.namespace, name)[position].copy_(block[gate_names[name]][source])
    if shared is not None:
        for name in PROJECTIONS:
            shared.get_submodule(name).get_parameter("weight").copy_(block[f"{family.shared}.{name}.weight"])
    if isinstance(gated, GatedSharedExpert):
        gated.gate.weight.copy_(block["shared_expert_gate.weight"])
    return layer


@torch.no_grad()
def to_transformers(kind: Kind, layer: MoELayer, layout: Layout = "fused", prefix: str = "") -> dict[str, Tensor]:
    """The state dict of the transformers block that computes what a layer does; the inverse of from_transformers.

    A grown pool gives a block of more experts, see :func:`transformers_config`. Frozen experts are written like any;
    that they are frozen, and tasks, have no place there.

    Args:
        kind: "mixtral", "qwen2_moe" or "deepseek_v3".
        layer: SwiGLU experts of one size, with the kind's router and shared expert.
        layout: "fused" for modules of transformers 5, "per_expert" as checkpoints are published.
        prefix: what the keys begin with.
    Returns:
        Contiguous copies, detached, with the layer's dtypes.
    Raises:
        ValueError: see :func:`transformers_config`; on an unknown layout.
    """
    if layout not in ("fused", "per_expert"):
        raise ValueError(f"layout is 'fused' or 'per_expert', got '{layout}'")
    transformers_config(kind, layer)  # checks the layer
    family = family_of(kind)
    ids = [layer.pool.ids[position] for position in expert_order(layer)]
    gate, experts = layer.pool.namespace(layer.namespace, ids), layer.pool.namespace("expert", ids)
    block = {"gate.weight": gate["weight"]}
    if kind == "deepseek_v3":
        block["gate.e_score_correction_bias"] = gate["selection_bias"]
    parts = [experts[name].transpose(1, 2) for name in ("w_gate", "w_in", "w_out")]  # (E, H, D) twice, (E, D, H)
    if layout == "fused":
        block["experts.gate_up_proj"] = torch.cat(parts[:2], dim=1)
        block["experts.down_proj"] = parts[2]
    else:
        for expert in range(len(ids)):
            for name, part in zip(family.projections, parts, strict=True):
                block[f"experts.{expert}.{name}.weight"] = part[expert]
    shared = layer.shared_expert
    if isinstance(shared, GatedSharedExpert):
        block["shared_expert_gate.weight"] = shared.gate.weight
        shared = shared.expert
    if shared is not None:
        block |= {f"{family.shared}.{name}": parameter for name, parameter in shared.named_parameters()}
    return {prefix + key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in block.items()}


def transformers_config(kind: Kind, layer: MoELayer) -> dict[str, int | float | bool]:
    """What a config must say for the block that :func:`to_transformers` writes, by the names that transformers uses.

    Args:
        kind: "mixtral", "qwen2_moe" or "deepseek_v3".
        layer: see :func:`to_transformers`.
    Raises:
        ValueError: if the layer's experts, router or shared expert are not the kind's, if the experts' hidden sizes
            differ, or if the experts of a DeepSeek layer do not stand in groups of one size (a growing pool of G
            groups is written whenever each has equally many).
    """
    family = family_of(kind)
    router, shared = layer.router, layer.shared_expert
    if isinstance(shared, GatedSharedExpert) and kind == "qwen2_moe":
        shared = shared.expert
    elif kind == "qwen2_moe":
        raise ValueError(f"qwen2_moe needs a GatedSharedExpert, got {type(shared).__name__}")
    if not isinstance(shared, type(None) if family.shared is None else SharedSwiGLU):
        wanted = "no shared expert" if family.shared is None else "a SharedSwiGLU as shared expert"
        raise ValueError(f"{kind} needs {wanted}, got {type(shared).__name__}")
    expert = layer.pool.expert
    if not isinstance(expert, SwiGLUExpert) or expert.bias or expert.out_features != expert.in_features:
        raise ValueError(f"{kind} needs SwiGLU experts without biases from D to D features, got {expert}")
    sizes = {layer.pool.record(expert_id).sizes["hidden_features"] for expert_id in layer.pool.ids}
    if len(sizes) > 1:
        raise ValueError(f"transformers needs experts of one hidden size, these have {sorted(sizes)}")
    (hidden,) = sizes
    kind_of_router = DeepSeekV3Router if kind == "deepseek_v3" else TopKRouter
    # a subclass scores or selects otherwise
    if not isinstance(router, TopKRouter) or type(router) is not kind_of_router or router.capacity is not None:
        raise ValueError(
            f"{kind} needs a {kind_of_router.__name__} without a capacity limit, got {type(router).__name__}"
        )
    normalized = router.top_k > 1 if router.renormalize is None else router.renormalize
    config: dict[str, int | float | bool] = {
        "hidden_size": expert.in_features,
        family.num_experts: layer.pool.num_experts,
        family.hidden: hidden,
        "num_experts_per_tok": router.top_k,
    }
    if kind == "mixtral":
        if not normalized:
            raise ValueError("mixtral's weights add up to 1: it needs a TopKRouter with renormalize=True")
        return config
    assert shared is not None
    width = shared.gate_proj.out_features
    config["norm_topk_prob"] = normalized
    if kind == "qwen2_moe":
        return {**config, "shared_expert_intermediate_size": width}
    assert isinstance(router, DeepSeekV3Router)
    _check_groups(router, [expert_id % router.num_groups for expert_id in layer.pool.ids])
    if width % hidden:
        raise ValueError(f"a shared expert of a multiple of the experts' hidden size {hidden} is needed, got {width}")
    return {
        **config,
        "n_group": router.num_groups,
        "topk_group": router.top_groups,
        "routed_scaling_factor": router.routed_scaling,
        "n_shared_experts": width // hidden,
    }


class SharedSwiGLU(nn.Module):
    """(silu(x W_gate) * (x W_in)) W_out as a plain module, with the names that transformers gives the three.

    Args:
        in_features: D.
        hidden_features: S.
    Raises:
        ValueError: on a size below 1.
    """

    def __init__(self, in_features: int, hidden_features: int):
        super().__init__()
        if min(in_features, hidden_features) < 1:
            raise ValueError(f"every size must be at least 1, got {in_features} and {hidden_features}")
        self.gate_proj = nn.Linear(in_features, hidden_features, bias=False)
        self.up_proj = nn.Linear(in_features, hidden_features, bias=False)
        self.down_proj = nn.Linear(hidden_features, in_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def expert_order(layer: MoELayer) -> list[int]:
    """The positions in ``layer.pool.ids`` in transformers' order: group by group where the router has groups."""
    num_groups, ids = getattr(layer.router, "num_groups", 1), layer.pool.ids
    return sorted(range(len(ids)), key=lambda position: (ids[position] % num_groups, position))


def _sources(num_experts: int, num_groups: int) -> list[int]:
    """For each of our positions, transformers' expert."""
    return [
        (position % num_groups) * (num_experts // num_groups) + position // num_groups
        for position in range(num_experts)
    ]


def _check_groups(router: DeepSeekV3Router, groups: list[int]) -> None:
    sizes = [groups.count(group) for group in range(router.num_groups)]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"transformers cuts the experts into {router.num_groups} groups of one size, these groups have {sizes} "
            "experts: add or remove experts until all have equally many"
        )
    if sizes[0] < 2:
        raise ValueError(f"transformers scores a group by its two best experts, these groups have {sizes}")
    if router.top_groups * sizes[0] < router.top_k:
        raise ValueError(
            f"top_k={router.top_k} experts do not fit into {router.top_groups} groups of {sizes[0]}: transformers "
            "would take others, this layer fewer"
        )


def _router(kind: str, settings: dict) -> TopKRouter:
    features, k = settings["hidden_size"], settings["num_experts_per_tok"]
    if kind == "mixtral":
        return TopKRouter(features, k, renormalize=True)
    if kind == "qwen2_moe":
        return TopKRouter(features, k, order="softmax_topk", renormalize=bool(settings["norm_topk_prob"]))
    return DeepSeekV3Router(
        features,
        k,
        num_groups=settings["n_group"],
        top_groups=settings["topk_group"],
        routed_scaling=settings["routed_scaling_factor"],
        renormalize=bool(settings["norm_topk_prob"]),
    )


def _first_cohort(layer: MoELayer, namespace: str, name: str) -> Tensor:
    """(E, ...): the rows of one name of a pool that has neither grown nor been frozen."""
    return layer.pool.growable(namespace, name).banks()[0][0]
