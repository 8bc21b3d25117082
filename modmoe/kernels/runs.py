"""Products of assignments that are sorted by expert with their own expert's rows, read from several banks in place."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.kernels.buffers import MIN_BYTES, gradient_buffers
from modmoe.kernels.grouped import ALIGNMENT_BYTES, GroupedMM, GroupedOuter

# Microseconds of a forward and backward pass (measured, fp32 CPU, one thread).
SAVED_BY_PADDING = 30.0  # for each expert: six batched products against six of its own
PER_WEIGHT = 0.2e-3  # of a padded row, for each number of a matrix: the products
PER_FEATURE = 3e-3  # of a padded row, for each input and hidden feature: the elementwise work


@dataclass(frozen=True)
class Run:
    """The sorted assignments of n experts, which stand in one or several banks of equal sizes.

    Their values are rows (m, ...), or, where ``capacity`` is not 0, (n, C, ...): each expert's rows are repeated up to
    the largest load, and the repeated ones have the weight 0.

    Args:
        start: where they start among all rows.
        stop: where they end.
        counts: rows of each of the experts, without repeated ones.
        sizes: how many experts each bank holds.
        expert: (m,) int64, each row's expert, in [0, n).
        capacity: C, or 0.
    """

    start: int
    stop: int
    counts: list[int]
    sizes: tuple[int, ...]
    expert: Tensor
    capacity: int = 0

    def part(self, rows: Tensor) -> Tensor:
        """Its own ones of all rows, as the products take them: (m, ...) or (n, C, ...)."""
        own = rows[self.start : self.stop]
        return own.view(len(self.counts), self.capacity, *rows.shape[1:]) if self.capacity else own

    def flat(self, values: Tensor) -> Tensor:
        """(m, ...) of such a part."""
        return values.flatten(0, 1) if self.capacity else values

    def by_bank(self) -> tuple[list[list[int]], list[int]]:
        """The counts of each bank's experts, and their sums."""
        stops = [0, *accumulate(self.sizes)]
        counts = [self.counts[first:last] for first, last in pairwise(stops)]
        return counts, [sum(part) for part in counts]

    def rows(self, banks: Sequence[Tensor]) -> Tensor:
        """(m, H) or (n, 1, H): each row's own row of the banks (n_i, H)."""
        rows = torch.cat(list(banks)) if len(banks) > 1 else banks[0]
        if self.capacity:
            return rows.unsqueeze(1)
        return rows if len(rows) == 1 else rows.index_select(0, self.expert)


def padded_size(counts: Sequence[int], sizes: Sequence[int], matrix: Sequence[int]) -> int:
    """The capacity up to which it pays to repeat rows, 0 where it does not.

    An expert without rows has none to repeat, and several banks are no one tensor for a batched product.

    Args:
        counts: rows of each expert.
        sizes: how many experts each bank holds.
        matrix: the shape of an expert's largest matrix.
    """
    if len(sizes) > 1 or len(counts) == 1 or min(counts) == 0:
        return 0
    largest, mean = max(counts), sum(counts) / len(counts)
    cost = (largest - mean) * (PER_WEIGHT * prod(matrix) + PER_FEATURE * sum(matrix))
    return largest if cost < SAVED_BY_PADDING else 0


def product(
    x: Tensor, banks: Sequence[Tensor], run: Run, biases: Sequence[Tensor] | None = None, transposed: bool = False
) -> Tensor:
    """x_i W_e(i) + b_e(i), or x_i W_e(i)^T.

    Args:
        x: (m, D), sorted by expert, or (n, C, D).
        banks: W, each (n_i, D, H), or (n_i, H, D) if transposed.
        run: whose they are.
        biases: b, each (n_i, H), or None.
        transposed: see above.
    Returns:
        (m, H) or (n, C, H); differentiable where gradients are enabled.
    """
    weights = [bank.transpose(1, 2) for bank in banks] if transposed else banks
    if run.capacity:
        return torch.bmm(x, weights[0]) if biases is None else torch.baddbmm(run.rows(biases), x, weights[0])
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


def outer_product(
    x: Tensor, grad: Tensor, run: Run, banks: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the banks that x was multiplied by: sum over each expert's rows of x_i^T g_i.

    Args:
        x: (m, D), sorted by expert, or (n, C, D).
        grad: (m, H) or (n, C, H).
        run: whose they are.
        banks: each (n_i, D, H).
        wanted: of which of them.
    Returns:
        for each bank (n_i, D, H), or None; differentiable where gradients are enabled, else in memory that is reused.
    """
    if run.capacity:
        if torch.is_grad_enabled() or not wanted[0]:
            return [torch.bmm(x.transpose(1, 2), grad) if wanted[0] else None]
        return [torch.bmm(x.transpose(1, 2), grad, out=gradient_buffers.take(banks[0]))]
    counts, totals = run.by_bank()
    parts = zip(x.split(totals), grad.split(totals), counts, banks, wanted, strict=True)
    return [_bank_outer(a, g, own, bank) if want else None for a, g, own, bank, want in parts]


def bias_gradient(grad: Tensor, run: Run, wanted: Sequence[bool]) -> list[Tensor | None]:
    """For each wanted bank (n_i, H): the sum of the gradients (m, H) or (n, C, H) of each expert's rows."""
    if run.capacity:
        return [grad.sum(1) if wanted[0] else None]
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


def _bank_outer(x: Tensor, grad: Tensor, counts: Sequence[int], bank: Tensor) -> Tensor:
    if len(counts) == 1 and (torch.is_grad_enabled() or bank.nbytes < MIN_BYTES):
        return (x.t() @ grad).unsqueeze(0)
    if torch.is_grad_enabled():
        if _groupable(x, grad):
            return GroupedOuter.apply(x, grad, _ends(counts, x.device))
        parts = zip(x.split(list(counts)), grad.split(list(counts)), strict=True)
        return torch.stack([a.t() @ g for a, g in parts])
    if bank.nbytes < MIN_BYTES and _groupable(x, grad):
        return F.grouped_mm(x.t(), grad, offs=_ends(counts, x.device))
    out = gradient_buffers.take(bank)  # grouped_mm makes its own
    for a, g, target in zip(x.split(list(counts)), grad.split(list(counts)), out.unbind(0), strict=True):
        torch.mm(a.t(), g, out=target)
    return out


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


def _groupable(x: Tensor, other: Tensor) -> bool:
    """Whether grouped_mm takes these: no float64, and no row that is not a multiple of 16 bytes."""
    lanes = ALIGNMENT_BYTES // x.element_size()
    return x.dtype != torch.float64 and x.shape[1] % lanes == 0 and all(size % lanes == 0 for size in other.shape[1:])
