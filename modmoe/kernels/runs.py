"""Products of assignments that are sorted by expert with their own expert's rows, read from several banks in place."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.kernels.grouped import ALIGNMENT_BYTES, GroupedMM, GroupedOuter


@dataclass(frozen=True)
class Run:
    """The sorted assignments of n experts, which stand in one or several banks of equal sizes.

    Args:
        start: where they start among all assignments.
        counts: of each of the experts.
        sizes: how many experts each bank holds.
        expert: (m,) int64, each assignment's expert, in [0, n).
    """

    start: int
    counts: list[int]
    sizes: tuple[int, ...]
    expert: Tensor

    @property
    def stop(self) -> int:
        """Where they end among all assignments."""
        return self.start + len(self.expert)

    def by_bank(self) -> tuple[list[list[int]], list[int]]:
        """The counts of each bank's experts, and their sums."""
        stops = [0, *accumulate(self.sizes)]
        counts = [self.counts[first:last] for first, last in pairwise(stops)]
        return counts, [sum(part) for part in counts]

    def rows(self, banks: Sequence[Tensor]) -> Tensor:
        """(m, H): each assignment's own row of the banks (n_i, H)."""
        rows = torch.cat(list(banks)) if len(banks) > 1 else banks[0]
        return rows if len(rows) == 1 else rows.index_select(0, self.expert)


def product(
    x: Tensor, banks: Sequence[Tensor], run: Run, biases: Sequence[Tensor] | None = None, transposed: bool = False
) -> Tensor:
    """x_i W_e(i) + b_e(i), or x_i W_e(i)^T.

    Args:
        x: (m, D), sorted by expert.
        banks: W, each (n_i, D, H), or (n_i, H, D) if transposed.
        run: whose they are.
        biases: b, each (n_i, H), or None.
        transposed: see above.
    Returns:
        (m, H); differentiable where gradients are enabled.
    """
    weights = [bank.transpose(1, 2) for bank in banks] if transposed else banks
    if len(weights) == 1:
        y = _bank_product(x, weights[0], run.counts)
    elif torch.is_grad_enabled():
        counts, totals = run.by_bank()
        y = torch.cat([_bank_product(*each) for each in zip(x.split(totals), weights, counts, strict=True)])
    else:
        y = x.new_empty(len(x), weights[0].shape[2])
        counts, totals = run.by_bank()
        for part, w, own, out in zip(x.split(totals), weights, counts, y.split(totals), strict=True):
            if len(own) == 1:
                torch.mm(part, w[0], out=out)
            else:
                out.copy_(_bank_product(part, w, own))
    if biases is None:
        return y
    return y + run.rows(biases) if torch.is_grad_enabled() else y.add_(run.rows(biases))


def outer_product(x: Tensor, grad: Tensor, run: Run, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of the banks that x was multiplied by: sum over each expert's assignments of x_i^T g_i.

    Args:
        x: (m, D), sorted by expert.
        grad: (m, H).
        run: whose they are.
        wanted: of which banks.
    Returns:
        for each bank (n_i, D, H), or None.
    """
    counts, totals = run.by_bank()
    parts = zip(x.split(totals), grad.split(totals), counts, wanted, strict=True)
    return [_bank_outer(a, g, own) if want else None for a, g, own, want in parts]


def bias_gradient(grad: Tensor, run: Run, wanted: Sequence[bool]) -> list[Tensor | None]:
    """For each wanted bank (n_i, H): the sum of the gradients (m, H) of each expert's assignments."""
    if len(run.counts) == 1:
        sums = grad.sum(0, keepdim=True)
    else:
        sums = grad.new_zeros(len(run.counts), grad.shape[1]).index_add(0, run.expert, grad)
    return [part if want else None for part, want in zip(sums.split(run.sizes), wanted, strict=True)]


def _bank_product(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    if len(counts) == 1:
        return x @ weight[0]
    if not _groupable(x, weight):
        return torch.cat([part @ own for part, own in zip(x.split(list(counts)), weight.unbind(0), strict=True)])
    ends = _ends(counts, x.device)
    return GroupedMM.apply(x, weight, ends) if torch.is_grad_enabled() else F.grouped_mm(x, weight, offs=ends)


def _bank_outer(x: Tensor, grad: Tensor, counts: Sequence[int]) -> Tensor:
    if len(counts) == 1:
        return (x.t() @ grad).unsqueeze(0)
    if not _groupable(x, grad):
        parts = zip(x.split(list(counts)), grad.split(list(counts)), strict=True)
        return torch.stack([a.t() @ g for a, g in parts])
    ends = _ends(counts, x.device)
    return GroupedOuter.apply(x, grad, ends) if torch.is_grad_enabled() else F.grouped_mm(x.t(), grad, offs=ends)


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


def _groupable(x: Tensor, other: Tensor) -> bool:
    """Whether grouped_mm takes these: no float64, and no row that is not a multiple of 16 bytes."""
    lanes = ALIGNMENT_BYTES // x.element_size()
    return x.dtype != torch.float64 and x.shape[1] % lanes == 0 and all(size % lanes == 0 for size in other.shape[1:])
