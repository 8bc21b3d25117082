"""KDD Census-Income: two questions about a person, from the same answers to a survey."""

from pathlib import Path

import numpy as np
import torch

from modmoe.multitask.data import MultiTaskData
from modmoe.multitask.model import Tasks
from modmoe.multitask.tables import read_table

TASKS: Tasks = {"income": "binary", "never_married": "binary"}


def load_census(root: str | Path = "data", seed: int = 0) -> tuple[MultiTaskData, MultiTaskData]:
    """Income above 50K, and never married, from 7 numbers and 32 answers of a choice; the standard split.

    Inputs are all columns but the sampling weight and the two labels. Numbers are log(1 + x), standardised by the
    training data; an answer that the training data lack is the value 0 of its column. Household columns say much about
    marriage ("Child 18+ never marr"), so the second task is easy, in the paper too.

    Args:
        root: the folder that holds census/census.npz (``scripts/fetch_data.py census``).
        seed: of the order of the training samples, which matters where only some are used.
    Returns:
        Training data (199,523) and test data (99,762) with the tasks "income" and "never_married".
    Raises:
        DataNotFoundError: if the file is missing.
        ValueError: if it is damaged.
    Source:
        Lane and Kohavi 2000 (UCI); the tasks are the first group of Ma et al. 2018, who split the standard
        test data into validation and test halves.
    """
    keys = ("numbers", "codes", "income", "never_married")
    table = read_table("census", root, tuple(f"{part}_{key}" for part in ("train", "test") for key in keys))
    # one more than the largest code: the test data hold no others
    cardinalities = tuple(int(top) + 1 for top in table["train_codes"].max(0))
    logs = {part: np.log1p(table[f"{part}_numbers"].astype(np.float64)) for part in ("train", "test")}
    mean, std = logs["train"].mean(0), logs["train"].std(0)
    sets = []
    for part in ("train", "test"):
        dense = torch.from_numpy(((logs[part] - mean) / std).astype(np.float32))
        codes = torch.from_numpy(table[f"{part}_codes"].astype(np.int64))
        targets = {name: torch.from_numpy(table[f"{part}_{name}"].astype(np.float32)) for name in TASKS}
        sets.append(MultiTaskData(dense, codes, targets, TASKS, cardinalities))
    order = torch.randperm(len(sets[0]), generator=torch.Generator().manual_seed(seed))
    return sets[0].taken(order), sets[1]
