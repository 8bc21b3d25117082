"""The main job, shortened: the methods and metrics it promises, and its claims with clear margins."""

import json
from pathlib import Path

import pytest
import yaml

from modmoe.cli import main
from modmoe.continual.streams import STREAMS
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


CONFIGS = sorted(CONFIG.parent.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_names_its_gate_and_known_keys(path):
    settings = yaml.safe_load(path.read_text())
    assert settings.pop("experiment") == "continual"
    assert settings.pop("seeds") >= 3
    assert settings["gate"] in GATES
    assert settings["stream"] in STREAMS
    assert settings.keys() <= vars(ContinualConfig()).keys()
    assert path.read_text().startswith("#"), "a header says cost, seeds and the last result"


def test_domain_incremental_stream_and_avalanche_s_methods():
    config = ContinualConfig(
        stream="permuted_digits",
        num_tasks=2,
        limit=20,
        epochs=1,
        baselines=["gdumb", "ewc", "lwf", "pnn"],
        other_gates=["expert_gate", "learned"],
        features="random",
        num_filters=50,
    )
    records = config.run(0, lambda text: None)
    gates = ["pool_expert_gate", "pool_learned"]
    assert list(records) == ["pool", *gates, "oracle", "router_only", "gdumb", "ewc", "lwf", "pnn"]
    assert "told the task" in records["pnn"].about
    # the permutation is easy to see, and the classes are the same in both tasks
    assert records["pool"].metrics["routing_accuracy"] > 0.9
    assert records["pool"].matrices["routing"].values.shape == (2, 2)
    assert records["router_only"].metrics["routing_accuracy"] == records["pool"].metrics["routing_accuracy"]


def test_filters_of_the_first_task_and_the_stick_gate():
    config = ContinualConfig(
        stream="split_mnist5k",
        num_tasks=2,
        limit=20,
        features="patches",
        num_filters=8,
        gate="stick",
        other_gates=[],
        baselines=[],
        epochs=4,
    )
    records = config.run(0, lambda text: None)
    assert records["pool"].metrics["accuracy"] > 0.5
    # class and expert of the gate's own answer agree
    gate = records["router_only"].metrics
    assert gate["routing_accuracy"] >= gate["accuracy"]


def test_the_main_gate_runs_once():
    with pytest.raises(ValueError, match="is the main one already"):
        ContinualConfig(gate="prototype")


def test_convolutional_experts_and_networks_of_the_pool_s_size():
    config = ContinualConfig(num_tasks=2, limit=30, expert="conv", epochs=8, gate="ppca", other_gates=[])
    records = config.run(0, lambda text: None)
    pool = records["pool"].metrics
    # 2 experts: 16 * 25 + 16, 32 * 16 * 25 + 32, a map of 32 * 2 * 2 to 32; and 10 head rows of 33
    assert records["oracle"].metrics["parameters"] == 2 * (416 + 12_832 + 128 * 32 + 32) + 330
    assert pool["accuracy"] > 0.8
    assert records["joint"].metrics["parameters"] == pytest.approx(pool["parameters"], rel=0.01)
    assert records["joint"].metrics["accuracy"] > 0.8
    assert "CNN" in records["joint"].about


@pytest.fixture(scope="module")
def single_pass():
    config = ContinualConfig(
        stream="split_mnist5k",
        num_tasks=2,
        experience_size=40,
        features="patches",
        num_filters=8,
        filter_images=100,
        gate="stick",
        other_gates=[],
        baselines=["replay"],
        epochs=1,
        batch_size=10,
        memory=50,
    )
    return config.run(0, lambda text: None)


def test_a_single_pass_without_boundaries(single_pass):
    pool = single_pass["pool"].metrics
    assert list(single_pass) == ["pool", "oracle", "router_only", "streaming_ridge", "replay"]
    assert pool["experts"] == 2  # nobody said when
    assert pool["accuracy"] > 0.85
    assert single_pass["streaming_ridge"].metrics["accuracy"] > 0.85
    assert single_pass["oracle"].metrics["accuracy"] >= pool["accuracy"]


def test_a_single_pass_refuses_what_needs_whole_tasks():
    with pytest.raises(ValueError, match="'gdumb', 'lwf'"):
        ContinualConfig(experience_size=20, baselines=["lwf", "gdumb"])
    with pytest.raises(ValueError, match="tasks of different classes"):
        ContinualConfig(stream="permuted_digits", experience_size=20).run(0, lambda text: None)
