"""The main job, shortened: the methods and metrics it promises, and its claims with clear margins."""

import json
from pathlib import Path

import pytest
import yaml

from modmoe.cli import main
from modmoe.experiments.continual import GATES, ContinualConfig

METHODS = ["pool", "pool_gaussian_per_expert", "pool_prototype", "oracle", "router_only", "naive", "replay", "joint"]
CONFIG = Path(__file__).parents[2] / "configs" / "continual" / "split_digits.yaml"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    assert main(["run", str(CONFIG), "--seeds", "1", "--epochs", "8", "--out", str(out)]) == 0
    return json.loads((out / "metrics.json").read_text()), out


def test_methods_and_metrics(results):
    methods = results[0]["methods"]
    assert list(methods) == METHODS
    assert {"accuracy", "routing_accuracy", "oracle_gap", "forgetting", "mutual_information"} <= methods["pool"].keys()
    for name in METHODS:
        assert {"accuracy", "forgetting", "parameters", "seconds"} <= methods[name].keys()
        for values in methods[name].values():
            assert values["mean"] == pytest.approx(sum(values["seeds"]) / len(values["seeds"]))


def test_claims_with_a_margin(results):
    mean = {name: {key: v["mean"] for key, v in metrics.items()} for name, metrics in results[0]["methods"].items()}
    assert mean["pool"]["accuracy"] >= 0.96
    assert mean["pool"]["routing_accuracy"] >= 0.96
    assert mean["pool"]["oracle_gap"] <= 0.03
    assert mean["pool"]["oracle_gap"] == pytest.approx(mean["oracle"]["accuracy"] - mean["pool"]["accuracy"])
    assert mean["oracle"]["forgetting"] == 0.0
    assert mean["naive"]["accuracy"] < 0.3 < mean["replay"]["accuracy"]


def test_controls_have_the_pool_s_number_of_parameters(results):
    methods = results[0]["methods"]
    pool = methods["pool"]["parameters"]["mean"]
    # 5 experts of 64*32 + 32 + 32*32 + 32 = 3,136 and 10 head rows of 32 + 1: 16,010 parameters;
    # 10 classes with mean (64), scatter and whitening matrix (64*64 each), count, label and norm, and 10 head labels
    assert pool == 16_010 + 10 * (64 + 2 * 64 * 64 + 3) + 10
    for name in ("naive", "replay", "joint"):
        assert methods[name]["parameters"]["mean"] == pytest.approx(pool, rel=0.01)


def test_files_are_written(results):
    out = results[1]
    assert (out / "report.html").stat().st_size > 5_000
    assert list((out / "tensorboard" / "seed0" / "pool").glob("events*"))


def test_config_file_names_the_gate_and_its_keys_exist():
    settings = yaml.safe_load(CONFIG.read_text())
    assert settings.pop("experiment") == "continual"
    assert settings.pop("seeds") == 5
    assert settings["gate"] in GATES
    assert settings.keys() <= vars(ContinualConfig()).keys()
