"""In which order the fused backend computes a routing's assignments: bank by bank, expert by expert."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from modmoe.kernels.runs import Run, padded_size


class Class(NamedTuple):
    """Banks of equal sizes, all frozen or all live.

    Args:
        first: the number of the first one among all banks.
        positions: the positions of each bank's experts.
        matrix: the shape of an expert's largest matrix.
    """

    first: int
    positions: tuple[tuple[int, ...], ...]
    matrix: Sequence[int]


@dataclass(frozen=True)
class Plan:
    """The rows that are computed: the assignments that were not dropped, and some of them again with the weight 0.

    Args:
        token: (M,) int64, the token of each row.
        source: (M,) int64, its place among the routing's N assignments.
        real: (M,) float, 0 where an assignment is repeated, else 1; None where none is.
        runs: each class's rows.
    """

    token: Tensor
    source: Tensor
    real: Tensor | None
    runs: list[Run]

    def scale(self, weight: Tensor) -> Tensor:
        """(M, 1): the combine weights (N,) of the rows."""
        own = weight.index_select(0, self.source)
        return (own if self.real is None else own * self.real.to(own.dtype)).unsqueeze(1)

    def combine(self, rows: Tensor, num_tokens: int) -> Tensor:
        """(T, ...): the sum of each token's rows (M, ...)."""
        return rows.new_zeros(num_tokens, *rows.shape[1:]).index_add(0, self.token, rows)

    def weight_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """(N,): the gradient of the combine weights from that of the rows' (M,)."""
        if self.real is None:
            return torch.zeros_like(weight).index_copy(0, self.source, grad)
        return torch.zeros_like(weight).index_add(0, self.source, grad * self.real.to(grad.dtype))


def dispatch(classes: Sequence[Class], token_index: Tensor, expert_index: Tensor, has_drops: bool) -> Plan:
    """Sort a routing's assignments by class, bank and expert, the tokens in order; dropped ones are left out.

    Args:
        classes: the banks; each expert stands in exactly one.
        token_index: (N,) int64.
        expert_index: (N,) int64, -1 where dropped.
        has_drops: False where nothing is.
    """
    order = [p for banks in classes for positions in banks.positions for p in positions]
    num_experts = len(order)
    number = expert_index
    if has_drops or order != list(range(num_experts)):
        numbers = [num_experts] * (num_experts + 1)  # the last entry answers for -1, dropped
        for place, position in enumerate(order):
            numbers[position] = place
        table = torch.tensor(numbers, device=expert_index.device)
        number = table.index_select(0, expert_index % (num_experts + 1))
    expert, source = torch.sort(number, stable=True)
    counts = torch.bincount(expert, minlength=num_experts + 1).tolist()
    runs: list[Run] = []
    picks: list[Tensor] = []
    reals: list[Tensor] = []
    first = start = begin = 0  # the expert, its first assignment, and its first row
    for banks in classes:
        sizes = tuple(len(positions) for positions in banks.positions)
        own = counts[first : first + sum(sizes)]
        stop = start + sum(own)
        capacity = padded_size(own, sizes, banks.matrix)
        num_rows = len(own) * capacity if capacity else stop - start
        if num_rows > stop - start:
            pick, real = _repeat(own, start, capacity, source.device)
        else:
            pick = torch.arange(start, stop, device=source.device)
            real = torch.ones(stop - start, device=source.device)
        picks.append(pick)
        reals.append(real)
        local = expert[start:stop] - first if first else expert[start:stop]
        runs.append(Run(begin, begin + num_rows, own, sizes, local, capacity))
        first, start, begin = first + sum(sizes), stop, begin + num_rows
    if begin == start:  # nothing is repeated
        source, real = source[:start], None
    else:
        source, real = source.index_select(0, torch.cat(picks)), torch.cat(reals)
    return Plan(token_index.index_select(0, source), source, real, runs)


def _repeat(counts: Sequence[int], start: int, capacity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of the sorted assignments each of n C rows is, each expert's last one repeated; and 1.0 for its own."""
    count = torch.tensor(counts, device=device).unsqueeze(1)
    begin = start + count.cumsum(0) - count
    place = torch.arange(capacity, device=device)
    pick = begin + torch.minimum(place, count - 1)
    return pick.view(-1), (place < count).float().view(-1)
