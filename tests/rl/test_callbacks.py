"""Callbacks: when they grow, and what they log."""

import csv

import pytest
from stable_baselines3.common.logger import configure

from modmoe.rl import GrowOnPlateau, GrowOnTask, RoutingLogger, grow

ORACLE = {"context": (2, 4), "task_of": "one_hot", "task": 0, "router": "top_k", "router_kwargs": {"top_k": 1}}


def pool_of(model):
    return model.policy.parts()[0].network.pool


@pytest.mark.parametrize("name", ["ppo", "sac"])
@pytest.mark.parametrize("source", ["observation", "context", "function"])
def test_grow_on_task(make, envs, name, source):
    if source == "function":

        def source(model):
            return model.get_env().get_attr("unwrapped")[0].task

    model = make(name, **{**ORACLE, "num_experts": 1})
    model.learn(40, callback=GrowOnTask(source))
    assert pool_of(model).tasks() == (0,)
    model.set_env(envs(task=1))
    model.learn(40, callback=GrowOnTask(source, n=1))
    assert pool_of(model).tasks() == (0, 1)
    assert pool_of(model).frozen_ids == (0,)


def test_grow_on_task_says_what_is_missing(make):
    with pytest.raises(ValueError, match=r"infos of the environments \[0, 1\] have no 'terrain'"):
        make("ppo").learn(32, callback=GrowOnTask("terrain"))
    with pytest.raises(ValueError, match="does not know tasks"):
        make("ppo").learn(32, callback=GrowOnTask())


def test_grow_on_plateau(make):
    """Rollouts of 32 steps; a rise of 1000 never comes, so after the first look each pair of looks is a plateau.

    Looks at 32 (the first mean: a rise from -inf), 64, 96 (grows), 128, 160 (grows: 4 experts), then no more.
    """
    callback = GrowOnPlateau(every=32, patience=2, min_delta=1000.0, max_experts=4)
    model = make("ppo").learn(96 + 32, callback=callback)
    assert pool_of(model).num_experts == 3
    model.learn(320, callback=callback, reset_num_timesteps=False)
    assert pool_of(model).num_experts == 4


def test_no_growth_while_returns_rise(make):
    callback = GrowOnPlateau(every=32, patience=1, min_delta=-1000.0)  # every look counts as a rise
    assert pool_of(make("ppo").learn(160, callback=callback)).num_experts == 2


@pytest.mark.parametrize("numbers", [(0, 1, 1, 8), (1, 0, 1, 8), (1, 1, 0, 8), (1, 1, 1, 0)])
def test_grow_on_plateau_refuses_bad_numbers(numbers):
    every, patience, n, most = numbers
    with pytest.raises(ValueError, match="at least 1"):
        GrowOnPlateau(every=every, patience=patience, n=n, max_experts=most)


@pytest.mark.parametrize("name", ["ppo", "sac", "dqn"])
def test_routing_is_logged(make, tmp_path, name):
    model = make(name, **ORACLE | {"num_experts": 1})
    grow(model, task=1)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(160, callback=RoutingLogger(), log_interval=1)
    model.logger.close()
    start = "moe/actor_" if name == "sac" else "moe/"
    with (tmp_path / "progress.csv").open() as file:  # SB3 writes a row for each episode, also where nothing is new
        rows = [row for row in csv.DictReader(file) if row[f"{start}load_0"]]
    # task 0 alone: its expert takes everything, without a doubt
    assert float(rows[-1][f"{start}load_0"]) == 1.0
    assert float(rows[-1][f"{start}load_1"]) == 0.0
    assert float(rows[-1][f"{start}dead_experts"]) == 1.0
    assert float(rows[-1][f"{start}entropy"]) == 0.0
    assert float(rows[-1][f"{start}context_0/expert_0"]) == 1.0


def test_routing_logger_writes_tensorboard_events(make, tmp_path):
    model = make("ppo", alg_tensorboard_log=str(tmp_path), balance_coef=0.1)
    model.learn(64, callback=RoutingLogger())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(tmp_path.glob("*"))))
    events.Reload()
    assert {"moe/load_0", "moe/entropy", "moe/dead_experts", "moe/context_0/expert_1", "train/moe_balance"} <= set(
        events.Tags()["scalars"]
    )
