"""The multi-task experiment: equal sizes, the promised methods and metrics, its configs, and real tables made up."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from modmoe import count_parameters
from modmoe.cli import main
from modmoe.experiments.multitask import MultitaskConfig
from modmoe.experiments.multitask.methods import build
from modmoe.experiments.sizes import nearest_size
from modmoe.multitask import MultiTaskData

METHODS = ["mmoe", "ple", "one_gate", "shared_bottom", "single_task"]
CONFIGS = sorted((Path(__file__).parents[2] / "configs/multitask").glob("*.yaml"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("multitask")
    short = ["--seeds", "1", "--epochs", "2", "--num_train", "4000", "--num_test", "500", "--out", str(out)]
    config = next(path for path in CONFIGS if path.stem == "synthetic_rho0")
    assert main(["run", str(config), *short]) == 0
    return json.loads((out / "metrics.json").read_text())["methods"], out


def test_methods_and_metrics(results):
    methods = results[0]
    assert list(methods) == METHODS
    for name in METHODS:
        mean = {metric: value["mean"] for metric, value in methods[name].items()}
        assert mean.keys() == {"test_mse", "test_mse/task_0", "test_mse/task_1", "parameters", "seconds"}
        assert mean["test_mse"] == pytest.approx((mean["test_mse/task_0"] + mean["test_mse/task_1"]) / 2)
        assert mean["test_mse"] < 2.1  # the variance of a target is 2
    assert (results[1] / "report.html").stat().st_size > 5_000
    assert "gate usage" in (results[1] / "report.html").read_text()


def test_all_methods_have_as_many_parameters(results):
    methods = results[0]
    # 8 experts of 100 * 16 + 16, 2 gates of 8 * 101, 2 towers of 16 * 8 + 8 + 8 + 1
    assert methods["mmoe"]["parameters"]["mean"] == 8 * 1616 + 2 * 808 + 2 * 145
    for name in METHODS:
        assert methods[name]["parameters"]["mean"] == pytest.approx(methods["mmoe"]["parameters"]["mean"], rel=0.05)


def tables(root):
    """A census and a film table with a few rows: the second number, or the user, decides."""
    rng, arrays = np.random.default_rng(0), {}
    for part, count in (("train", 400), ("test", 200)):
        numbers = rng.random((count, 7), np.float32)
        arrays[f"{part}_numbers"] = numbers
        arrays[f"{part}_codes"] = rng.integers(1, 4, (count, 32), np.uint8)
        arrays[f"{part}_income"] = numbers[:, 1] > 0.8
        arrays[f"{part}_never_married"] = numbers[:, 1] < 0.5
    users = rng.integers(0, 20, 500)
    films = {"users": users, "films": rng.integers(0, 30, 500), "years": np.full(500, 1990.0), "ratings": users % 6}
    films["years"][:250] = 2000
    for name, content in (("census", arrays), ("movielens", {**films, "genres": rng.random((500, 3)) < 0.5})):
        (root / name).mkdir()
        np.savez(root / name / f"{name}.npz", **content)


@pytest.mark.parametrize(("data", "tasks"), [("census", ["income", "never_married"]), ("movielens", ["like", "love"])])
def test_tables(tmp_path, data, tasks):
    tables(tmp_path)
    config = MultitaskConfig(
        data=data,
        root=str(tmp_path),
        num_experts=4,
        expert_features=6,
        embedding_features=2,
        single_task_size="each",
        epochs=15,
        batch_size=32,
        balance="uncertainty",
    )
    records = config.run(0, lambda text: None)
    mmoe = records["mmoe"].metrics
    assert list(mmoe) == ["test_auc", *(f"test_auc/{task}" for task in tasks), "parameters", "seconds"]
    assert mmoe["test_auc"] > 0.8
    # two networks, each as large as mmoe
    assert records["single_task"].metrics["parameters"] == pytest.approx(2 * mmoe["parameters"], rel=0.05)
    assert "each as large" in records["single_task"].about
    assert records["mmoe"].matrices["gate usage"].row_names == tasks


def test_seeded_runs_are_equal():
    config = MultitaskConfig(methods=["mmoe", "single_task"], num_train=300, num_test=50, epochs=1)
    one, two, other = (config.run(seed, lambda text: None) for seed in (0, 0, 1))
    for name in one:
        assert one[name].metrics["test_mse"] == two[name].metrics["test_mse"]
        assert one[name].metrics["test_mse"] != other[name].metrics["test_mse"]


def test_the_nearest_size():
    def make(size):
        return torch.nn.Linear(9, size)  # 10 parameters for each

    assert nearest_size(make, 74) == 7
    assert nearest_size(make, 76) == 8
    assert nearest_size(make, 1) == 1


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_has_known_keys_and_equal_sizes(path):
    settings = yaml.safe_load(path.read_text())
    assert settings.pop("experiment") == "multitask"
    assert settings.pop("seeds") >= 3
    config = MultitaskConfig(**settings)
    assert path.read_text().startswith("#"), "a header says cost, seeds and the last result"
    if config.data == "synthetic":
        tasks = {f"task_{k}": "regression" for k in range(2)}
        data = MultiTaskData(torch.zeros(1, 100), None, dict.fromkeys(tasks, torch.zeros(1)), tasks)
        sizes = {method: count_parameters(build(method, config, data, 0)).total for method in config.methods}
        assert max(sizes.values()) / min(sizes.values()) < 1.05


def test_bad_settings():
    with pytest.raises(ValueError, match="methods start with 'mmoe'"):
        MultitaskConfig(methods=["ple"])
    with pytest.raises(ValueError, match="num_experts must be at least 4, got 2"):
        MultitaskConfig(num_experts=2)
