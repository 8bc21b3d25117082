"""The grouped backend: assignments sorted by expert, one ``torch.nn.functional.grouped_mm`` for each product."""

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.experts.base import Expert

ALIGNMENT_BYTES = 16  # grouped_mm rejects row strides that are not a multiple of this


class GroupedOps:
    """Rows of G experts for x (N, D) sorted by expert; rows past ``offsets[-1]`` belong to nobody."""

    def __init__(self, tensors: dict[str, Tensor], expert: Tensor, offsets: Tensor):
        self.tensors = tensors
        self.expert = expert
        self.offsets = offsets

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        y = grouped_matmul(x, self.tensors[weight], self.offsets)
        return y if bias is None else y + self.tensors[bias].index_select(0, self.expert)

    def conv2d(self, x: Tensor, weight: str, bias: str, stride: int, padding: int) -> Tensor:
        kernels = self.tensors[weight]
        height, width = ((size + 2 * padding - kernels.shape[-1]) // stride + 1 for size in x.shape[-2:])
        patches = F.unfold(x, kernels.shape[-2:], padding=padding, stride=stride)  # (N, C_in * area, places)
        places = height * width
        columns = patches.transpose(1, 2).flatten(0, 1)
        y = grouped_matmul(columns, kernels.flatten(2).transpose(1, 2), self.offsets * places)
        y = y.view(-1, places, kernels.shape[1]).transpose(1, 2) + self.tensors[bias][self.expert].unsqueeze(2)
        return y.unflatten(2, (height, width))


def run_grouped(expert: Expert, tensors: dict[str, Tensor], x: Tensor, local: Tensor) -> Tensor:
    """Sort the assignments by expert and multiply each run with its own expert's rows.

    Args:
        expert: the expert kind.
        tensors: row name -> (G, ...).
        x: (N, D) one row for each assignment.
        local: (N,) int64 in [0, G), or -1.
    Returns:
        (N, D_out), zero where local is -1.
    """
    num_experts = next(iter(tensors.values())).shape[0]
    slot = torch.where(local < 0, num_experts, local)
    ordered, order = torch.sort(slot, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=x.device)
    counts = counts.scatter_add(0, slot, torch.ones_like(slot, dtype=torch.int32))
    offsets = counts[:-1].cumsum(0, dtype=torch.int32)
    ops = GroupedOps(tensors, ordered.clamp(max=num_experts - 1), offsets)
    y = expert.compute(x.index_select(0, order), ops)
    y = torch.where((ordered < num_experts).unsqueeze(1), y, torch.zeros_like(y))
    return torch.empty_like(y).index_copy(0, order, y)


def grouped_matmul(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x[offsets[e-1]:offsets[e]] @ weight[e] for every e; any feature size; zero in rows past offsets[-1].

    Args:
        x: (N, D) float32, bfloat16 or float16, sorted by expert.
        weight: (E, D, H), the same dtype.
        offsets: (E,) int32, the ends of the runs.
    Returns:
        (N, H).
    """
    lanes = ALIGNMENT_BYTES // x.element_size()
    pad_in, pad_out = -weight.shape[1] % lanes, -weight.shape[2] % lanes
    if pad_in or pad_out:
        x = F.pad(x, (0, pad_in))
        weight = F.pad(weight, (0, pad_out, 0, pad_in))
    x = x.contiguous()  # a slice of a wider tensor may have rows that grouped_mm rejects
    if torch.compiler.is_compiling():
        y = torch.ops.modmoe.grouped_mm(x, weight, offsets)
    else:
        y = GroupedMM.apply(x, weight, offsets)
    return y[:, : y.shape[1] - pad_out] if pad_out else y


class GroupedMM(torch.autograd.Function):
    """grouped_mm with zeros in unowned rows, gradients of any layout, and no work for a weight without gradient."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        return _forward(x, weight, offsets)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # apart from forward, as torch.func needs it
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, weight, offsets = ctx.saved_tensors
        grad = grads[0].contiguous()  # an expanded gradient (from y.sum()) is rejected by grouped_mm
        grad_x = GroupedMM.apply(grad, weight.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
        grad_weight = GroupedOuter.apply(x, grad, offsets) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


class GroupedOuter(torch.autograd.Function):
    """x_e^T g_e for every run e: (N, D), (N, H) -> (E, D, H). The weight gradient, itself differentiable."""

    @staticmethod
    def forward(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
        return _outer(x, grad, offsets)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, grad, offsets = ctx.saved_tensors
        outer = grads[0].contiguous()
        grad_x = GroupedMM.apply(grad, outer.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
        grad_grad = GroupedMM.apply(x, outer, offsets) if ctx.needs_input_grad[1] else None
        return grad_x, grad_grad, None


def _forward(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    y = F.grouped_mm(x, weight, offs=offsets)
    # rows past the last offset are uninitialised memory
    owned = torch.arange(x.shape[0], device=x.device) < offsets[-1]
    return torch.where(owned.unsqueeze(1), y, torch.zeros_like(y))


def _outer(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(x.t(), grad, offs=offsets)


# torch.compile cannot trace grouped_mm in fp32 (its meta function refuses), so a compiled graph calls these opaque
# operators instead; they are slower than the direct call at tiny sizes, hence only there.
@torch.library.custom_op("modmoe::grouped_mm", mutates_args=())
def grouped_mm_op(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return _forward(x, weight, offsets)


@grouped_mm_op.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("modmoe::grouped_outer", mutates_args=())
def grouped_outer_op(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return _outer(x, grad, offsets)


@grouped_outer_op.register_fake
def _(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], x.shape[1], grad.shape[1])


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    x, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grouped_mm_op(grad, weight.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    grad_weight = grouped_outer_op(x, grad, offsets) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


grouped_mm_op.register_autograd(_backward, setup_context=_setup)
