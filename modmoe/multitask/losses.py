"""The loss of several tasks: masked where labels are missing, and balanced."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modmoe.multitask.model import TaskKind, Tasks

Balance = Mapping[str, float] | Callable[[dict[str, Tensor]], Tensor]
"""A weight for each task, or what makes one loss () of the losses of the tasks that have labels in a batch."""


def task_losses(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], tasks: Tasks) -> dict[str, Tensor]:
    """The mean loss of each task over the samples that have its label.

    Regression: mean (y - t)^2. Binary: mean of -t log s(y) - (1 - t) log(1 - s(y)), with s the sigmoid.

    Args:
        outputs: task -> (B,) float, numbers or logits.
        targets: task -> (B,) float, NaN where a label is missing; 0 or 1 (or between) for binary tasks.
        tasks: name -> kind.
    Returns:
        task -> () float, of the tasks that have a label in this batch.
    Raises:
        ValueError: on a missing task or a wrong shape; if no task has a label; or a binary label outside [0, 1].
    """
    losses = {}
    for name, kind in tasks.items():
        if name not in outputs or name not in targets:
            raise ValueError(f"task '{name}' needs an output and a target, got {list(outputs)} and {list(targets)}")
        output, target = outputs[name], targets[name]
        if output.shape != target.shape or output.dim() != 1:
            raise ValueError(f"task '{name}': outputs and targets (B,) are needed, got {_shapes(output, target)}")
        labelled = ~target.isnan()
        if not labelled.any():
            continue
        target = target.to(output.dtype)
        if not labelled.all():  # picked before the loss: NaN times zero would reach the gradients
            output, target = output[labelled], target[labelled]
        if kind == "regression":
            losses[name] = F.mse_loss(output, target)
            continue
        if target.min() < 0 or target.max() > 1:
            raise ValueError(f"labels of the binary task '{name}' must lie in [0, 1]")
        losses[name] = F.binary_cross_entropy_with_logits(output, target)
    if not losses:
        raise ValueError(f"no task of {list(tasks)} has a label in this batch")
    return losses


def multitask_loss(
    outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], tasks: Tasks, balance: Balance | None = None
) -> Tensor:
    """One loss of all tasks: sum_k w_k L_k, or what ``balance`` makes of the L_k.

    Args:
        outputs: see :func:`task_losses`, and so for the next two.
        targets: task -> (B,) float.
        tasks: name -> kind.
        balance: None for the sum; a weight for each task; or a function, for instance an UncertaintyWeighting.
    Returns:
        () float.
    Raises:
        ValueError: as task_losses, or if a task has no weight.
    """
    losses = task_losses(outputs, targets, tasks)
    if balance is None:
        return torch.stack(list(losses.values())).sum()
    if callable(balance):
        return balance(losses)
    missing = [name for name in tasks if name not in balance]
    if missing:
        raise ValueError(f"balance has no weight for {missing}")
    return torch.stack([balance[name] * loss for name, loss in losses.items()]).sum()


class UncertaintyWeighting(nn.Module):
    """sum_k c_k exp(-s_k) L_k + s_k / 2, with c = 1/2 for regression and 1 for binary tasks, and s_k = log sigma_k^2.

    The s_k start at 0 and are trained beside the model: give the optimizer these parameters, too.

    Args:
        tasks: name -> kind.
    Raises:
        ValueError: if there is no task.
    Source:
        Kendall, Gal and Cipolla 2018, Multi-Task Learning Using Uncertainty: minus the log-likelihood of a regression
        with noise sigma, and of a classification at the temperature sigma^2 (approximated as there).
    """

    def __init__(self, tasks: Tasks):
        super().__init__()
        if not tasks:
            raise ValueError("balancing needs at least one task")
        self.kinds: dict[str, TaskKind] = dict(tasks)
        self.log_variance = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in tasks})

    def add_task(self, name: str, kind: TaskKind) -> None:
        """Balance one more task.

        Raises:
            ValueError: if the name is taken.
        """
        if name in self.kinds:
            raise ValueError(f"task '{name}' is balanced already")
        like = next(self.log_variance.parameters())
        self.log_variance[name] = nn.Parameter(torch.zeros_like(like))
        self.kinds[name] = kind

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        """task -> loss () of those that have labels, to one loss ()."""
        terms = []
        for name, loss in losses.items():
            s, factor = self.log_variance[name], 0.5 if self.kinds[name] == "regression" else 1.0
            terms.append(factor * torch.exp(-s) * loss + s / 2)
        return torch.stack(terms).sum()


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
