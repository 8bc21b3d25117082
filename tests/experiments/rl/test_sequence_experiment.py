"""Tasks in sequence, made tiny: what it promises of methods, metrics and files; that it learns is a measured figure."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageSequence
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from modmoe.cli import main
from modmoe.experiments.rl.sequence import SEQUENCE, TASK, SequenceConfig, run_method
from modmoe.experiments.rl.sequence_methods import METHODS, MLP, Pool, draw_heads_anew, mlp_parameters, width_for
from modmoe.growth import count_parameters

CONFIG = Path(__file__).parents[3] / "configs" / "rl" / "continual_reach.yaml"
TINY = {
    "steps": 100,
    "num_envs": 2,
    "rollout": 25,
    "batch_size": 25,
    "epochs": 2,
    "episodes": 2,
    "gate_samples": 64,
    "learning_rate": 0.01,
}
METRICS = {"return", "return_when_learned", "forgetting", "forward_transfer", "parameters", "seconds"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("sequence")
    overrides = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    assert main(["run", str(CONFIG), "--seeds", "1", "--out", str(out), *overrides]) == 0
    return json.loads((out / "metrics.json").read_text()), out


@pytest.fixture
def env():
    env = make_vec_env(SEQUENCE, 2, seed=0, env_kwargs={"env_id": TASK, "num_tasks": 3})
    yield env
    env.close()


def mean(results, method: str, metric: str) -> float:
    return results[0]["methods"][method][metric]["mean"]


def film_ms(data: bytes) -> int:
    """How long a film is; frames that equal the one before are part of that one."""
    return sum(frame.info["duration"] for frame in ImageSequence.Iterator(Image.open(io.BytesIO(data))))


def test_methods_and_metrics(results):
    methods = results[0]["methods"]
    assert list(methods) == [
        "pool_oracle",
        "pool_learned",
        "pool_hidden",
        "mlp_sequential",
        "mlp_sequential_no_reset",
        "mlp_reset",
    ]
    for name, metrics in methods.items():
        assert metrics.keys() >= METRICS
        assert ("routing_accuracy" in metrics) == name.startswith("pool")
        assert mean(results, name, "forgetting") == pytest.approx(
            mean(results, name, "return_when_learned") - mean(results, name, "return")
        )
        assert mean(results, name, "return") < 0


def test_the_oracle_forgets_nothing(results):
    assert mean(results, "pool_oracle", "forgetting") == 0.0  # not a bit, not approximately
    assert mean(results, "pool_oracle", "routing_accuracy") == 1.0
    assert mean(results, "mlp_sequential", "forgetting") != 0.0  # which an evaluation of fixed actions would give


def test_densities_tell_visible_contexts_apart_and_hidden_ones_not(results):
    assert mean(results, "pool_learned", "routing_accuracy") == 1.0
    # all experts are computed there, of which one has weight 1: equal up to rounding, which grows and stacks otherwise
    assert mean(results, "pool_learned", "forgetting") == pytest.approx(0.0, abs=1e-4)
    assert mean(results, "pool_hidden", "routing_accuracy") < 0.9
    gap = mean(results, "pool_oracle", "return") - mean(results, "pool_hidden", "return")
    assert mean(results, "pool_hidden", "oracle_gap") == pytest.approx(gap)


def test_mlps_are_as_large_as_the_whole_pool(results):
    # An actor's 7 * 64 + 64, 64 * 64 + 64 and 64 * 2 + 2, a critic's 1 output in place of 2, and 2 log deviations.
    expert = (512 + 4160 + 130) + (512 + 4160 + 65) + 2
    assert mean(results, "pool_oracle", "parameters") == 3 * expert
    # A mean of 7, scatter and whitening of 7 * 7 each, label, count and norm for each expert besides.
    assert mean(results, "pool_learned", "parameters") == 3 * (expert + 7 + 2 * 49 + 3)
    for name in METHODS:
        assert mean(results, name, "parameters") == pytest.approx(3 * expert, rel=0.05)


def test_files_and_film(results):
    out = results[1]
    assert "data:image/gif" in (out / "report.html").read_text()
    for name in METHODS:
        assert list((out / "tensorboard" / "seed0" / name).glob("events*"))


def test_a_record_holds_matrices_series_and_a_film_of_every_task(results):
    record = run_method(SequenceConfig(**TINY), METHODS["pool_oracle"], 0, None, lambda text: None)
    matrix, routing = record.matrices["return"].values, record.matrices["routing"].values
    np.testing.assert_array_equal(routing, np.eye(3))
    assert matrix.shape == (3, 3)
    np.testing.assert_array_equal(matrix[:, 0], matrix[0, 0])  # task 0's expert is frozen from then on
    assert matrix[1, 1] != matrix[0, 1]
    assert record.metrics["return"] == pytest.approx(matrix[-1].mean())
    assert record.metrics["forward_transfer"] != 0.0
    assert len(record.series["training_return"]) == 3 * TINY["steps"] / (2 * 25)
    assert record.series["return"][1:] == pytest.approx(list(matrix.mean(1)))
    # 3 episodes of 20 steps and the first frame, at .1 s; after a task's last step comes the next task's first frame
    assert film_ms(record.pictures["reach"].data) == 61 * 100
    # a seeded run is equal, whatever ran before it in the process
    for metric in ("return", "forward_transfer", "routing_accuracy"):
        assert record.metrics[metric] == mean(results, "pool_oracle", metric)


def test_sizes_of_mlps(env):
    for depth, width in ((1, 5), (2, 30), (3, 17)):
        model = PPO("MlpPolicy", env, policy_kwargs={"net_arch": [width] * depth}, device="cpu")
        parameters = count_parameters(model.policy).total
        assert mlp_parameters(width, depth, 7, 2) == parameters
        assert width_for(parameters, depth, 7, 2) == width
        assert width_for(parameters + 3, depth, 7, 2) == width  # a step of the width is more than 6 parameters
    assert width_for(0, 2, 7, 2) == 1
    # 2 * (8 w + (w + 1) w) + 3 (w + 1) + 2 is 28,391 for w = 114 and 28,870 for 115
    assert MLP(SequenceConfig(), env, 0, 28_623, "nothing").width == 114
    with pytest.raises(ValueError, match="say its number of parameters"):
        MLP(SequenceConfig(), env, 0, None, "nothing")


def test_heads_drawn_anew_leave_the_hidden_layers(env):
    learner = MLP(SequenceConfig(**TINY), env, 0, 1_000, "heads")
    model, policy = learner.model, learner.model.policy
    model.learn(50)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    learner.begin(0)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    learner.begin(1)
    changed = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    heads = {"action_net.weight", "action_net.bias", "value_net.weight", "value_net.bias"}
    assert changed == {"log_std", *heads}
    torch.testing.assert_close(policy.action_net.weight.norm(dim=1), torch.full((2,), 0.01))  # orthogonal, gain .01
    torch.testing.assert_close(policy.value_net.weight.norm(), torch.tensor(1.0))
    assert policy.log_std.eq(0).all()
    assert not policy.optimizer.state
    draw_heads_anew(model)
    assert model.learn(50) is model


def test_what_begins_anew_in_mlps(env):
    kept, drawn = (MLP(SequenceConfig(**TINY), env, 0, 1_000, anew) for anew in ("nothing", "all"))
    models = kept.model, drawn.model
    for learner in (kept, drawn):
        learner.begin(0)
    assert (kept.model, drawn.model) == models
    for learner in (kept, drawn):
        learner.begin(1)
    assert kept.model is models[0]
    assert drawn.model is not models[1]
    old, new = (model.policy.action_net.weight for model in (models[1], drawn.model))
    assert not torch.equal(old, new)


def test_a_pool_freezes_what_it_learned(env):
    pool = Pool(SequenceConfig(**TINY), env, 0, oracle=False)
    for task in range(3):
        env.env_method("set_task", task)
        pool.begin(task)
    experts = pool.model.policy.moe.pool
    assert experts.tasks() == (0, 1, 2)
    assert experts.frozen_ids == experts.ids[:2]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_tasks": 1}, "two tasks at least: num_tasks=1"),
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"steps": 1_500}, "whole rollouts of num_envs [*] rollout = 1000 steps: 2000 would be"),
        ({"batch_size": 300}, "batch_size=300 must divide num_envs [*] rollout = 1000"),
        ({"hidden_features": []}, "hidden_features needs one layer at least"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"discount": 1.5}, "discount in \\[0, 1\\]"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        SequenceConfig(**setting)


def test_the_command_line_says_what_is_wrong(capsys):
    assert main(["run", str(CONFIG), "--steps", "1500"]) == 2
    assert "2000 would be" in capsys.readouterr().err


def test_the_config_names_known_keys():
    settings = yaml.safe_load(CONFIG.read_text())
    assert settings.pop("experiment") == "rl_sequence"
    assert settings.pop("seeds") == 5
    assert settings.keys() <= vars(SequenceConfig()).keys()
    assert CONFIG.read_text().startswith("#"), "a header says cost, seeds and the last result"
