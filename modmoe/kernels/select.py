"""Routing + groups of experts + x -> y, by a backend."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from modmoe.experts.base import Expert
from modmoe.kernels.batched import run_bmm, run_dense
from modmoe.kernels.choice import choose_backend, default_backend
from modmoe.kernels.fused import run_fused
from modmoe.kernels.grouped import run_grouped
from modmoe.kernels.reference import run_reference
from modmoe.kernels.triton import run_triton
from modmoe.pool import ExpertPool
from modmoe.routing import Routing
from modmoe.rows import Group

Backend = Literal["auto", "reference", "dense", "bmm", "grouped", "fused", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)
CPU_BACKENDS = tuple(backend for backend in BACKENDS if backend != "triton")


def compute_output(pool: ExpertPool, x: Tensor, routing: Routing, backend: str = "auto") -> Tensor:
    """The layer's output for a routing of flat triples: the weighted sum over each token's assignments.

    Args:
        pool: the experts.
        x: (T, D) tokens, zero in padding.
        routing: flat triples.
        backend: one of ``BACKENDS``.
    Returns:
        (T, D_out).
    """
    if backend == "auto":
        backend = choose_backend(pool.expert, pool.num_experts, x, routing).backend
    if backend == "fused":
        return run_fused([bank.to(x.dtype) for bank in pool.banks()], pool.expert, x, routing)
    if backend == "triton" and not torch.compiler.is_compiling():
        return run_triton([bank.to(x.dtype) for bank in pool.banks()], pool.expert, x, routing)
    groups = [group.to(x.dtype) for group in pool.groups()]
    return combine(compute_assignments(groups, pool.expert, x, routing, backend), routing)


def compute_assignments(
    groups: Sequence[Group], expert: Expert, x: Tensor, routing: Routing, backend: str = "auto"
) -> Tensor:
    """The output of every assignment's expert, not yet weighted.

    Args:
        groups: the pool's experts; each expert stands in exactly one group.
        expert: their kind.
        x: (T, D) tokens.
        routing: flat triples.
        backend: one of ``BACKENDS``.
    Returns:
        (N, D_out); zero for dropped assignments.
    """
    parts = []
    for group in groups:
        token, local = routing.token_index, _local_index(routing, group)
        part = None
        eager = not torch.compiler.is_compiling()
        partial = len(groups) > 1 or routing.has_drops
        if partial and eager:  # only this group's assignments; a compiled graph needs static sizes and keeps all
            part = (local >= 0).nonzero().squeeze(1)
            token, local = token.index_select(0, part), local.index_select(0, part)
        y = run_backend(backend, expert, group.tensors, x, token, local)
        parts.append((part, y))
    first_part, first = parts[0]
    if first_part is None:
        return torch.stack([y for _, y in parts]).sum(0) if len(parts) > 1 else first
    outputs = first.new_zeros(routing.token_index.shape[0], first.shape[1])
    return outputs.index_copy(0, torch.cat([part for part, _ in parts]), torch.cat([y for _, y in parts]))


def run_backend(
    backend: str, expert: Expert, tensors: dict[str, Tensor], x: Tensor, token: Tensor, local: Tensor
) -> Tensor:
    """One group's assignments by a backend, "auto" included; arguments as :func:`modmoe.kernels.batched.run_dense`."""
    num_experts = next(iter(tensors.values())).shape[0]
    name = backend
    if backend == "auto":
        name = default_backend(expert, num_experts, x.shape[0], x.dtype, x.device).backend
    if name in ("fused", "triton"):  # these compute the combination as well, which is not asked for here
        name = "grouped" if x.dtype != torch.float64 else "reference"
    if name == "dense":
        return run_dense(expert, tensors, x, token, local)
    run = {"reference": run_reference, "bmm": run_bmm, "grouped": run_grouped}[name]
    return run(expert, tensors, x.index_select(0, token), local)


def combine(outputs: Tensor, routing: Routing) -> Tensor:
    """Weighted sum over each token's assignments: (N, D_out) -> (T, D_out)."""
    weighted = outputs * routing.weight.to(outputs.dtype).unsqueeze(1)
    if routing.top_k is not None:
        return weighted.view(routing.num_tokens, routing.top_k, weighted.shape[1]).sum(1)
    return weighted.new_zeros(routing.num_tokens, weighted.shape[1]).index_add(0, routing.token_index, weighted)


def _local_index(routing: Routing, group: Group) -> Tensor:
    """(N,) position of each assignment's expert within the group, -1 where it is not in the group."""
    table = [-1] * (routing.num_experts + 1)  # the last entry answers for -1, dropped
    for index, position in enumerate(group.positions):
        table[position] = index
    device = routing.expert_index.device
    return torch.tensor(table, device=device).index_select(0, routing.expert_index % (routing.num_experts + 1))
