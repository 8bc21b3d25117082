"""Images to learn from, and batches of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from modmoe.experiments.vision.settings import IMAGE_SIZES, VisionSettings
from modmoe.hosts import import_host

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageData(NamedTuple):
    """A training and a test set of pairs (image (C, size, size) float32, class).

    Args:
        train: with augmentation, where there is any.
        test: without.
        num_classes: of both.
        in_channels: C.
        image_size: height and width.
        class_names: in order.
    """

    train: Dataset
    test: Dataset
    num_classes: int
    in_channels: int
    image_size: int
    class_names: list[str]


def load_data(settings: VisionSettings, seed: int) -> ImageData:
    """The images that the settings name; the seed draws a test set where there is none.

    Raises:
        FileNotFoundError: if data are missing; the message says what to do.
        ValueError: if the classes of train and val differ.
        MissingExtraError: if scikit-learn or torchvision is needed and missing.
    """
    load = {"digits": load_digits, "mnist": load_mnist, "image_folder": load_folder}[settings.data]
    data = load(settings, seed)
    return data._replace(train=_first(data.train, settings.num_train), test=_first(data.test, settings.num_test))


def load_digits(settings: VisionSettings, seed: int) -> ImageData:
    """scikit-learn's 1,797 digits, 8x8, in [0, 1]."""
    digits = import_host("sklearn.datasets").load_digits()
    split = import_host("sklearn.model_selection").train_test_split
    parts = split(
        np.arange(len(digits.target)), test_size=settings.test_share, random_state=seed, stratify=digits.target
    )
    x = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target, dtype=torch.int64)
    train, test = (TensorDataset(x[part], y[part]) for part in map(torch.from_numpy, parts))
    return ImageData(train, test, 10, 1, IMAGE_SIZES["digits"], [str(digit) for digit in range(10)])


def load_mnist(settings: VisionSettings, seed: int) -> ImageData:
    """torchvision's MNIST, 28x28, in [0, 1]; nothing is downloaded."""
    mnist = import_host("torchvision.datasets").MNIST
    try:
        sets = [mnist(settings.root, train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        command = f"python scripts/fetch_data.py mnist --root {settings.root}"
        raise FileNotFoundError(f"MNIST is not below '{settings.root}'. Fetch it with: {command}") from error
    train, test = (TensorDataset(part.data.unsqueeze(1).float() / 255, part.targets) for part in sets)
    return ImageData(train, test, 10, 1, IMAGE_SIZES["mnist"], [str(digit) for digit in range(10)])


def load_folder(settings: VisionSettings, seed: int) -> ImageData:
    """A folder root/{train,val}/<class>/<image>: random crops and flips in training, the centre in the test."""
    folder = import_host("torchvision.datasets").ImageFolder
    transforms = import_host("torchvision.transforms")
    size = settings.image_size
    common = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    steps = {
        "train": [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()],
        "val": [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)],
    }
    sets: dict[str, Any] = {}
    for part, own in steps.items():
        path = Path(settings.root) / part
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is missing: an image folder holds train/<class>/ and val/<class>/")
        sets[part] = folder(str(path), transforms.Compose(own + common))
    classes = sets["train"].classes
    if sets["val"].classes != classes:
        raise ValueError(f"train has the classes {classes[:5]} ..., val has {sets['val'].classes[:5]} ...")
    return ImageData(sets["train"], sets["val"], len(classes), 3, size, classes)


def _first(dataset: Dataset, limit: int | None) -> Dataset:
    """The first of a shuffled set, the same in each run: the files of a folder are sorted by class."""
    size = len(dataset)  # type: ignore[arg-type]
    if limit is None or limit >= size:
        return dataset
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:limit]
    return TensorDataset(*dataset[chosen]) if isinstance(dataset, TensorDataset) else Subset(dataset, chosen.tolist())


def batches(dataset: Dataset, places: Sequence[list[int]], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """x (B, C, size, size) and y (B,) at each list of places."""
    if isinstance(dataset, TensorDataset):
        for chosen in places:
            yield dataset[chosen]  # type: ignore[misc] # tensors take a list of places at once
    else:
        yield from DataLoader(dataset, batch_sampler=places, num_workers=workers)


def training_order(size: int, batch_size: int, seed: int, rank: int = 0, num_ranks: int = 1) -> list[list[int]]:
    """The places of one process's share of each shuffled batch.

    Args:
        size: number of images, at least batch_size, or else there is one batch of all.
        batch_size: of all processes together; what is left over at the end is skipped.
        seed: of the shuffle, the same in all processes.
        rank: of this process; it takes every num_ranks-th place of a batch.
        num_ranks: processes.
    Raises:
        ValueError: if a batch has fewer images than there are processes.
    """
    batch_size = min(batch_size, size)
    if batch_size < num_ranks:
        raise ValueError(f"batches of {batch_size} images cannot be shared by {num_ranks} processes")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    whole = order[: size // batch_size * batch_size].view(-1, batch_size)
    share = batch_size // num_ranks
    return whole[:, rank::num_ranks][:, :share].tolist()
