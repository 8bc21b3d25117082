"""The synthetic tasks, the tables, and what a data set refuses."""

import math

import numpy as np
import pytest
import torch

from modmoe.errors import DataNotFoundError
from modmoe.multitask import MultiTaskData, synthetic_tasks
from modmoe.multitask.census import load_census
from modmoe.multitask.movielens import load_movielens


def linear_part(data, name):
    return torch.linalg.lstsq(data.dense, data.targets[name].unsqueeze(1)).solution.squeeze(1)


@pytest.mark.parametrize("rho", [0.0, 0.6, 1.0, -1.0])
def test_without_waves_and_noise_the_cosine_is_rho(rho):
    (data,) = synthetic_tasks(rho, [50], num_features=10, scale=2.0, noise_std=0.0, frequencies=())
    first, second = (linear_part(data, name) for name in ("task_0", "task_1"))
    assert first.norm().item() == pytest.approx(2.0, rel=1e-4)
    assert second.norm().item() == pytest.approx(2.0, rel=1e-4)
    assert (first @ second).item() / 4 == pytest.approx(rho, abs=1e-4)


def test_at_rho_1_the_tasks_differ_by_the_noise_only():
    (data,) = synthetic_tasks(1.0, [20_000], num_features=5, noise_std=0.1)
    difference = data.targets["task_0"] - data.targets["task_1"]
    assert difference.var().item() == pytest.approx(2 * 0.01, rel=0.1)


def test_waves_by_hand():
    # the target is z + sin(z + b): the part without z lies in [-1, 1] and is no line
    (data,) = synthetic_tasks(0.0, [200], num_features=2, noise_std=0.0, frequencies=(1.0,))
    (line,) = synthetic_tasks(0.0, [200], num_features=2, noise_std=0.0, frequencies=())
    wave = data.targets["task_0"] - data.dense @ linear_part(line, "task_0")
    assert wave.abs().max() <= 1 + 1e-4
    assert wave.std() > 0.3


def test_synthetic_tasks_are_seeded():
    one, two = (synthetic_tasks(0.5, [10, 4], seed=3) for _ in range(2))
    assert [len(part) for part in one] == [10, 4]
    assert torch.equal(one[1].dense, two[1].dense)
    assert torch.equal(one[1].targets["task_1"], two[1].targets["task_1"])
    assert not torch.equal(one[0].dense, synthetic_tasks(0.5, [10], seed=4)[0].dense)
    with pytest.raises(ValueError, match="rho must lie in"):
        synthetic_tasks(1.5, [10])


def test_what_a_data_set_refuses():
    x, y = torch.zeros(2, 1), torch.tensor([1.0, math.nan])
    with pytest.raises(ValueError, match="task 'b' has no labels at all"):
        MultiTaskData(x, None, {"a": y, "b": y * math.nan}, {"a": "regression", "b": "regression"})
    with pytest.raises(ValueError, match="task 'b' has no targets"):
        MultiTaskData(x, None, {"a": y}, {"b": "regression"})
    with pytest.raises(ValueError, match="the same number of samples, got \\[2, 3\\]"):
        MultiTaskData(torch.zeros(3, 1), None, {"a": y}, {"a": "regression"})


def census_file(root):
    """Three people to learn from and two to test on."""
    arrays = {}
    for part, count in (("train", 3), ("test", 2)):
        arrays[f"{part}_numbers"] = np.arange(count * 7, dtype=np.float32).reshape(count, 7)
        arrays[f"{part}_codes"] = np.full((count, 32), 2 if part == "train" else 0, np.uint8)
        arrays[f"{part}_income"] = np.arange(count) == 1
        arrays[f"{part}_never_married"] = np.arange(count) != 1
    (root / "census").mkdir()
    np.savez(root / "census/census.npz", **arrays)


def test_census(tmp_path):
    census_file(tmp_path)
    train, test = load_census(tmp_path, seed=1)
    assert (len(train), len(test)) == (3, 2)
    assert train.tasks == {"income": "binary", "never_married": "binary"}
    assert train.cardinalities == (3,) * 32  # 0 for the unknown, 1 and 2
    assert test.categorical.eq(0).all()
    # standardised by the training data
    torch.testing.assert_close(train.dense.mean(0), torch.zeros(7), atol=1e-6, rtol=0)
    torch.testing.assert_close(train.dense.std(0, correction=0), torch.ones(7))
    assert train.targets["income"].sum() == 1
    assert torch.equal(train.targets["income"], 1 - train.targets["never_married"])
    assert not torch.equal(train.dense, load_census(tmp_path, seed=0)[0].dense)


def test_movielens(tmp_path):
    (tmp_path / "movielens").mkdir()
    np.savez(
        tmp_path / "movielens/movielens.npz",
        users=np.array([7, 7, 9, 9, 9]),
        films=np.array([3, 1000, 3, 5, 1000]),
        ratings=np.array([5.0, 4.0, 3.5, 0.5, 4.5], np.float32),
        years=np.array([1990, 2000, 1990, np.nan, 2000], np.float32),
        genres=np.eye(5, 3, dtype=bool),
    )
    train, test = load_movielens(tmp_path, seed=0)
    assert (len(train), len(test)) == (4, 1)  # a fifth
    assert train.cardinalities == (2, 3)
    both = {name: torch.cat([train.targets[name], test.targets[name]]).sum().item() for name in ("like", "love")}
    assert both == {"like": 3.0, "love": 1.0}
    assert train.num_dense == 4
    assert torch.cat([train.dense, test.dense]).isfinite().all()
    assert torch.equal(train.dense, load_movielens(tmp_path, seed=0)[0].dense)


def test_missing_and_damaged_tables(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"fetch_data\.py census --root "):
        load_census(tmp_path)
    (tmp_path / "movielens").mkdir()
    (tmp_path / "movielens/movielens.npz").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"movielens\.npz is damaged"):
        load_movielens(tmp_path)
