"""Streams of real data, cut into tasks, as tensors and as Avalanche benchmarks.

``STREAMS`` names them all. Class-incremental streams bring new classes with every task; domain-incremental ones bring
the same classes in a new guise (`shares_classes` tells them apart). No input says which task it comes from.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.scenarios.dataset_scenario import benchmark_from_datasets
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
from avalanche.benchmarks.scenarios.task_aware import with_task_labels
from avalanche.benchmarks.utils import (
    ConstantSequence,
    TaskLabels,
    as_classification_dataset,
    as_taskaware_classification_dataset,
)
from scipy import ndimage
from torch import Tensor
from torch.utils.data import TensorDataset

from modmoe.continual.datasets import load_digits, load_images, load_mnist5k, stratified_split


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


@dataclass(frozen=True)
class StreamSettings:
    """What a stream of `STREAMS` can be told.

    Args:
        num_tasks: None for the stream's own number: 3 for ``mnist_fashion_animals``, 5 for the others.
        test_share: of each class, in (0, 1), where the data come without a split: the digits and ``split_mnist5k``.
        root: the folder of `modmoe.continual.datasets.load_images`.
        limit: keep at most so many images of each class for training, and as many for the test; None keeps all.
    """

    num_tasks: int | None = None
    test_share: float = 0.25
    root: str = "data"
    limit: int | None = None


Stream = Callable[[StreamSettings, int], list[TaskData]]


def load_stream(name: str, seed: int, settings: StreamSettings | None = None) -> list[TaskData]:
    """The tasks of one of `STREAMS`.

    Args:
        name: a key of `STREAMS`.
        seed: draws the split where the data have none, the permutations, and the images that a limit keeps.
        settings: None for the defaults.
    Raises:
        ValueError: if the name is unknown or a setting does not fit the stream.
        DataNotFoundError: if the data are not below ``settings.root``.
    """
    if name not in STREAMS:
        raise ValueError(f"unknown stream {name!r}, choose from {', '.join(STREAMS)}")
    return STREAMS[name](settings or StreamSettings(), seed)


def num_classes(tasks: Sequence[TaskData]) -> int:
    """Width of a classifier for all tasks: the highest class id plus one."""
    return 1 + max(int(y.max()) for task in tasks for y in (task.train_y, task.test_y))


def shares_classes(tasks: Sequence[TaskData]) -> bool:
    """Whether some class comes in more than one task, as in every domain-incremental stream."""
    return sum(len(task.classes) for task in tasks) > len({label for task in tasks for label in task.classes})


# -- from one data set to tasks ----------------------------------------------------------------------------


def split_classes(data: TaskData, num_tasks: int) -> list[TaskData]:
    """Class-incremental: tasks of equal numbers of classes, in the order 0, 1, ..., 9.

    Raises:
        ValueError: if num_tasks does not divide the classes, or they are not 0, 1, 2, ....
    """
    total = len(data.classes)
    if data.classes != list(range(total)):
        raise ValueError(f"the classes must be 0, 1, 2, ..., got {data.classes}")
    if num_tasks < 1 or total % num_tasks:
        raise ValueError(f"num_tasks must divide the {total} classes, got {num_tasks}")
    tasks = []
    for task in range(num_tasks):
        train, test = (y // (total // num_tasks) == task for y in (data.train_y, data.test_y))
        tasks.append(TaskData(data.train_x[train], data.train_y[train], data.test_x[test], data.test_y[test]))
    return tasks


def permute_pixels(data: TaskData, num_tasks: int, seed: int) -> list[TaskData]:
    """Domain-incremental: all data in each task, its pixels in an order of the task's own; task 0 as they are.

    Raises:
        ValueError: if num_tasks < 1.
    """
    _check_positive(num_tasks)
    generator = torch.Generator().manual_seed(seed)
    pixels = data.train_x.shape[1]
    orders = [torch.arange(pixels), *(torch.randperm(pixels, generator=generator) for _ in range(num_tasks - 1))]
    return [TaskData(data.train_x[:, order], data.train_y, data.test_x[:, order], data.test_y) for order in orders]


def rotate_images(data: TaskData, num_tasks: int) -> list[TaskData]:
    """Domain-incremental: all data in each task, turned by task * 180 / num_tasks degrees; task 0 as they are.

    Raises:
        ValueError: if num_tasks < 1 or the images are not square.
    """
    _check_positive(num_tasks)
    side = round(data.train_x.shape[1] ** 0.5)
    if side**2 != data.train_x.shape[1]:
        raise ValueError(f"{data.train_x.shape[1]} pixels are no square image")
    turns = [rotation(180 * task / num_tasks, side) for task in range(num_tasks)]
    return [
        TaskData((data.train_x @ turn).clamp(max=1), data.train_y, (data.test_x @ turn).clamp(max=1), data.test_y)
        for turn in turns
    ]


def rotation(degrees: float, side: int) -> Tensor:
    """Rotation about the centre as a matrix: x @ rotation turns flattened images counter-clockwise.

    Interpolation is bilinear, hence linear in the pixels: row i is the turned image of pixel i alone. What leaves the
    frame is lost and zeros come in.

    Returns:
        (side^2, side^2) float32; entries in [0, 1], columns add up to at most 1.
    """
    pixels = np.eye(side**2).reshape(-1, side, side)
    turned = ndimage.rotate(pixels, degrees, axes=(2, 1), reshape=False, order=1, mode="grid-constant")
    return torch.tensor(turned.reshape(side**2, -1), dtype=torch.float32)


def _check_positive(num_tasks: int) -> None:
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")


# -- the named streams -------------------------------------------------------------------------------------


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
    return split_classes(_divided(load_digits(), StreamSettings(test_share=test_share), seed), num_tasks)


def mnist_fashion_animals(settings: StreamSettings, seed: int) -> list[TaskData]:
    """Three tasks of ten classes in domains that are easy to tell apart: MNIST 0-9, Fashion 10-19, animals 20-29."""
    if settings.num_tasks not in (None, 3):
        raise ValueError(f"mnist_fashion_animals has 3 tasks, got num_tasks={settings.num_tasks}")
    tasks = []
    for name in ("mnist", "fashion_mnist", "animals"):
        data, first = _images(name, settings, seed), 10 * len(tasks)
        tasks.append(TaskData(data.train_x, data.train_y + first, data.test_x, data.test_y + first))
    return tasks


def _divided(data: tuple[Tensor, Tensor], settings: StreamSettings, seed: int) -> TaskData:
    train, test = stratified_split(data[1], settings.test_share, seed)
    return _limited([tensor[index] for index in (train, test) for tensor in data], settings, seed)


def _images(name: str, settings: StreamSettings, seed: int) -> TaskData:
    parts = [load_images(name, settings.root, train) for train in (True, False)]
    return _limited([tensor for part in parts for tensor in part], settings, seed)


def _limited(tensors: Sequence[Tensor], settings: StreamSettings, seed: int) -> TaskData:
    train_x, train_y, test_x, test_y = tensors
    if settings.limit is None:
        return TaskData(train_x, train_y, test_x, test_y)
    if settings.limit < 1:
        raise ValueError(f"limit must be at least 1, got {settings.limit}")
    train, test = (_draw(y, settings.limit, seed) for y in (train_y, test_y))
    return TaskData(train_x[train], train_y[train], test_x[test], test_y[test])


def _draw(y: Tensor, limit: int, seed: int) -> Tensor:
    """Indices, ascending, of at most ``limit`` samples of each class."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[y[order] == label][:limit] for label in y.unique()]).sort().values


