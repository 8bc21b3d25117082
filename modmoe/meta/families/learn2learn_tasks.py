"""The families as learn2learn wants them: data sets under its MetaDataset and Taskset, and task sets of functions.

learn2learn itself is imported when it is needed. Its transforms draw from Python's ``random``, not from a generator.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from modmoe.hosts import import_host
from modmoe.meta.task_batch import TaskBatch

BENCHMARK_FILES = {
    "omniglot": [f"omniglot-py/images_{part}{end}" for part in ("background", "evaluation") for end in (".zip", "")],
    "mini-imagenet": [f"mini-imagenet-cache-{part}.pkl" for part in ("train", "validation", "test")],
}


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Pictures with labels as a torch data set: item i is ((1, height, width), label).

    Args:
        images: (n, height, width) float.
        labels: (n,) int64.
    Raises:
        ValueError: if there are not as many labels as pictures.
    """

    def __init__(self, images: Tensor, labels: Tensor):
        if images.dim() != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"images are (n, height, width) and labels (n,), got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].unsqueeze(0), int(self.labels[index])


def meta_dataset(images: Tensor, labels: Tensor) -> Any:
    """A ``learn2learn.data.MetaDataset`` of pictures, to put its transforms on; its book is made without a pass."""
    of_label: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        of_label.setdefault(label, []).append(index)
    return import_host("learn2learn.data").MetaDataset(LabelledImages(images, labels), labels_to_indices=of_label)


def few_shot_taskset(images: Tensor, labels: Tensor, ways: int, shots: int, queries: int, num_tasks: int = -1) -> Any:
    """A ``learn2learn.data.Taskset`` of W-way tasks, with learn2learn's own transforms.

    Args:
        images: (n, height, width) float.
        labels: (n,) int64.
        ways: W.
        shots, queries: a task holds shots + queries pictures of each class; ``learn2learn.data.partition_task`` with
            ``shots`` parts them.
        num_tasks: as in Taskset: so many different tasks, or -1 for ever new ones.
    Returns:
        Tasks (data (W (shots + queries), 1, height, width), labels in 0..W-1); the pictures of a class stand side
        by side.
    Raises:
        ValueError: if fewer than W classes have as many pictures; learn2learn would draw from too small a class.
    """
    data = import_host("learn2learn.data")
    each = shots + queries
    found, counts = labels.unique(return_counts=True)
    able = found[counts >= each].tolist()
    if len(able) < ways:
        raise ValueError(f"{ways} ways of {each} pictures each: only {len(able)} of {len(found)} classes have as many")
    dataset = meta_dataset(images, labels)
    transforms = [
        data.transforms.FusedNWaysKShots(dataset, n=ways, k=each, filter_labels=able),
        data.transforms.LoadData(dataset),
        data.transforms.RemapLabels(dataset),
        data.transforms.ConsecutiveLabels(dataset),
    ]
    return data.Taskset(dataset, task_transforms=transforms, num_tasks=num_tasks)


class FunctionTaskset:
    """Tasks of functions with the face of a Taskset: ``taskset[i]`` and ``taskset.sample()`` give (x, y).

    The context stands first: ``x[:num_context]`` is to adapt on, the rest to evaluate on.

    Args:
        draw: a generator -> a TaskBatch of one task without a mask; for instance
            ``lambda generator: FiveFamilies().sample(1, 5, 30, generator).batch``.
        num_tasks: how many there are, 1 or more.
        seed: with the index it decides a task.
    Raises:
        ValueError: if num_tasks is below 1, or what is drawn is not one whole task.
    """

    def __init__(self, draw: Callable[[torch.Generator], TaskBatch], num_tasks: int, seed: int = 0):
        if num_tasks < 1:
            raise ValueError(f"num_tasks is 1 or more, got {num_tasks}")
        self.draw, self.num_tasks, self.seed = draw, num_tasks, seed
        self.num_context = self.batch(0).context_x.shape[1]

    def batch(self, index: int) -> TaskBatch:
        """Task ``index`` as it was drawn."""
        if not 0 <= index < self.num_tasks:
            raise IndexError(f"task {index} of {self.num_tasks}")
        # a hash of both: seed + index would share nearly all tasks between neighbouring seeds
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {index}").getrandbits(62))
        batch = self.draw(generator)
        if batch.num_tasks != 1 or batch.target_y is None or batch.context_mask is not None:
            raise ValueError("draw gives one task with target_y and without a mask: one number of context points")
        return batch

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        batch = self.batch(index)
        assert batch.target_y is not None
        return torch.cat([batch.context_x[0], batch.target_x[0]]), torch.cat([batch.context_y[0], batch.target_y[0]])

    def sample(self) -> tuple[Tensor, Tensor]:
        """A task drawn by Python's ``random``, as learn2learn's Taskset does."""
        return self[random.randrange(self.num_tasks)]


def benchmark_tasksets(name: str, root: str | Path, ways: int = 5, shots: int = 1, num_tasks: int = -1) -> Any:
    """Omniglot or mini-ImageNet through ``learn2learn.vision.benchmarks``, from files that are there.

    Args:
        name: "omniglot" or "mini-imagenet".
        root: the folder that holds them; nothing is downloaded.
        ways, shots: a task holds 2 * shots pictures of each class, as in learn2learn's examples.
        num_tasks: as in Taskset.
    Returns:
        learn2learn's named tuple of ``train``, ``validation`` and ``test``.
    Raises:
        ValueError: if the name is another.
        FileNotFoundError: if a file is missing; the message names all that are.
    """
    if name not in BENCHMARK_FILES:
        raise ValueError(f"unknown benchmark {name!r}, choose from {', '.join(BENCHMARK_FILES)}")
    # learn2learn's loaders would try to download what is missing
    if missing := [file for file in BENCHMARK_FILES[name] if not (Path(root) / file).exists()]:
        maker = "torchvision.datasets.Omniglot" if name == "omniglot" else "learn2learn.vision.datasets.MiniImagenet"
        raise FileNotFoundError(
            f"{name} is not complete below {root}: {', '.join(missing)} missing. {maker} with download=True fetches it "
            "where its servers can be reached; no package holds it"
        )
    benchmarks = import_host("learn2learn.vision.benchmarks")
    samples = 2 * shots
    return benchmarks.get_tasksets(name, ways, samples, ways, samples, num_tasks=num_tasks, root=str(root))
