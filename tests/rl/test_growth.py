"""Growth, freezing and resuming of SB3 models: what is exact."""

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO, SAC

from modmoe.rl import freeze, grow, remove, unfreeze

EVERY = ["ppo", "ppo_discrete", "a2c", "sac", "td3", "dqn"]
ORACLE = {"context": (2, 4), "task_of": "one_hot", "task": 0, "router": "top_k", "router_kwargs": {"top_k": 1}}
TIE = {"router": "top_k", "router_kwargs": {"top_k": 1, "renormalize": True}}


def outputs(model, obs) -> list[torch.Tensor]:
    """What every network of the policy gives, its targets included."""
    found = []
    with torch.no_grad():
        for part in model.policy.parts():
            features = model.policy.features_of(part, obs)
            extra = torch.zeros(len(obs), 2) if part.name == "critic" else None
            for network in (part.network, part.target):
                if network is not None:
                    mixed = network(features, obs, extra)
                    found.append(mixed.outputs)
                    if "log_std" in network.pool.namespaces:
                        found.append(network.log_stds(mixed.weights))
    return found


def states(model, expert_id: int) -> list[dict[str, torch.Tensor]]:
    return [part.network.pool.expert_state(expert_id) for part in model.policy.parts()]


def same(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


def everything(model) -> dict[str, torch.Tensor]:
    found = {f"policy.{name}": value for name, value in model.policy.state_dict().items()}
    for part in model.policy.parts():
        for index, state in part.optimizer.state_dict()["state"].items():
            found |= {f"{part.name}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return {name: value.clone() for name, value in found.items()}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("router", [{"router": "dense"}, TIE], ids=["dense", "top_1"])
def test_function_preserving_growth_changes_no_output(make, name, router):
    model = make(name, **router, log_std_init=-0.7) if name in ("ppo", "a2c") else make(name, **router)
    model.learn(40)
    obs = torch.randn(64, 4)
    before = outputs(model, obs)
    grow(model, 2, init="copy")
    after = outputs(model, obs)
    assert len(before) == len(after)
    assert max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True)) < 1e-6
    grow(model)  # a fresh one does change it, so the test above can fail
    assert max(float((a - b).abs().max()) for a, b in zip(after, outputs(model, obs), strict=True)) > 1e-6


@pytest.mark.parametrize("name", EVERY)
def test_frozen_experts_are_bit_identical_under_adamw(make, name):
    model = make(name).learn(40)
    freeze(model, [0])
    frozen = states(model, 0)
    live = states(model, 1)
    model.learn(80)
    assert same(frozen, states(model, 0))
    assert not same(live, states(model, 1))
    unfreeze(model, [0])
    model.learn(40)
    assert not same(frozen, states(model, 0))


@pytest.mark.parametrize("name", EVERY)
def test_a_task_in_a_new_env_gets_an_expert(make, envs, name):
    """Oracle routing: what a frozen expert does in its task stays the same to the last bit, whatever comes after."""
    continuous = name not in ("ppo_discrete", "dqn")
    model = make(name, **{**ORACLE, "num_experts": 1}, trunk=[]).learn(40)
    obs = torch.randn(16, 4)
    obs[:, 2:] = torch.tensor([1.0, 0.0])
    freeze(model)
    grow(model, task=1)
    before = outputs(model, obs)
    model.set_env(envs(task=1, continuous=continuous))
    model.learn(80)
    grow(model, 2, task=2)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, obs), strict=True))
    other = obs.clone()
    other[:, 2:] = torch.tensor([0.0, 1.0])
    assert not torch.equal(before[0], outputs(model, other)[0])


@pytest.mark.parametrize("name", EVERY)
def test_grow_save_load_train_equals_going_on(make, tmp_path, name):
    model = make(name, balance_coef=0.01).learn(40)
    grow(model, init="copy")
    freeze(model, [0])
    new = grow(model, 2)
    model.learn(40)
    remove(model, new[:1])
    model.save(tmp_path / "model.zip")
    loaded = type(model).load(tmp_path / "model.zip", model.get_env())
    if hasattr(model, "replay_buffer"):
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    results = []
    for one in (model, loaded):
        one.set_random_seed(5)
        results.append(everything(one.learn(64)))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


