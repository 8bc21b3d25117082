"""The dense and bmm backends: batched matrix products over a leading expert axis."""

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.experts.base import Expert


class BatchedOps:
    """Rows of G experts for x (G, C, D), or x (T, D) that every expert reads."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        if bias is None:
            return torch.matmul(x, self.tensors[weight])
        batched = x.expand(self.tensors[weight].shape[0], *x.shape[-2:])
        return torch.baddbmm(self.tensors[bias].unsqueeze(1), batched, self.tensors[weight])

    def conv2d(self, x: Tensor, weight: str, bias: str, stride: int, padding: int) -> Tensor:
        kernels, biases = self.tensors[weight], self.tensors[bias]
        num_experts = len(kernels)
        if x.dim() == 4:  # every expert reads the same images: more output channels
            images, groups = x, 1
        else:  # (G, C, channels, ...): the experts side by side as groups of channels
            images, groups = x.transpose(0, 1).flatten(1, 2), num_experts
        y = F.conv2d(images, kernels.flatten(0, 1), biases.flatten(), stride, padding, groups=groups)
        return y.unflatten(1, (num_experts, -1)).transpose(0, 1)


def run_dense(expert: Expert, tensors: dict[str, Tensor], x: Tensor, token: Tensor, local: Tensor) -> Tensor:
    """Every expert computes every token; the assignments are picked out. For few experts and few tokens.

    Args:
        expert: the expert kind.
        tensors: row name -> (G, ...).
        x: (T, D) tokens.
        token: (N,) int64 the token of each assignment.
        local: (N,) int64 in [0, G), or -1.
    Returns:
        (N, D_out), zero where local is -1.
    """
    y = expert.compute(x, BatchedOps(tensors))  # (G, T, D_out)
    picked = y.flatten(0, 1).index_select(0, local.clamp(min=0) * x.shape[0] + token)
    return torch.where((local >= 0).unsqueeze(1), picked, torch.zeros_like(picked))


def run_bmm(expert: Expert, tensors: dict[str, Tensor], x: Tensor, local: Tensor) -> Tensor:
    """Assignments padded to the largest load: one batched product. For balanced loads.

    Args and returns as :func:`modmoe.kernels.reference.run_reference`.
    """
    num_experts = next(iter(tensors.values())).shape[0]
    slot_expert = torch.where(local < 0, num_experts, local)
    one_hot = torch.nn.functional.one_hot(slot_expert, num_experts + 1)
    place = (one_hot.cumsum(0) - 1).gather(1, slot_expert.unsqueeze(1)).squeeze(1)  # rank within its expert
    # A compiled graph needs a static size: no expert can receive more than all assignments.
    capacity = x.shape[0] if torch.compiler.is_compiling() else int(one_hot[:, :-1].sum(0).max()) if len(local) else 0
    slot = torch.where(local < 0, num_experts * capacity, slot_expert * capacity + place)
    padded = x.new_zeros(num_experts * capacity + 1, x.shape[1]).index_copy(0, slot, x)
    slots = padded[:-1].view(num_experts, capacity, x.shape[1])
    y = expert.compute(slots, BatchedOps(tensors)).flatten(0, 1)
    y = torch.cat([y, y.new_zeros(1, y.shape[1])])  # the last slot answers for dropped assignments
    return y.index_select(0, slot)
