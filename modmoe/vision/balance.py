"""Balancing losses that a backbone carries by itself, whoever trains it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modmoe.layer import MoELayer
from modmoe.losses import attach, importance_loss, load_balancing_loss, load_loss
from modmoe.vision.placement import moe_layers


def carry_balancing_losses(model: nn.Module, weight: float) -> list[RemovableHandle]:
    """Let every MoELayer of a model carry ``weight`` times its balancing loss, in training only.

    The layers' outputs stay what they are; the loss comes with the host's backward pass (``modmoe.losses.attach``), so
    that Avalanche or any other training loop need not know of it. Copies of the model carry theirs.

    Args:
        model: holds MoELayers.
        weight: positive; V-MoE takes 0.005 for each of its two losses.
    Returns:
        One handle for each layer; ``handle.remove()`` ends it.
    Raises:
        ValueError: on a weight that is not positive.
    """
    if weight <= 0:
        raise ValueError(f"weight must be positive, got {weight}: without a loss there is nothing to carry")
    return [layer.register_forward_hook(partial(_carry, weight=weight)) for layer in moe_layers(model).values()]


def balancing_loss(layer: MoELayer) -> Tensor | None:
    """The loss that keeps the live experts of the last call evenly used; frozen ones are left out.

    With routing noise: importance_loss of the softmax without noise, plus load_loss. Without: load_balancing_loss.
    None where there is nothing to balance: fewer than two live experts, slots, or experts that choose.

    Args:
        layer: after a call in training.
    Returns:
        () float, or None.
    Source:
        Riquelme et al. 2021 (V-MoE): importance and load loss with one weight.
    """
    routing = layer.routing
    frozen = set(layer.pool.frozen_ids)
    if routing is None or routing.top_k is None or layer.router.form != "choices" or layer.pool.num_experts < 2:
        return None
    if layer.pool.num_experts - len(frozen) < 2:
        return None
    live = torch.tensor([expert_id not in frozen for expert_id in layer.pool.ids], device=routing.logits.device)
    if routing.noisy_logits is None or routing.noise_std is None:
        return load_balancing_loss(routing.probs, routing.requested_choices, routing.mask, live)
    clean, noisy = routing.logits, routing.noisy_logits
    if routing.open_experts is not None:
        clean, noisy = (t.masked_fill(~routing.open_experts, -torch.inf) for t in (clean, noisy))
    importance = importance_loss(clean.softmax(1), routing.mask, live)
    return importance + load_loss(clean, noisy, routing.noise_std, routing.top_k, routing.mask, live)


def _carry(layer: MoELayer, args: Any, y: Tensor, weight: float) -> Tensor:
    if not (layer.training and torch.is_grad_enabled()):
        return y
    loss = balancing_loss(layer)
    return y if loss is None else attach(y, weight * loss)
