"""Carry a loss through a host that never asks for it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Scale = float | Tensor | Callable[[], float | Tensor]


def attach(y: Tensor, loss: Tensor, scale: Scale = 1.0, training: bool = True) -> Tensor:
    """Return y in value; whoever back-propagates through the result also back-propagates scale * loss.

    y' = y,  dL/dy = dL/dy',  dL/dloss = scale

    The host's own loss stands on y', so one backward pass trains both. Each backward pass that reaches y'
    counts the loss once, however many consumers y' has and whatever the host multiplies its own loss by.
    After a pass with ``create_graph=True`` the loss counts no more: later passes differentiate that first
    gradient (as MAML's outer step does), which holds the loss already. Under a GradScaler pass
    ``scale=scaler.get_scale``, or the scaler divides the loss by what it never multiplied it by.

    Args:
        y: any shape, floating or complex. The result is a copy, so that a host may change it in place
            (``nn.ReLU(inplace=True)``).
        loss: () floating.
        scale: what the loss is multiplied by: a number, a () tensor, or a function of no arguments that gives
            either. Tensors and functions are read during the backward pass, and never trained; a function
            breaks the graph of torch.compile, a tensor does not.
        training: False returns y itself, as do ``torch.no_grad`` and a loss without gradient.
    Returns:
        Shape and dtype of y. It requires grad wherever the loss does, even if y does not.
    Raises:
        ValueError: if the loss or a tensor scale is not a floating scalar, or y holds integers, which
            carry no gradient.
    Source:
        DeepSeek-MoE's ``AddAuxiliaryLoss`` and Megatron-LM's ``MoEAuxLossAutoScaler``; here the scale is not
        global, and second derivatives do not count the loss twice.
    """
    _check_scalar("loss", loss)
    if isinstance(scale, Tensor):
        _check_scalar("scale", scale)
    if not (training and torch.is_grad_enabled() and loss.requires_grad):
        return y
    if not (y.is_floating_point() or y.is_complex()):
        raise ValueError(f"y must be floating or complex to carry a gradient, got {y.dtype}")
    return _attach_uncompiled(y, loss, scale) if callable(scale) else _Attach.apply(y, loss, scale, _Taken())


class _Taken:
    """Whether a differentiable backward pass has taken the loss's gradient."""

    yes = False


class _Attach(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, loss: Tensor, scale: Scale, taken: _Taken) -> Tensor:
        # A view instead of this copy would raise as soon as the host changed it in place.
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Scale, _Taken], output: Tensor) -> None:
        # The scale is no saved tensor, which would refuse to be updated before the backward pass. ``taken``
        # is an argument because nested torch.func transforms make a context for each level and must share it.
        _, loss, ctx.scale, ctx.taken = inputs
        ctx.dtype, ctx.device = loss.dtype, loss.device

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.taken.yes:
            return grad_y, None, None, None
        # Compiled code has no second derivatives, and no way to change the mark.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            ctx.taken.yes = True
        scale = ctx.scale() if callable(ctx.scale) else ctx.scale
        if isinstance(scale, Tensor):
            return grad_y, scale.detach().to(ctx.device, ctx.dtype), None, None
        return grad_y, torch.full((), scale, dtype=ctx.dtype, device=ctx.device), None, None  # pyright: ignore


@torch.compiler.disable()
def _attach_uncompiled(y: Tensor, loss: Tensor, scale: Scale) -> Tensor:
    # Compiled, a function would run once, when the backward graph is traced.
    return _Attach.apply(y, loss, scale, _Taken())


def _check_scalar(name: str, value: Tensor) -> None:
    if value.dim() != 0 or not value.is_floating_point():
        raise ValueError(f"{name} must be a floating scalar, got {value.dtype} of shape {tuple(value.shape)}")
