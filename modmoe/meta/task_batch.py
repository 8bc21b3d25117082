"""Several few-shot tasks as tensors: what every model of this package reads.

Axes: B tasks, C context points, N target points, D inputs, M outputs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskBatch:
    """Context points with their outputs, and target points.

    Args:
        context_x: (B, C, D) float.
        context_y: (B, C, M) float.
        target_x: (B, N, D) float.
        target_y: (B, N, M) float, or None where it is not known.
        context_mask: (B, C) bool, True for points that are there; None means all. Where it is False, x and y may be
            anything, NaN included.
    Raises:
        ValueError: on shapes that do not go together, or a number of context or target points that is not finite;
            the message names the tensor.
    """

    context_x: Tensor
    context_y: Tensor
    target_x: Tensor
    target_y: Tensor | None = None
    context_mask: Tensor | None = None

    def __post_init__(self) -> None:
        num_tasks, num_context = self._check_points("context", self.context_x, self.context_y)
        num_targets = self._check_points("target", self.target_x, self.target_y)[0]
        if num_targets != num_tasks or self.target_x.shape[2] != self.context_x.shape[2]:
            raise ValueError(
                f"targets belong to the tasks of the context: context_x is {tuple(self.context_x.shape)}, "
                f"target_x {tuple(self.target_x.shape)}"
            )
        mask = self.context_mask
        if mask is not None and (mask.shape != (num_tasks, num_context) or mask.dtype != torch.bool):
            raise ValueError(f"context_mask is bool {(num_tasks, num_context)}, got {mask.dtype} {tuple(mask.shape)}")
        present = self.present
        for name, values in (("context_x", self.context_x), ("context_y", self.context_y)):
            if not bool((values.isfinite().all(2) | ~present).all()):
                raise ValueError(f"{name} has numbers that are not finite: mask such points out with context_mask")
        for name, values in (("target_x", self.target_x), ("target_y", self.target_y)):
            if values is not None and not bool(values.isfinite().all()):
                raise ValueError(f"{name} has numbers that are not finite")

    @staticmethod
    def _check_points(name: str, x: Tensor, y: Tensor | None) -> tuple[int, int]:
        if x.dim() != 3 or (y is not None and (y.dim() != 3 or y.shape[:2] != x.shape[:2])):
            shapes = tuple(x.shape), None if y is None else tuple(y.shape)
            raise ValueError(f"{name}_x is (tasks, points, inputs) and {name}_y (tasks, points, outputs), got {shapes}")
        return x.shape[0], x.shape[1]

    @property
    def num_tasks(self) -> int:
        """B."""
        return self.context_x.shape[0]

    @property
    def present(self) -> Tensor:
        """(B, C) bool: which context points are there."""
        if self.context_mask is None:
            return torch.ones(self.context_x.shape[:2], dtype=torch.bool, device=self.context_x.device)
        return self.context_mask

    def clean_context(self) -> tuple[Tensor, Tensor]:
        """context_x and context_y with zeros where no point is, so that a NaN there does not spread."""
        if self.context_mask is None:
            return self.context_x, self.context_y
        mask = self.context_mask.unsqueeze(2)
        return self.context_x.masked_fill(~mask, 0.0), self.context_y.masked_fill(~mask, 0.0)

    def to(self, *args: Any, **kwargs: Any) -> "TaskBatch":
        """Every tensor as ``Tensor.to`` gives it; the mask keeps its dtype."""

        def move(value: Tensor) -> Tensor:
            return value.to(*args, **kwargs)

        target_y = None if self.target_y is None else move(self.target_y)
        mask = None if self.context_mask is None else move(self.context_mask).bool()
        return TaskBatch(move(self.context_x), move(self.context_y), move(self.target_x), target_y, mask)

    def __getitem__(self, rows: slice) -> "TaskBatch":
        """Some of the tasks."""
        target_y = None if self.target_y is None else self.target_y[rows]
        mask = None if self.context_mask is None else self.context_mask[rows]
        return TaskBatch(self.context_x[rows], self.context_y[rows], self.target_x[rows], target_y, mask)
