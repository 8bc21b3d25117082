"""The Triton backend: the whole expert layer in a few CUDA kernels that read every bank in place.

Forward: (1) gather, product, bias and activation; (2) product, bias, combine weight and scatter. Backward: (3) the
gradient of the hidden layer and of the combine weights; (4) product and scatter for the input; (5) the gradients of
both matrices, for live experts only. The inner products before the activation are all that is kept for the backward
pass, which computes the activation again while it needs them anyway; no expert's output is kept: the gradient of its
weight is <g, h W_out + b_out> = <g W_out^T, h> + <g, b_out>, and (3) has g W_out^T. The host waits for nothing: sizes
of grids are upper bounds from shapes, and each program finds its expert from offsets on the device.

Source:
    ScatterMoE, Tan et al. 2024: sort indices instead of tokens, and gather and scatter within the products. It
    differs in this: experts are read through a table of addresses (many banks, unequal H, no joined copy), frozen
    experts get no weight gradient, bias, activation and combine weight are part of the products, and no expert's
    output is kept. The code is our own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modmoe.experts.base import Expert
from modmoe.experts.mlp import MLPExpert
from modmoe.experts.swiglu import SwiGLUExpert
from modmoe.kernels import triton_launch
from modmoe.kernels.grouped import run_grouped
from modmoe.kernels.triton_launch import usable
from modmoe.kernels.triton_steps import Call, Launches, Order, sort_by_expert
from modmoe.routing import Routing
from modmoe.rows import Group

__all__ = ["run_triton", "supports", "usable"]

INPUTS = ("x", "weight", "token_index", "expert_index")  # of the autograd function, before the banks' tensors


def supports(expert: Expert) -> bool:
    """Whether the kernels compute this kind: MLPExpert and SwiGLUExpert, and no class derived from them."""
    return type(expert) in (MLPExpert, SwiGLUExpert)


def run_triton(banks: Sequence[Group], expert: Expert, x: Tensor, routing: Routing) -> Tensor:
    """The experts' outputs, weighted and added up for each token, in one autograd function.

    Second derivatives (``create_graph=True``, ``torch.func.grad``) are taken through the grouped backend. Sums are in
    float32; products of float32 are exact unless ``torch.set_float32_matmul_precision`` allows TF32. The result of
    equal inputs is equal to the last bit where ``routing.top_k`` is known, or under
    ``torch.use_deterministic_algorithms(True)``; otherwise tokens are added up by atomics, in any order.

    Args:
        banks: the pool's experts, each in exactly one group, whose tensors are read in place; the hidden sizes of the
            groups may differ. A group gets gradients if one of its tensors requires them.
        expert: their kind.
        x: (T, D) float32, bfloat16 or float16, on a CUDA device.
        routing: flat triples.
    Returns:
        (T, D_out), zero for a token whose assignments were all dropped.
    Raises:
        ValueError: on another kind of expert, another device, or dtypes that differ or are not supported.
        MissingExtraError: if Triton is not installed.
    """
    if not supports(expert):
        raise ValueError(f"the triton backend computes MLPExpert and SwiGLUExpert, not {type(expert).__name__}")
    if not usable(x.device, x.dtype):
        raise ValueError(
            "the triton backend needs float32, bfloat16 or float16 on a CUDA device of compute capability 8.0 or "
            f"later, got {x.dtype} on {x.device}"
        )
    names = tuple(banks[0].tensors)
    tensors = [bank.tensors[name] for bank in banks for name in names]
    for tensor in tensors:
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(f"x is {x.dtype} on {x.device}, the experts are {tensor.dtype} on {tensor.device}")
    live = tuple(any(tensor.requires_grad for tensor in bank.tensors.values()) for bank in banks)
    call = Call(
        expert=expert,
        names=names,
        positions=tuple(bank.positions for bank in banks),
        live=live,
        num_experts=routing.num_experts,
        top_k=routing.top_k,
        has_drops=routing.has_drops,
        save=torch.is_grad_enabled() and (any(live) or x.requires_grad or routing.weight.requires_grad),
        kernels=triton_launch.load_kernels(),
    )
    return TritonExperts.apply(
        call,
        x.contiguous(),
        routing.weight.contiguous(),
        routing.token_index.contiguous(),
        routing.expert_index.contiguous(),
        *(tensor.contiguous() for tensor in tensors),
    )[0]


class TritonExperts(torch.autograd.Function):
    """See :func:`run_triton`. Returns the output, and what the backward pass needs if there will be one."""

    @staticmethod
    def forward(
        call: Call, x: Tensor, weight: Tensor, token_index: Tensor, expert_index: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        if not len(token_index):
            return (x.new_zeros(len(x), call.expert.out_features),)
        order = sort_by_expert(token_index, expert_index, call.num_experts)
        launches = Launches(call, call.banks(tensors), x, order)
        hidden, saved = launches.hidden(x)
        y = launches.output(hidden, weight, len(x))
        return (y, *order, *saved) if call.save else (y,)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # apart from forward, as torch.func needs it
        ctx.call, *tensors = inputs
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.num_inputs = len(tensors)
        ctx.save_for_backward(*tensors, *saved)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        call, grad, needs = ctx.call, grads[0], ctx.needs_input_grad[1:]
        if grad is None:
            return (None,) * (1 + ctx.num_inputs)
        inputs, saved = ctx.saved_tensors[: ctx.num_inputs], ctx.saved_tensors[ctx.num_inputs :]
        if torch.is_grad_enabled():  # second derivatives: what was saved has no graph
            return None, *differentiable_gradients(call, inputs, needs, grad)
        x, weight, _, _, *tensors = inputs
        if not saved:  # no assignments
            zeros = (torch.zeros_like(tensor) if need else None for tensor, need in zip(inputs, needs, strict=True))
            return None, *zeros
        order, inner = Order(*saved[:3]), saved[3:]
        launches = Launches(call, call.banks(tensors), x, order)
        grad = grad.contiguous()  # of y.sum() it is one number, expanded
        x_grad, weight_grad = needs[0], needs[1]
        hidden, grads_inner, grad_weight = launches.hidden_gradient(grad, weight, inner, x_grad, weight_grad)
        grad_x = launches.input_gradient(grads_inner, len(x)) if x_grad else None
        grad_rows = launches.row_gradients(x, grad, weight, hidden, grads_inner) if any(call.live) else None
        step = len(call.names)
        grad_tensors = [
            grad_rows[i % step][i // step] if grad_rows and need else None
            for i, need in enumerate(needs[len(INPUTS) :])
        ]
        return None, grad_x, grad_weight, None, None, *grad_tensors


def differentiable_gradients(
    call: Call, inputs: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients in operations that autograd can differentiate again: the layer by the grouped backend.

    Args:
        call: what is known of it.
        inputs: of the autograd function, without the call.
        needs: for each of them, whether its gradient is needed.
        grad: (T, D_out).
    """
    with torch.enable_grad():
        # the input itself may depend on the rows: gradients are taken by names that nothing else stands behind
        own = [tensor.view_as(tensor) for tensor in inputs]
        x, weight, token_index, expert_index, *tensors = own
        tokens = x.index_select(0, token_index)
        outputs = x.new_zeros(len(tokens), call.expert.out_features)
        for bank in call.banks(tensors):
            numbers = [-1] * (call.num_experts + 1)  # the last entry answers for -1, dropped
            for number, position in enumerate(bank.positions):
                numbers[position] = number
            local = torch.tensor(numbers, device=x.device)[expert_index % (call.num_experts + 1)]
            outputs = outputs + run_grouped(call.expert, dict(bank.tensors), tokens, local)
        weighted = outputs * weight.to(outputs.dtype).unsqueeze(1)
        y = weighted.new_zeros(len(x), weighted.shape[1]).index_add(0, token_index, weighted)
        wanted = [tensor for tensor, need in zip(own, needs, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needs]