@pytest.mark.parametrize("name", ["ppo", "ppo_discrete", "sac", "td3", "dqn"])
def test_a_new_expert_starts_with_the_given_actions(make, name):
    """SB3 rescales [-1, 1] to the environment's [-2, 2] for SAC and TD3: .25 there is a force of .5."""
    model = make(name, **{**ORACLE, "num_experts": 1})
    discrete = name in ("ppo_discrete", "dqn")
    first, second = ([0, 0, 9, 0], [0, 9, 0, 0]) if discrete else ([0.25, -0.5], [0.75, 0.0])
    freeze(model)
    ids = grow(model, 2, [first, second], task=1)
    part = model.policy.parts()[0]
    rows = [part.network.pool.expert_state(expert_id)["expert.pi_b_out"][0] for expert_id in ids]
    expected = torch.tensor([first, second], dtype=torch.float32)
    if name in ("sac", "td3"):
        expected = expected.atanh()
    assert torch.allclose(torch.stack(rows)[:, : expected.shape[1]], expected)
    remove(model, ids[1:])
    obs = np.array([[0.1, -0.1, 0.0, 1.0]], np.float32)
    action = model.predict(obs, deterministic=True)[0]
    if discrete:
        assert action == [2]
    elif name == "ppo":  # its output weights are drawn small
        assert action == pytest.approx(np.array([first]), abs=0.05)


def test_seeded_runs_are_equal(make):
    runs = []
    for _ in range(2):
        model = make("sac", seed=3).learn(40)
        grow(model)
        runs.append(everything(model.learn(40)))
    assert all(torch.equal(value, runs[1][key]) for key, value in runs[0].items())


def test_survivors_keep_their_moments(make):
    model = make("ppo").learn(64)
    growable = model.policy.moe.pool.growable("expert", "pi_w_0")
    moments = model.policy.optimizer.state[growable.live()[0][0]]["exp_avg"].clone()
    assert float(moments[1].abs().max()) > 0
    new = grow(model)
    freeze(model, [0])
    found = {
        row.owner: model.policy.optimizer.state.get(tensor, {}).get("exp_avg", [None])[index]
        for tensor, rows in growable.live()
        for index, row in enumerate(rows)
    }
    assert set(found) == {1, *new}
    assert torch.equal(found[1], moments[1])
    assert found[new[0]] is None


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_changes_keeps_targets_and_optimizers_in_line(make, seed):
    generator = np.random.default_rng(seed)
    model = make("td3", alg_tau=0.2)
    for _ in range(6):
        pool = model.policy.parts()[0].network.pool
        chosen = [int(generator.choice(pool.ids))]
        change = generator.integers(5)
        if change == 0 or len(pool.frozen_ids) == pool.num_experts:
            grow(model, int(generator.integers(1, 3)))
        elif change == 1:
            grow(model, init="copy")
        elif change == 2:
            freeze(model, chosen)
        elif change == 3:
            unfreeze(model, chosen)
        elif pool.num_experts > 2:
            remove(model, chosen)
        if len(pool.frozen_ids) < pool.num_experts:
            model.learn(16, reset_num_timesteps=False)
    for part in model.policy.parts():
        assert part.target is not None
        own, slow = part.network.state_dict(), part.target.state_dict()
        assert list(own) == list(slow)
        assert all(own[key].shape == slow[key].shape for key in own)
        assert part.network.pool.book == part.target.pool.book
        for expert_id in part.network.pool.frozen_ids:
            other = part.target.pool.expert_state(expert_id)
            assert all(torch.equal(v, other[k]) for k, v in part.network.pool.expert_state(expert_id).items())
        listed = [id(p) for group in part.optimizer.param_groups for p in group["params"]]
        assert listed == [id(p) for p in part.module.parameters()]
        assert {id(p) for p in part.optimizer.state} <= set(listed)


@pytest.mark.parametrize("name", ["ppo", "sac"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: grow(model, 0), "n must be at least 1"),
        (lambda model: grow(model, init="twice"), "init is 'fresh', 'zero' or 'copy'"),
        (lambda model: grow(model, init="copy", source=7), "no experts with ids"),
        (lambda model: grow(model, 1, [1.0, 2.0, 3.0]), r"of shape \(2,\) or \(1, 2\), got \(3,\)"),
        (lambda model: grow(model, 1, [1.0, float("nan")]), "finite"),
        (lambda model: remove(model, [0, 1]), "keeps at least one expert"),
        (lambda model: remove(model, [9]), "no experts with ids"),
        (lambda model: freeze(model, [9]), "no experts with ids"),
    ],
)
def test_bad_changes_are_refused_and_change_nothing(make, name, change, message):
    model = make(name)
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        change(model)
    after = everything(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_copy_where_the_router_knows_none_is_refused(make):
    model = make("ppo", router="top_k", router_kwargs={"top_k": 2})
    with pytest.raises(ValueError, match="cannot keep the layer's function"):
        grow(model, init="copy")


def test_a_bias_needs_experts_that_own_their_heads(make):
    with pytest.raises(ValueError, match="needs experts that own their action outputs"):
        grow(make("ppo", own_heads=False), 1, [0.0, 0.0])


@pytest.mark.parametrize("algorithm", [PPO, SAC])
def test_a_plain_model_is_refused(envs, algorithm):
    with pytest.raises(ValueError, match="has no experts: make the model with a policy of"):
        grow(algorithm("MlpPolicy", envs(), device="cpu"))
