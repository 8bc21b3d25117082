"""The study on LeapTerrain, shortened to a few hundred leaps: what it promises to print, and that it is fair."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from modmoe.cli import main
from modmoe.experiments.rl import mace
from modmoe.experiments.rl.mace import FIRST_CHOICE, FIRST_CHOICE_RUN, FIRST_TEST, MaceConfig, Walks, joint_of, walk
from modmoe.experiments.rl.mace_settings import METHODS, make_learner

CONFIGS = Path(__file__).parents[3] / "configs" / "rl"
BOUNDS = ["bound_weak", "bound_constant", "bound_grid"]
SMALL = {"leaps": 400, "learning_starts": 100, "courses": 4, "candidates": [[0.4, 0.3], [0.7, 0.7]], "choice_runs": 1}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("leap")
    options = [text for key, value in SMALL.items() for text in (f"--{key}", str(value))]
    assert main(["run", str(CONFIGS / "mace_leap.yaml"), "--seeds", "1", *options, "--out", str(out)]) == 0
    return json.loads((out / "metrics.json").read_text())["methods"], out


def test_methods_and_metrics(results):
    methods = results[0]
    assert list(methods) == [*METHODS, *BOUNDS]
    for name in METHODS:
        assert {"distance", "parameters", "seconds"} <= methods[name].keys()
        assert ("mutual_information" in methods[name]) == (name not in ("mace_k1", "ppo"))
    for name in [*METHODS, *BOUNDS]:
        assert 0.5 < methods[name]["distance"]["mean"] <= 50


def test_equal_parameters(results):
    # trunk 43 * 64 + 64; critics 64 * 64 + 64 and 3 * (64 + 1); actors 3 * (64 * 16 + 16 + 16 * 2 + 2)
    assert results[0]["mace_k3"]["parameters"]["mean"] == 2_816 + 4_160 + 195 + 3_222 == 10_393
    for name in METHODS:
        assert results[0][name]["parameters"]["mean"] == pytest.approx(10_393, rel=0.05)


def test_a_chooser_of_any_leap_gets_furthest(results):
    distance = {name: results[0][name]["distance"]["mean"] for name in BOUNDS}
    assert distance["bound_grid"] > 2 * max(distance["bound_weak"], distance["bound_constant"])


def test_files_are_written(results):
    out = results[1]
    report = (out / "report.html").read_text()
    assert report.count("data:image/gif") == len(METHODS)
    assert "initial action" in report
    for name in METHODS:
        assert list((out / "tensorboard" / "seed0" / name).glob("events*"))


def test_a_wrong_key_fails(capsys):
    assert main(["run", str(CONFIGS / "mace_leap.yaml"), "--leap", "400"]) != 0
    assert "unknown key '--leap'; did you mean 'leaps'?" in capsys.readouterr().err


def test_the_bias_is_the_one_that_gets_furthest_on_courses_apart(monkeypatch):
    config = MaceConfig(**SMALL | {"courses": 50})
    told, walked, trained = [], [], []

    class Learner:
        def __init__(self, bias):
            self.bias = bias

        def learn(self, leaps):
            told.append(leaps)

    def make(settings, method, seed, bias):
        trained.append(seed)
        return Learner(bias)

    def distance(model, first_seed, courses):
        walked.append((first_seed, courses))
        return Walks(np.full(courses, 10 * sum(model.bias)), np.zeros(0), np.zeros(0))

    monkeypatch.setattr(mace, "make_learner", make)
    monkeypatch.setattr(mace, "walk", distance)
    choice = config.choose_bias("ppo", told.append)
    assert choice.bias == [0.7, 0.7]  # 14 m beats 7 m
    assert choice.distances.values.tolist() == pytest.approx(np.array([[7.0], [14.0]]))
    assert (trained, walked) == ([FIRST_CHOICE_RUN] * 2, [(FIRST_CHOICE, 50)] * 2)
    assert FIRST_TEST + config.courses <= FIRST_CHOICE
    assert config.choose_bias("ppo", told.append) is choice
    assert len(trained) == 2, "it is made once, not for each seed"


def test_one_candidate_needs_no_training():
    choice = MaceConfig(candidates=[[0.1, 0.0]]).choose_bias("mace_k1", pytest.fail)
    assert choice.bias == [0.1, 0.0]
    assert choice.distances is None


def test_the_distance_is_that_of_the_environment_s_own_measure():
    from modmoe_envs import course_distance, held_out_seeds

    config = MaceConfig(leaps=400, learning_starts=100)
    model = make_learner(config, "mace_k3", 3, None)
    walks = walk(model, FIRST_TEST, 5)
    seen = course_distance(lambda x: model.predict(x, deterministic=True)[0], held_out_seeds(5))
    assert walks.distance.tolist() == seen.tolist()
    assert walks.shares.sum(1).tolist() == [1.0] * len(walks.terrain)


def test_the_joint_distribution_counts_leaps():
    # leaps: open by expert 0, gap by both halves, gap by expert 1
    walks = Walks(
        np.zeros(1),
        torch.tensor([0, 1, 1]),
        torch.tensor([[1, 0], [0.5, 0.5], [0, 1]], dtype=torch.double),
    )
    expected = np.array([[1, 0], [0.5, 1.5], [0, 0], [0, 0]]) / 3
    assert joint_of(walks).numpy() == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_pairs_start_where_they_are_told(method):
    model = make_learner(MaceConfig(), method, 0, [0.7, 0.7])
    observations = np.zeros((1, 43), np.float32)
    mean = model.predict(observations, deterministic=True)[0]
    single, spread = method in ("mace_k1", "ppo"), method != "mace_k3_no_bias"
    biases = [[0.7, 0.7]] if single else MaceConfig().biases if spread else [[0.0, 0.0]]
    low, high = np.min(biases, 0) - 0.2, np.max(biases, 0) + 0.2
    assert ((low < mean[0]) & (mean[0] < high)).all()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("mace_*.yaml")), ids=lambda path: path.stem)
def test_every_config_has_known_keys(path):
    settings = yaml.safe_load(path.read_text())
    assert settings.pop("experiment") == "mace"
    assert settings.pop("seeds") >= 5
    assert settings.keys() <= {field.name for field in dataclasses.fields(MaceConfig)}
    MaceConfig(**settings)
    assert path.read_text().startswith("#"), "a header says cost, seeds and what is compared"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"leaps": 500}, "a multiple of PPO's rollout of 400, got 500"),
        ({"leaps": 400}, "must leave updates in 400 leaps, got 500"),
        ({"candidates": []}, "need one at least"),
    ],
)
def test_settings_that_cannot_work(wrong, message):
    with pytest.raises(ValueError, match=message):
        MaceConfig(**wrong)
