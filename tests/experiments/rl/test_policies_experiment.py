"""Mixture policies beside plain ones: equal sizes, held-out episodes of each context, and mistakes told early."""

import json
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from gymnasium import spaces
from stable_baselines3.common.utils import set_random_seed

from modmoe.cli import main
from modmoe.errors import MissingExtraError
from modmoe.experiments.keys import Keys, UsageError, replaced
from modmoe.experiments.rl.policies import PoliciesConfig
from modmoe.experiments.rl.policies_envs import OneHotContext, check_environments, make_training_envs
from modmoe.experiments.rl.policies_heads import ContextHeads
from modmoe.experiments.rl.policies_methods import count, equal_sizes, make_model, num_parameters

FOLDER = Path(__file__).parents[3] / "configs" / "rl"
CONFIGS = sorted([*FOLDER.glob("ppo_moe_*.yaml"), *FOLDER.glob("sac_moe_*.yaml")])
ALL = ["moe", "moe_oracle", "mlp", "multi_head_mlp", "scaled_expert"]
REACH = "modmoe_envs:modmoe/RotatedReach-v0"
FEW_STEPS = {"n_steps": 32, "batch_size": 64, "n_epochs": 2}
FEW_UPDATES = {"learning_starts": 20, "batch_size": 32}


def tiny(**changes):
    settings = {
        "env": REACH,
        "num_contexts": 3,
        "algorithm_kwargs": FEW_STEPS,
        "timesteps": 128,
        "num_envs": 2,
        "hidden_features": 16,
        "evaluation_episodes": 2,
        "methods": ALL,
        "film": False,
    }
    return PoliciesConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("policies")
    path = FOLDER / "ppo_moe_reach.yaml"
    changes = {"timesteps": 256, "num_envs": 2, "evaluation_episodes": 2, "hidden_features": 16}
    options = [text for key, value in changes.items() for text in (f"--{key}", str(value))]
    options += ["--algorithm_kwargs", json.dumps(FEW_STEPS)]
    assert main(["run", str(path), "--seeds", "1", "--out", str(out), *options]) == 0
    return json.loads((out / "metrics.json").read_text())["methods"], out


def test_methods_and_metrics(results):
    methods = results[0]
    assert list(methods) == ALL
    for name, metrics in methods.items():
        each = [metrics[f"return/context_{context}"]["mean"] for context in range(3)]
        assert metrics["return"]["mean"] == pytest.approx(np.mean(each))
        assert metrics["return"]["mean"] < 0  # minus a distance
        assert metrics["steps_per_second"]["mean"] * metrics["seconds"]["mean"] == pytest.approx(256)
        assert ("mutual_information" in metrics) == (name in ("moe", "moe_oracle"))
    # routing by the truth: the expert tells which of three equally frequent contexts it is
    assert methods["moe_oracle"]["mutual_information"]["mean"] == pytest.approx(np.log(3))
    assert 0 <= methods["moe"]["mutual_information"]["mean"] <= np.log(3)


def test_every_method_has_the_parameters_of_the_mixture_within_5_percent(results):
    methods = results[0]
    # an actor from 7 features by 16 and 16 to 2 actions: 128 + 272 + 34; its critic: 128 + 272 + 17; and 2 numbers of
    # log_std and 7 of the gate: 860 for each of four experts
    assert methods["moe"]["parameters"]["mean"] == 4 * (128 + 272 + 34 + 128 + 272 + 17 + 2 + 7)
    for name in ALL:
        assert methods[name]["parameters"]["mean"] == pytest.approx(4 * 860, rel=0.05)


def test_files_are_written_and_the_report_shows_films(results):
    out = results[1]
    assert (out / "report.html").read_text().count("data:image/gif") == len(ALL)
    assert list((out / "tensorboard" / "seed10" / "moe").glob("events*"))


def test_a_seed_gives_the_same_numbers():
    def returns():
        records = tiny(methods=["moe", "multi_head_mlp"], timesteps=64).run(3, lambda text: None)
        return {name: record.metrics["return"] for name, record in records.items()}

    assert returns() == returns()


def test_routing_and_the_course_of_training():
    record = tiny(methods=["moe_oracle"]).run(0, lambda text: None)["moe_oracle"]
    np.testing.assert_array_equal(record.matrices["routing"].values, np.eye(3))
    curve = record.series["training_return"]
    assert len(curve) == 20
    # two environments with episodes of 20 steps: the first are over after 40, at the seventh of 20 points of 128
    assert np.isnan(curve[5])
    assert np.isfinite(curve[6:]).all()
    assert record.metrics["training_return"] == pytest.approx(np.mean(curve[6:]))
    assert "each context" in record.about


@pytest.mark.parametrize("hidden", [4, 32])
@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_sizes_are_equal_for_both_algorithms(algorithm, hidden):
    config = tiny(algorithm=algorithm, hidden_features=hidden)
    space, actions = spaces.Box(-1.0, 1.0, (9,)), spaces.Box(-1.0, 1.0, (2,))
    target = count("moe", config, space, actions, hidden)
    for method, found in equal_sizes(config, space, actions).items():
        assert count(method, config, space, actions, found) == pytest.approx(target, rel=0.05)


@pytest.mark.parametrize("method", ALL)
def test_sizes_are_those_of_the_models(method):
    config = tiny(algorithm="sac", algorithm_kwargs=FEW_UPDATES)
    envs = make_training_envs(config)
    model = make_model(method, config, envs, 8, seed=0)
    assert num_parameters(model.policy) == count(method, config, envs.observation_space, envs.action_space, 8)


def test_sac_trains_every_method():
    config = tiny(algorithm="sac", algorithm_kwargs=FEW_UPDATES, timesteps=40, evaluation_episodes=1)
    records = config.run(0, lambda text: None)
    assert list(records) == ALL
    assert all(np.isfinite(record.metrics["return"]) for record in records.values())