def _five(settings: StreamSettings) -> int:
    return 5 if settings.num_tasks is None else settings.num_tasks


def _split_mnist(settings: StreamSettings, seed: int) -> list[TaskData]:
    return split_classes(_images("mnist", settings, seed), _five(settings))


STREAMS: dict[str, Stream] = {
    "split_digits": lambda s, seed: split_classes(_divided(load_digits(), s, seed), _five(s)),
    "permuted_digits": lambda s, seed: permute_pixels(_divided(load_digits(), s, seed), _five(s), seed),
    "split_mnist5k": lambda s, seed: split_classes(_divided(load_mnist5k(), s, seed), _five(s)),
    "split_mnist": _split_mnist,
    "online_mnist": _split_mnist,  # the same tasks, for a single pass
    "split_fashion": lambda s, seed: split_classes(_images("fashion_mnist", s, seed), _five(s)),
    "rotated_mnist": lambda s, seed: rotate_images(_images("mnist", s, seed), _five(s)),  # 1.1 GB without limit
    "mnist_fashion_animals": mnist_fashion_animals,
}


# -- for Avalanche -----------------------------------------------------------------------------------------


def to_benchmark(tasks: Sequence[TaskData], task_labels: bool = False) -> Any:
    """The same tasks as an Avalanche benchmark with one experience each, which knows its classes.

    Args:
        tasks: at least one.
        task_labels: give every sample and experience the number of its task, for methods that need one at test time
            (multi-head models, LwF). Nothing else reveals it.
    """

    def dataset(task: int, x: Tensor, y: Tensor) -> Any:
        tensors: Any = TensorDataset(x, y)
        tensors.targets = y.tolist()  # where Avalanche looks for them
        plain: Any = as_classification_dataset(tensors)
        if not task_labels:
            return plain
        labels = TaskLabels(ConstantSequence(task, len(y)))
        return as_taskaware_classification_dataset(plain.update_data_attribute("targets_task_labels", labels))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        benchmark: Any = benchmark_from_datasets(
            train=[dataset(i, task.train_x, task.train_y) for i, task in enumerate(tasks)],
            test=[dataset(i, task.test_x, task.test_y) for i, task in enumerate(tasks)],
        )
        benchmark = with_classes_timeline(with_task_labels(benchmark) if task_labels else benchmark)
    for experience in (*benchmark.train_stream, *benchmark.test_stream):
        # Avalanche's masking heads index a tensor with them, which a set cannot do
        experience.classes_in_this_experience = sorted(experience.classes_in_this_experience)
    return benchmark


def to_online(
    source: Any, experience_size: int, seed: int = 0, access_task_boundaries: bool = False, shuffle: bool = True
) -> list[Any]:
    """The training data in small experiences that come one after the other, each to be seen once.

    Args:
        source: tasks, or a benchmark made of them.
        experience_size: samples in each; a task's last experience holds the rest.
        seed: of the order within each task.
        access_task_boundaries: whether a method may read ``is_first_subexp`` and ``is_last_subexp``.
        shuffle: False keeps the order of the data.
    Raises:
        ValueError: if experience_size < 1.
    """
    if experience_size < 1:
        raise ValueError(f"experience_size must be at least 1, got {experience_size}")
    stream = (source if hasattr(source, "train_stream") else to_benchmark(source)).train_stream
    options = {"access_task_boundaries": access_task_boundaries, "shuffle": shuffle, "seed": seed}
    # a list, because Avalanche's own stream is empty when it is read again
    experiences: list[Any] = list(split_online_stream(stream, experience_size, **options))
    for experience, following in zip(experiences, [*experiences[1:], None], strict=True):
        # Avalanche 0.6.0 forgets to mark the last one if experience_size divides the task
        experience.is_last_subexp = following is None or following.is_first_subexp
    return experiences
