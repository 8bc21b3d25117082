"""Streams of real data, split into tasks, as tensors and as Avalanche benchmarks."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.benchmarks.scenarios.dataset_scenario import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from torch import Tensor
from torch.utils.data import TensorDataset

from modmoe.hosts import import_host


@dataclass(frozen=True)
class TaskData:
    """One task: inputs (n, ...) float32 and class ids (n,) int64, for training and test."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def classes(self) -> list[int]:
        """The classes of the training data, sorted."""
        return self.train_y.unique().tolist()


def split_digits(seed: int, num_tasks: int = 5, test_share: float = 0.25) -> list[TaskData]:
    """scikit-learn's 1,797 real 8x8 digits in tasks of equal numbers of classes, in the order 0, 1, ..., 9.

    Args:
        seed: of the stratified split into training and test data.
        num_tasks: a divisor of 10.
        test_share: of each class, in (0, 1).
    Returns:
        The tasks; inputs are (n, 64) in [0, 1].
    Raises:
        ValueError: if num_tasks does not divide 10 or test_share is not in (0, 1).
    """
    if num_tasks < 1 or 10 % num_tasks:
        raise ValueError(f"num_tasks must divide the 10 classes, got {num_tasks}")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must lie in (0, 1), got {test_share}")
    digits = import_host("sklearn.datasets").load_digits()
    split = import_host("sklearn.model_selection").train_test_split
    train, test = split(range(len(digits.target)), test_size=test_share, random_state=seed, stratify=digits.target)
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target, dtype=torch.int64)
    per_task = 10 // num_tasks

    def of_task(index: Sequence[int], task: int) -> Tensor:
        chosen = torch.tensor(index)
        return chosen[y[chosen] // per_task == task]

    return [
        TaskData(*(tensor[of_task(index, task)] for index in (train, test) for tensor in (x, y)))
        for task in range(num_tasks)
    ]


def to_benchmark(tasks: Sequence[TaskData]) -> Any:
    """The same tasks as an Avalanche benchmark with one experience each."""

    def dataset(x: Tensor, y: Tensor) -> Any:
        tensors = TensorDataset(x, y)
        tensors.targets = y.tolist()  # type: ignore[attr-defined]  # where Avalanche looks for them
        return as_classification_dataset(tensors)  # type: ignore[arg-type]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return benchmark_from_datasets(
            train=[dataset(task.train_x, task.train_y) for task in tasks],
            test=[dataset(task.test_x, task.test_y) for task in tasks],
        )