def test_an_environment_without_contexts():
    config = tiny(env="Pendulum-v1", num_contexts=0, methods=["moe", "mlp"], evaluation_episodes=1)
    records = config.run(0, lambda text: None)
    assert "return/context_0" not in records["moe"].metrics
    assert "mutual_information" not in records["moe"].metrics


def test_listed_contexts_are_seen_behind_the_observation():
    config = tiny(env="Pendulum-v1", num_contexts=0, contexts=[{"g": 5.0}, {"g": 15.0}], evaluation_episodes=1)
    config = replace(config, methods=["moe", "moe_oracle"], timesteps=64)
    envs = make_training_envs(config)
    np.testing.assert_array_equal(envs.reset()[:, 3:], [[1, 0], [0, 1]])
    assert [env.unwrapped.g for env in envs.envs] == [5.0, 15.0]
    records = config.run(0, lambda text: None)
    assert records["moe_oracle"].metrics["mutual_information"] == pytest.approx(np.log(2))
    assert records["moe"].metrics["return/context_0"] != records["moe"].metrics["return/context_1"]


def test_heads_share_their_trunk_and_are_chosen_by_the_context():
    set_random_seed(0)
    net = ContextHeads(4, 3, 2, (2, 4), torch.nn.Tanh)
    # 4 * 3 + 3, 3 * 3 + 3, and two heads of 2 * 3 + 2
    assert sum(parameter.numel() for parameter in net.parameters()) == 15 + 12 + 2 * 8
    x = torch.tensor([[0.3, -0.4, 0.0, 1.0], [0.3, -0.4, 1.0, 0.0]])
    hidden = net.trunk(x)
    weight, bias = net.heads.weight, net.heads.bias
    expected = torch.stack([weight[2:] @ hidden[0] + bias[2:], weight[:2] @ hidden[1] + bias[:2]])
    torch.testing.assert_close(net(x), expected)
    net(x[:1]).sum().backward()
    assert weight.grad[:2].abs().max() == 0 < weight.grad[2:].abs().max()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_contexts": 0}, r"\['moe_oracle', 'multi_head_mlp'\] need contexts"),
        ({"contexts": [{}]}, "0 where contexts are listed"),
        ({"num_contexts": 0, "contexts": [{}, {}, {}]}, "multiple of the 3 contexts, so that each .* got 2"),
        ({"methods": ["moe", "moe"]}, "each once"),
        ({"methods": ["mixture"]}, "methods are some of"),
        ({"methods": []}, "methods are some of"),
        ({"timesteps": 0}, "timesteps must be at least 1, got 0"),
        ({"num_contexts": -1}, "num_contexts must be at least 0"),
        ({"algorithm_kwargs": {"policy_kwargs": {}}}, r"may not say \['policy_kwargs'\]"),
    ],
)
def test_wrong_settings(changes, text):
    with pytest.raises(ValueError, match=text):
        tiny(**changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"env": "modmoe_envs:modmoe/Nothing-v0"}, "Nothing-v0 cannot be made"),
        ({"env_kwargs": {"wind": 3}}, "cannot be made with .*wind"),
        ({"env_kwargs": {"context": "hidden"}}, r"read the context from the last 3 numbers .* they are \[0"),
        ({"num_contexts": 4}, "has no context 3 that a reset can choose|read the context from the last 4"),
        ({"num_contexts": 2}, "read the context from the last 2 numbers"),
    ],
)
def test_mistakes_in_the_environment_are_told_before_training(changes, text):
    with pytest.raises(UsageError, match=text):
        check_environments(tiny(**changes))


def test_contexts_need_flat_observations():
    env = gym.Env()
    env.observation_space = spaces.Discrete(3)
    with pytest.raises(UsageError, match="appended to flat observations"):
        OneHotContext(env, 0, 2)


def test_too_few_parameters_to_be_equal():
    space, actions = spaces.Box(-1.0, 1.0, (9,)), spaces.Box(-1.0, 1.0, (2,))
    with pytest.raises(ValueError, match=r"comes no closer to the .* give moe more hidden_features"):
        equal_sizes(tiny(hidden_features=1, num_experts=1, router_kwargs={"top_k": 1}), space, actions)


@pytest.mark.parametrize(
    ("env", "error", "command"),
    [
        ("BipedalWalker-v3", gym.error.DependencyNotInstalled("Box2D is not installed"), "modmoe\\[box2d\\]"),
        ("HalfCheetah-v5", gym.error.DependencyNotInstalled("MuJoCo is not installed"), "modmoe\\[mujoco\\]"),
        ("metaworld:Meta-World/MT1", ModuleNotFoundError("No module named 'metaworld'"), "modmoe\\[metaworld\\]"),
    ],
)
def test_a_missing_library_is_told_before_training(monkeypatch, env, error, command):
    def make(*args, **kwargs):
        raise error

    monkeypatch.setattr(gym, "make", make)
    with pytest.raises(MissingExtraError, match=f"pip install '{command}'"):
        tiny(env=env).run(0, lambda text: None)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_loads(path):
    settings = yaml.safe_load(path.read_text())
    assert settings.pop("experiment") == "rl_policies"
    settings.pop("first_seed", None)
    assert settings.pop("seeds") >= 3
    keys = Keys(PoliciesConfig(), "test")
    config = replaced(PoliciesConfig(), keys.flatten(settings, path.name))
    assert config.methods == (ALL if config.context_width else ["moe", "mlp", "scaled_expert"])
    assert path.read_text().startswith("#"), "a header says cost, seeds and the last result"


def test_all_six_configs_are_there():
    assert len(CONFIGS) == 6
