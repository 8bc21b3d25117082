"""Routings that are no flat triples: experts that compute mixtures of tokens, and mixtures of experts' weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from modmoe.experts.base import Expert
from modmoe.kernels.batched import BatchedOps
from modmoe.kernels.select import run_backend
from modmoe.routing import MergedRouting, SlotRouting
from modmoe.rows import Group


def run_blended(
    x: Tensor, groups: Sequence[Group], expert: Expert, routing: SlotRouting | MergedRouting, backend: str = "auto"
) -> Tensor:
    """The layer's output for a routing that is no flat triples: (T, D) -> (T, D_out), zero in padding.

    Args:
        x: (T, D), zero in padding.
        groups: the pool's experts; each expert stands in exactly one group.
        expert: their kind.
        routing: what the router decided.
        backend: one of ``modmoe.kernels.select.BACKENDS``, for merged experts.
    """
    if isinstance(routing, SlotRouting):
        return run_slots(x, groups, expert, routing)
    return run_merged(x, groups, expert, routing, backend)


def run_slots(x: Tensor, groups: Sequence[Group], expert: Expert, routing: SlotRouting) -> Tensor:
    """y_bs = sum_ep combine_bsep f_e(sum_s' dispatch_bs'ep x_bs').

    Every expert has the same number of slots, so that a batched product wastes nothing, whatever the backend.

    Args:
        x: (T, D), T = B S, zero in padding.
        groups: the pool's experts; each expert stands in exactly one group.
        expert: their kind.
        routing: the slots' weights.
    Returns:
        (T, D_out), zero in padding.
    """
    num_sequences, length, num_experts, num_slots = routing.dispatch.shape
    sequences = x.view(num_sequences, length, x.shape[1])
    slots = torch.einsum("bsep,bsd->ebpd", routing.dispatch.to(x.dtype), sequences)
    slots = slots.reshape(num_experts, num_sequences * num_slots, x.shape[1])
    outputs, positions = [], []
    for group in groups:
        own = torch.tensor(group.positions, device=x.device)
        outputs.append(expert.compute(slots.index_select(0, own), BatchedOps(group.tensors)))
        positions.append(own)
    y = torch.cat(outputs).index_select(0, torch.cat(positions).argsort())  # back into pool order
    y = y.view(num_experts, num_sequences, num_slots, y.shape[-1])
    return torch.einsum("bsep,ebpd->bsd", routing.combine.to(y.dtype), y).reshape(len(x), y.shape[-1])


def run_merged(
    x: Tensor, groups: Sequence[Group], expert: Expert, routing: MergedRouting, backend: str = "auto"
) -> Tensor:
    """Merge the experts' rows, then compute each token with its merge: M experts, one for each token.

    A merge costs as much memory as one expert: M of them are made.

    Args:
        x: (T, D).
        groups: the pool's experts; each expert stands in exactly one group.
        expert: their kind.
        routing: the merges.
        backend: one of ``modmoe.kernels.select.BACKENDS``; the merges take the place of the experts.
    Returns:
        (T, D_out), zero in padding.
    Raises:
        ValueError: if the experts differ in size.
    """
    merged = merge_rows(groups, routing.merge_weight)
    token = torch.arange(len(x), device=x.device)
    return run_backend(backend, expert, merged, x, token, routing.merge_index)


def merge_rows(groups: Sequence[Group], weight: Tensor) -> dict[str, Tensor]:
    """Every row's weighted sum over the experts.

    Args:
        groups: the pool's experts; each expert stands in exactly one group.
        weight: (M, E) float, experts in pool order.
    Returns:
        row name -> (M, ...).
    Raises:
        ValueError: if the experts differ in size.
    """
    merged = {}
    for name, first in groups[0].tensors.items():
        parts = []
        for group in groups:
            rows = group.tensors[name]
            if rows.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"only experts of equal sizes can be merged: '{name}' is {tuple(first.shape[1:])} in experts "
                    f"{list(groups[0].ids)} and {tuple(rows.shape[1:])} in experts {list(group.ids)}"
                )
            own = weight.index_select(1, torch.tensor(group.positions, device=weight.device))
            parts.append((own.to(rows.dtype) @ rows.flatten(1)).view(len(weight), *rows.shape[1:]))
        merged[name] = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    return merged
