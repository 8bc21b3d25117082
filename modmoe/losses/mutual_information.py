"""Let each task use experts of its own."""

import torch
from torch import Tensor

from modmoe.losses.z import require


def mutual_information_loss(joint: Tensor) -> Tensor:
    """Reward experts that tell tasks apart: minus the mutual information of task and expert, in nats.

    L = -sum_te P(t, e) log(P(t, e) / (P(t) P(e)))

    It is 0 where every task uses the experts alike, and -log(number of tasks) where equally frequent tasks share none.
    For each layer on its own, as all losses here.

    Args:
        joint: (number of tasks, E) float, at least 0, summing to 1: for instance the mean of ``routing.probs`` over
            the real tokens of each task, times that task's share of them.
    Returns:
        () float, at least float32.
    Raises:
        ValueError: if joint is not a matrix, has a negative entry or does not sum to 1.
    Source:
        Mod-Squad, Chen et al. 2022. A pair without probability adds nothing, and gets a finite gradient.
    """
    if joint.dim() != 2 or joint.numel() == 0:
        raise ValueError(f"joint must be (number of tasks, E), got {tuple(joint.shape)}")
    joint = joint.to(torch.promote_types(joint.dtype, torch.float32))
    require((joint >= 0).all(), "joint has a negative entry")
    require((joint.sum() - 1).abs() <= 1e-3, "joint must sum to 1")
    return _entropy(joint) - _entropy(joint.sum(0)) - _entropy(joint.sum(1))


def _entropy(probs: Tensor) -> Tensor:
    # masked before the logarithm, whose gradient at 0 is infinite
    return -(probs * torch.where(probs > 0, probs, 1.0).log()).sum()
