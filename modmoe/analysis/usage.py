"""How evenly the experts are used, from what the router decided."""

import torch
from torch import Tensor

from modmoe.analysis.specialization import (
    joint_distribution,
    mean_entropy,
    mutual_information,
    token_entropy,
    token_expert_information,
)
from modmoe.routing import Routing


def usage_metrics(routing: Routing, tasks: Tensor | None = None) -> dict[str, float]:
    """Sum up one routing by name.

    - ``dropped_fraction``: see :func:`dropped_fraction`.
    - ``load_cv``, ``max_violation``, ``dead_experts`` (how many): of the load that the experts received.
    - ``token_entropy``, ``mean_entropy``, ``token_expert_information``: of the real tokens' probabilities.
    - ``task_expert_information``, where tasks are given: the mutual information of a token's task and its expert, each
      assignment counting once.

    Use it layer by layer: layers that are unbalanced in opposite ways would balance out together.

    Args:
        routing: what a router decided, ``layer.routing``.
        tasks: (T,) int64 at least 0, the task of each token; that of padding does not matter.
    Raises:
        ValueError: if no token was assigned to any expert, or as the functions above raise.
    """
    counts = routing.load
    metrics = {
        "dropped_fraction": dropped_fraction(routing),
        "load_cv": coefficient_of_variation(counts),
        "max_violation": max_violation(counts),
        "dead_experts": float(len(dead_experts(counts))),
        "token_entropy": token_entropy(routing.probs, routing.mask),
        "mean_entropy": mean_entropy(routing.probs, routing.mask),
        "token_expert_information": token_expert_information(routing.probs, routing.mask),
    }
    if tasks is not None:
        if tasks.shape != (routing.num_tokens,):
            raise ValueError(f"a task for each of {routing.num_tokens} tokens is needed, got {tuple(tasks.shape)}")
        kept = routing.expert_index >= 0
        of_assignments = tasks[routing.token_index[kept]]
        joint = joint_distribution(
            of_assignments, routing.expert_index[kept], int(of_assignments.max()) + 1, routing.num_experts
        )
        metrics["task_expert_information"] = mutual_information(joint)
    return metrics


def dropped_fraction(routing: Routing) -> float:
    """Measure what a capacity limit dropped: dropped assignments / requested ones; padding requests none.

    Args:
        routing: what a router decided.
    Returns:
        A number in [0, 1]; 0 where there is no limit, or nothing was requested.
    """
    if routing.requested is None:
        return 0.0
    requested = routing.requested >= 0
    dropped = requested & (routing.expert_index < 0)
    return float(dropped.sum() / requested.sum().clamp(min=1))


def load(expert_index: Tensor, num_experts: int) -> Tensor:
    """Count the assignments of each expert; -1 (dropped) is not counted.

    Args:
        expert_index: integers of any shape in [-1, num_experts).
        num_experts: E.
    Returns:
        (E,) int64.
    Raises:
        ValueError: if expert_index holds no integers or one out of range.
    """
    if expert_index.is_floating_point() or expert_index.is_complex() or expert_index.dtype == torch.bool:
        raise ValueError(f"expert_index must be integers, got {expert_index.dtype}")
    flat = expert_index.detach().reshape(-1).to(torch.int64)
    if flat.numel() and (int(flat.min()) < -1 or int(flat.max()) >= num_experts):
        raise ValueError(f"expert_index must lie in [-1, {num_experts}), got {int(flat.min())} to {int(flat.max())}")
    return torch.bincount(flat[flat >= 0], minlength=num_experts)


def coefficient_of_variation(counts: Tensor) -> float:
    """Measure imbalance: standard deviation (population) / mean of the counts; 0 is perfect balance.

    Args:
        counts: (E,) numbers, non-negative.
    Returns:
        A number in [0, sqrt(E - 1)].
    Raises:
        ValueError: if counts is not 1-D, is empty, is negative somewhere or sums to 0.
    """
    counts = _counts(counts)
    return float(counts.std(correction=0) / counts.mean())


def max_violation(counts: Tensor) -> float:
    """Measure how far the busiest expert is above its share: max / mean - 1; 0 is perfect balance.

    Args:
        counts: (E,) numbers, non-negative.
    Returns:
        A number in [0, E - 1].
    Raises:
        ValueError: if counts is not 1-D, is empty, is negative somewhere or sums to 0.
    Source:
        MaxVio of Wang et al. 2024, auxiliary-loss-free load balancing.
    """
    counts = _counts(counts)
    return float(counts.max() / counts.mean() - 1)


def dead_experts(counts: Tensor) -> list[int]:
    """List the positions of the experts with zero load.

    Args:
        counts: (E,) numbers, non-negative.
    Returns:
        Positions, ascending.
    Raises:
        ValueError: if counts is not 1-D, is empty, is negative somewhere or sums to 0.
    """
    return torch.nonzero(_counts(counts) == 0).flatten().tolist()


def _counts(counts: Tensor) -> Tensor:
    if counts.ndim != 1 or counts.numel() == 0:
        raise ValueError(f"counts must be a non-empty (num_experts,) vector, got shape {tuple(counts.shape)}")
    counts = counts.detach().to(torch.float64)
    if bool((counts < 0).any()):
        raise ValueError("counts holds a negative number")
    if float(counts.sum()) == 0:
        raise ValueError("counts sums to 0: no token was assigned to any expert")
    return counts
