"""A mixture of low-rank updates around a frozen linear layer, and the way back to one linear layer."""

import torch
from torch import Tensor, nn

from modmoe.experts import LoRAExpert
from modmoe.gating import DenseRouter, Router
from modmoe.layer import MoELayer
from modmoe.pool import ExpertPool


def lora_layer(
    linear: nn.Linear, num_experts: int, rank: int, alpha: float | None = None, router: Router | None = None
) -> MoELayer:
    """Stand LoRA experts beside a linear layer: y = linear(x) + sum_e w_e(x) alpha / r x A_e B_e.

    The linear layer itself, not a copy, becomes the layer's shared expert. It is frozen from now on, whatever is
    frozen or unfrozen of the experts. As B = 0 in new experts, the layer equals it exactly at first.

    Args:
        linear: (..., D) -> (..., D_out).
        num_experts: how many to start with, at least 1.
        rank: r.
        alpha: see LoRAExpert.
        router: takes D features; None for a DenseRouter.
    Raises:
        ValueError: as LoRAExpert, ExpertPool and MoELayer do.
    Source:
        Zadouri et al. 2023 (MoLoRA: a softmax over all LoRAs, token by token) and Dou et al. 2023 (LoRAMoE).
    """
    pool = ExpertPool(LoRAExpert(linear.in_features, linear.out_features, rank, alpha), num_experts)
    pool.to(device=linear.weight.device, dtype=linear.weight.dtype)
    layer = MoELayer(pool, DenseRouter(linear.in_features) if router is None else router, shared_expert=linear)
    layer.router.to(linear.weight.device)
    linear.requires_grad_(False)
    linear.zero_grad(set_to_none=True)  # an optimizer would still apply what is left there
    return layer


@torch.no_grad()
def merged_linear(layer: MoELayer, weights: Tensor) -> nn.Linear:
    """The linear layer that a LoRA layer is under constant gate weights: W + sum_e w_e alpha / r (A_e B_e)^T.

    Args:
        layer: as :func:`lora_layer` makes it.
        weights: (E,) float, in the order of ``layer.pool.ids``.
    Returns:
        A new layer with the base's bias, dtype and device, trainable; ``layer`` is left as it is.
    Raises:
        ValueError: if the experts are not LoRA experts beside a linear layer, or on weights of another shape.
    """
    base, expert = layer.shared_expert, layer.pool.expert
    if not isinstance(base, nn.Linear) or not isinstance(expert, LoRAExpert):
        raise ValueError(f"LoRA experts beside a linear layer are needed, got {expert} beside {type(base).__name__}")
    if weights.shape != (layer.pool.num_experts,):
        raise ValueError(f"a weight for each of {layer.pool.num_experts} experts is needed, got {tuple(weights.shape)}")
    weight = base.weight.detach().clone()
    for group in layer.pool.groups():
        a, b = group.tensors["a"], group.tensors["b"]
        scaled = weights[list(group.positions)].to(a) * (expert.alpha / a.shape[2])
        weight += torch.einsum("e,eir,ero->oi", scaled, a, b)
    merged = nn.Linear(base.in_features, base.out_features, base.bias is not None).to(base.weight)
    merged.weight.copy_(weight)
    if base.bias is not None:
        merged.bias.copy_(base.bias)
    return merged
