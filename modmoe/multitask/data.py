"""A table of samples with a label for each task."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modmoe.multitask.model import Tasks


@dataclass
class MultiTaskData:
    """Samples and their labels, some of which may be missing.

    Args:
        dense: (n, num_dense) float, or None.
        categorical: (n, number of categorical features) int64, or None.
        targets: task -> (n,) float, NaN where a label is missing.
        tasks: name -> "regression" or "binary"; each has at least one label.
        cardinalities: of the categorical features.
    Raises:
        ValueError: if there are no samples, lengths differ, or a task has no labels at all.
    """

    dense: Tensor | None
    categorical: Tensor | None
    targets: dict[str, Tensor]
    tasks: Tasks
    cardinalities: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(part) for part in (self.dense, self.categorical, *self.targets.values()) if part is not None}
        if len(lengths) != 1 or not len(self):
            raise ValueError(f"features and targets need one and the same number of samples, got {sorted(lengths)}")
        for name in self.tasks:
            if name not in self.targets:
                raise ValueError(f"task '{name}' has no targets, there are {list(self.targets)}")
            if self.targets[name].isnan().all():
                raise ValueError(f"task '{name}' has no labels at all: every target is NaN")

    def __len__(self) -> int:
        return len(next(iter(self.targets.values()), ()))

    @property
    def num_dense(self) -> int:
        return 0 if self.dense is None else self.dense.shape[1]

    def inputs(self, index: Tensor | slice) -> tuple[Tensor | None, Tensor | None]:
        """(dense, categorical) of the samples at an index: what a model takes."""
        dense, categorical = self.dense, self.categorical
        return None if dense is None else dense[index], None if categorical is None else categorical[index]

    def labels(self, index: Tensor | slice) -> dict[str, Tensor]:
        """task -> targets of the samples at an index."""
        return {name: target[index] for name, target in self.targets.items()}

    def taken(self, index: Tensor | slice) -> "MultiTaskData":
        """The samples at an index."""
        return MultiTaskData(*self.inputs(index), self.labels(index), self.tasks, self.cardinalities)

    def first(self, count: int | None) -> "MultiTaskData":
        """The first samples; None for all."""
        return self if count is None else self.taken(slice(0, count))

    def batches(self, batch_size: int, generator: torch.Generator) -> list[Tensor]:
        """The indices of the samples in a random order, cut into batches."""
        return list(torch.randperm(len(self), generator=generator).split(batch_size))
