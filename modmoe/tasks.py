"""Which experts are open to which token: those of its task, and what the caller allows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from modmoe.pool import ExpertPool
from modmoe.rows import Task

TaskIds = Task | Sequence[Task] | Tensor


def open_experts(
    pool: ExpertPool, shape: torch.Size, device: torch.device, task_ids: TaskIds | None, expert_mask: Tensor | None
) -> Tensor | None:
    """What a call's tasks and mask allow.

    Args:
        pool: the experts.
        shape: (...) of the tokens.
        device: of the result.
        task_ids: as of ``MoELayer.forward``.
        expert_mask: (E,) or (..., E) bool, or None.
    Returns:
        (E,) or (T, E) bool, or None for all.
    Raises:
        ValueError: on a wrong shape or dtype, or a task that no expert serves.
    """
    allowed = None
    if expert_mask is not None:
        wanted = ((pool.num_experts,), (*shape, pool.num_experts))
        if expert_mask.dtype != torch.bool or expert_mask.shape not in wanted:
            raise ValueError(
                f"a bool expert_mask of shape {wanted[0]} or {wanted[1]} is needed, "
                f"got {expert_mask.dtype} {tuple(expert_mask.shape)}"
            )
        allowed = expert_mask if expert_mask.dim() == 1 else expert_mask.reshape(-1, pool.num_experts)
    if task_ids is not None:
        by_task = _by_task(pool, task_ids, shape, device)
        allowed = by_task if allowed is None else by_task & allowed
    return allowed


def _by_task(pool: ExpertPool, task_ids: TaskIds, shape: torch.Size, device: torch.device) -> Tensor:
    owners = pool.tasks()
    if isinstance(task_ids, Tensor) and task_ids.dim() == 0:
        task_ids = int(task_ids)
    if isinstance(task_ids, Task):
        _check(pool, [task_ids])
        return torch.tensor([owner is None or owner == task_ids for owner in owners], device=device)
    labels = task_ids.reshape(-1).tolist() if isinstance(task_ids, Tensor) else list(task_ids)
    num_tokens, num_entries = shape.numel(), shape[0] if shape else 1
    if len(labels) not in (num_entries, num_tokens):
        raise ValueError(f"{len(labels)} task ids for {num_entries} entries ({num_tokens} tokens)")
    known = list(dict.fromkeys(labels))
    _check(pool, known)
    table = torch.tensor([[o is None or o == task for o in owners] for task in known], dtype=torch.bool, device=device)
    index = torch.tensor([known.index(label) for label in labels], dtype=torch.int64, device=device)
    if len(labels) != num_tokens:
        index = index.repeat_interleave(num_tokens // num_entries)
    return table.view(-1, len(owners)).index_select(0, index)


def _check(pool: ExpertPool, tasks: Sequence[Task]) -> None:
    owners = pool.tasks()
    if None in owners:
        return  # experts without a task serve any task
    unknown = [task for task in tasks if task not in owners]
    if unknown:
        raise ValueError(f"no expert belongs to task {unknown}, the pool has {list(dict.fromkeys(owners))}")
