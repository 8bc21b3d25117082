"""MovieLens 100k: two degrees of approval of a user for a film."""

from pathlib import Path

import numpy as np
import torch

from modmoe.multitask.data import MultiTaskData
from modmoe.multitask.model import Tasks
from modmoe.multitask.tables import read_table

TASKS: Tasks = {"like": "binary", "love": "binary"}
TEST_SHARE = 0.2


def load_movielens(root: str | Path = "data", seed: int = 0) -> tuple[MultiTaskData, MultiTaskData]:
    """Like (a rating of at least 4) and love (a rating of 5) of user and film ids, film genres and year.

    Love implies like, as a conversion implies a click. A random fifth of the ratings is the test data; the films that
    only it holds keep their untrained embedding.

    Args:
        root: the folder that holds movielens/movielens.npz (``scripts/fetch_data.py movielens``).
        seed: of the split.
    Returns:
        Training and test data with the tasks "like" and "love".
    Raises:
        DataNotFoundError: if the file is missing.
        ValueError: if it is damaged.
    Source:
        GroupLens, the small MovieLens set of 100,004 ratings (Harper and Konstan 2015).
    """
    table = read_table("movielens", root, ("users", "films", "ratings", "years", "genres"))
    users, films = (np.unique(table[key], return_inverse=True) for key in ("users", "films"))
    years = torch.from_numpy(table["years"].astype(np.float32))
    missing = years.isnan()
    years = ((years - years[~missing].mean()) / years[~missing].std()).masked_fill(missing, 0.0)
    dense = torch.cat([torch.from_numpy(table["genres"].astype(np.float32)), years.unsqueeze(1)], dim=1)
    codes = torch.from_numpy(np.stack([users[1], films[1]], axis=1).astype(np.int64))
    ratings = torch.from_numpy(table["ratings"].astype(np.float32))
    targets = {"like": (ratings >= 4).float(), "love": (ratings == 5).float()}
    everything = MultiTaskData(dense, codes, targets, TASKS, (len(users[0]), len(films[0])))
    order = torch.randperm(len(ratings), generator=torch.Generator().manual_seed(seed))
    num_test = round(TEST_SHARE * len(ratings))
    return everything.taken(order[num_test:]), everything.taken(order[:num_test])
