"""How far experts specialise: in tasks, from pairs (task of a sample, expert that handled it), and in tokens."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Integers = Tensor | np.ndarray | list[int]


def joint_distribution(tasks: Integers, experts: Integers, num_tasks: int, num_experts: int) -> Tensor:
    """Estimate the joint distribution: p(t, e) = count(task = t, expert = e) / N.

    Args:
        tasks: (N,) integers in [0, num_tasks).
        experts: (N,) integers in [0, num_experts), positions of experts.
        num_tasks: rows of the result.
        num_experts: columns of the result.
    Returns:
        (num_tasks, num_experts) float64, summing to 1.
    Raises:
        ValueError: if the inputs are empty, not 1-D integers of equal length, or out of range.
    """
    tasks, experts = _pairs(tasks, experts)
    _check_range("tasks", tasks, num_tasks)
    _check_range("experts", experts, num_experts)
    counts = torch.bincount(tasks * num_experts + experts, minlength=num_tasks * num_experts)
    return counts.reshape(num_tasks, num_experts).to(torch.float64) / tasks.numel()


def mutual_information(joint: Tensor | np.ndarray, normalize: bool = False) -> float:
    """Measure what the expert tells about the task: MI = sum p(t, e) log(p(t, e) / (p(t) p(e))), in nats.

    Args:
        joint: (num_tasks, num_experts) float, non-negative, summing to 1.
        normalize: divide by the entropy H(task) = -sum p(t) log p(t), so that 1 means that the expert tells
            the task exactly; 0 where H(task) is 0.
    Returns:
        The mutual information, at least 0.
    Raises:
        ValueError: if joint is not 2-D, is empty, has a negative entry or does not sum to 1.
    """
    joint = torch.as_tensor(joint).to(torch.float64)
    if joint.ndim != 2 or joint.numel() == 0:
        raise ValueError(f"joint must be a non-empty (num_tasks, num_experts) matrix, got shape {tuple(joint.shape)}")
    if bool((joint < 0).any()):
        raise ValueError("joint has a negative entry")
    total = float(joint.sum())
    # Written so that NaN fails too; 1e-4 lets a float32 joint pass.
    if not abs(total - 1.0) <= 1e-4:
        raise ValueError(f"joint must sum to 1, it sums to {total:.6g}")
    task, expert = joint.sum(dim=1), joint.sum(dim=0)
    # MI = H(task) + H(expert) - H(task, expert); rounding may leave it just below 0.
    information = max(0.0, _entropy(task) + _entropy(expert) - _entropy(joint))
    if not normalize:
        return information
    entropy = _entropy(task)
    return information / entropy if entropy > 0 else 0.0


def assignment_accuracy(
    tasks: Integers, experts: Integers, owner: Mapping[int, int] | Tensor | np.ndarray | list[int]
) -> float:
    """Measure the fraction of samples whose expert belongs to the sample's task: mean(owner[e] == t).

    Args:
        tasks: (N,) integers, at least 0.
        experts: (N,) integers, at least 0, positions of experts.
        owner: expert position -> task, as a mapping or as (num_experts,) integers.
    Returns:
        A fraction in [0, 1].
    Raises:
        ValueError: if the inputs are empty, not 1-D integers of equal length, negative, or an expert has no
            owner.
    """
    tasks, experts = _pairs(tasks, experts)
    _check_range("tasks", tasks, None)
    _check_range("experts", experts, None)
    if not isinstance(owner, Mapping):
        owner = dict(enumerate(_integers("owner", owner).tolist()))
    used, position = torch.unique(experts, return_inverse=True)
    unowned = [expert for expert in used.tolist() if expert not in owner]
    if unowned:
        raise ValueError(f"experts {unowned} have no owner")
    owners = torch.tensor([int(owner[expert]) for expert in used.tolist()])
    return float((owners[position] == tasks).to(torch.float64).mean())


def token_entropy(probs: Tensor, mask: Tensor | None = None) -> float:
    """Measure how undecided the router is: mean over tokens of H(p_t) = -sum_e p_te log p_te, in nats.

    Args:
        probs: (T, E) float, each real token's row a distribution.
        mask: (T,) bool, True for real tokens; None means all.
    Returns:
        A number in [0, log E].
    Raises:
        ValueError: if no token is real, or a real token's row is negative somewhere or does not sum to 1.
    """
    return float(torch.special.entr(_real_rows(probs, mask)).sum(1).mean())


def mean_entropy(probs: Tensor, mask: Tensor | None = None) -> float:
    """Measure how evenly the tokens together use the experts: H(mean_t p_t), in nats; log E where it is perfect.

    Args, returns and raises as :func:`token_entropy`.
    """
    return _entropy(_real_rows(probs, mask).mean(0))


def token_expert_information(probs: Tensor, mask: Tensor | None = None) -> float:
    """Measure what the token tells about its expert: MI = H(mean_t p_t) - mean_t H(p_t), in nats.

    It is high where each token is sure of its expert and all experts are used.

    Args, returns and raises as :func:`token_entropy`.
    """
    return max(0.0, mean_entropy(probs, mask) - token_entropy(probs, mask))  # rounding may leave it just below 0


def _real_rows(probs: Tensor, mask: Tensor | None) -> Tensor:
    """(number of real tokens, E) float64."""
    if probs.ndim != 2:
        raise ValueError(f"probs must be (num_tokens, num_experts), got shape {tuple(probs.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != probs.shape[:1]):
        raise ValueError(
            f"a bool mask of shape {tuple(probs.shape[:1])} is needed, got {mask.dtype} {tuple(mask.shape)}"
        )
    rows = probs.detach().to(torch.float64)
    rows = rows if mask is None else rows[mask]
    if rows.numel() == 0:
        raise ValueError("probs has no real token")
    # Written so that NaN fails too; 1e-2 lets bfloat16 probabilities pass.
    if not bool(((rows >= 0).all(1) & ((rows.sum(1) - 1).abs() <= 1e-2)).all()):
        raise ValueError("each row of probs must be non-negative and sum to 1")
    return rows


def _entropy(probabilities: Tensor) -> float:
    return float(torch.special.entr(probabilities).sum())


def _integers(name: str, values: Integers) -> Tensor:
    values = torch.as_tensor(values).detach().cpu()
    if values.ndim != 1:
        raise ValueError(f"{name} must be 1-D, got shape {tuple(values.shape)}")
    if values.numel() == 0:
        raise ValueError(f"{name} is empty")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {values.dtype}")
    return values.to(torch.int64)


def _pairs(tasks: Integers, experts: Integers) -> tuple[Tensor, Tensor]:
    tasks, experts = _integers("tasks", tasks), _integers("experts", experts)
    if tasks.numel() != experts.numel():
        raise ValueError(f"tasks and experts differ in length: {tasks.numel()} and {experts.numel()}")
    return tasks, experts


def _check_range(name: str, values: Tensor, limit: int | None) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0:
        raise ValueError(f"{name} holds a negative number, {low}")
    if limit is not None and high >= limit:
        raise ValueError(f"{name} holds {high}, which is not below {limit}")
