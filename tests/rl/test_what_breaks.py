"""What breaks when an SB3 model's parameters change, and the test that shows our behaviour; SB3 issues; bad input.

| what breaks (the facts page)                          | test (``growth``, ``policies``, ``safe``: test_*.py)      |
|-------------------------------------------------------|-----------------------------------------------------------|
| grow, ignore the optimizer: no movement               | a_grown_expert_is_in_the_optimizer_and_moves              |
| remove parameters, leave optimizer.state: KeyError    | saving_after_a_removal                                    |
| add_param_group: load raises on the number of groups  | growth_keeps_one_group_with_the_scheduled_rate            |
| append in another order: wrong-shape moments          | the_optimizer_has_the_order_of_the_module_after_load      |
| stale policy_kwargs: load raises                      | policy_kwargs_say_the_number_of_experts_and_load_works    |
| policy.save without _get_constructor_parameters       | a_policy_is_saved_and_loaded_alone                        |
| set_parameters(old) raises for a resized gate         | old_parameters_bring_the_old_pool_back                    |
| grow only the online network: polyak raises           | targets_have_the_same_rows_in_the_same_order              |
| freeze everything: backward raises                    | nothing_to_train_is_said_when_an_update_begins            |
| freeze by zero gradients under AdamW: it moves        | growth: frozen_experts_are_bit_identical_under_adamw      |
| grow in the middle of a rollout: biased ratios        | growth_in_the_middle_of_a_rollout_is_refused              |

| issue of SB3                                          | test                                                      |
|-------------------------------------------------------|-----------------------------------------------------------|
| #1881 extra losses, #2028 a loss without effect       | policies: an_auxiliary_loss_moves_the_gate_and_is_logged  |
| #409 frozen extractor                                 | a_frozen_extractor_stays_through_load                     |
| #205 multi-task set_env, #2100 continual SAC          | growth: a_task_in_a_new_env_gets_an_expert                |
| #285 multi-head SAC, #544 modular policies            | policies: a_batch_of_two_tasks_is_computed_apart          |
| #597 reload and continue                              | growth: grow_save_load_train_equals_going_on              |
"""

import copy

import pytest
import torch
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback

from modmoe.rl import freeze, grow, remove

EVERY = ["ppo", "ppo_discrete", "a2c", "sac", "td3", "dqn"]
WITH_TARGETS = ["sac", "td3", "dqn"]


def optimizers(model):
    return [part.optimizer for part in model.policy.parts()]


@pytest.mark.parametrize("name", EVERY)
def test_a_grown_expert_is_in_the_optimizer_and_moves(make, name):
    model = make(name).learn(32)
    new = grow(model)
    before = [part.network.pool.expert_state(new[0]) for part in model.policy.parts()]
    model.learn(64)
    for part, old in zip(model.policy.parts(), before, strict=True):
        listed = [id(p) for group in part.optimizer.param_groups for p in group["params"]]
        assert sorted(listed) == sorted({id(p) for p in part.module.parameters()})
        state = part.network.pool.expert_state(new[0])
        weights = [row for row in old if row.startswith("expert.") and "w_" in row]
        assert weights
        assert not any(torch.equal(old[row], state[row]) for row in weights)


@pytest.mark.parametrize("name", ["ppo", "sac", "dqn"])
def test_saving_after_a_removal(make, tmp_path, name):
    model = make(name).learn(32)
    grow(model)
    model.learn(32)
    remove(model, [0])
    for optimizer in optimizers(model):
        listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in optimizer.state} <= listed
    model.save(tmp_path / "model.zip")
    loaded = type(model).load(tmp_path / "model.zip")
    assert loaded.policy.parts()[0].network.pool.ids == (1, 2)


def test_growth_keeps_one_group_with_the_scheduled_rate(make):
    model = make("ppo", alg_learning_rate=lambda left: 1e-3 * left).learn(32)
    grow(model)
    model.learn(64)
    assert [len(optimizer.param_groups) for optimizer in optimizers(model)] == [1]
    # 64 steps in two rollouts of 16 x 2: the last update ran with nothing left, so at 1e-3 * 0
    assert optimizers(model)[0].param_groups[0]["lr"] == pytest.approx(0.0)


@pytest.mark.parametrize("name", ["ppo", "sac", "dqn"])
def test_the_optimizer_has_the_order_of_the_module_after_load(make, tmp_path, name):
    model = make(name).learn(32)
    grow(model)
    freeze(model, [0])
    grow(model, 2)
    model.learn(32)
    model.save(tmp_path / "model.zip")
    loaded = type(model).load(tmp_path / "model.zip")
    for part, other in zip(model.policy.parts(), loaded.policy.parts(), strict=True):
        names = {id(p): name for name, p in part.module.named_parameters()}
        assert [names[id(p)] for p in part.optimizer.param_groups[0]["params"]] == list(names.values())
        saved = part.optimizer.state_dict()["state"]
        got = other.optimizer.state_dict()["state"]
        assert saved.keys() == got.keys()
        for parameter in other.optimizer.param_groups[0]["params"]:
            assert other.optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        assert all(torch.equal(saved[key]["exp_avg"], got[key]["exp_avg"]) for key in saved)


def test_policy_kwargs_say_the_number_of_experts_and_load_works(make, tmp_path):
    model = make("ppo")
    grow(model, 3)
    assert model.policy_kwargs["num_experts"] == 5
    remove(model, [1])
    assert model.policy_kwargs["num_experts"] == 4
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip")
    assert loaded.policy.moe.pool.ids == model.policy.moe.pool.ids == (0, 2, 3, 4)
    assert loaded.policy_kwargs["num_experts"] == 4


@pytest.mark.parametrize("name", EVERY)
def test_a_policy_is_saved_and_loaded_alone(make, envs, tmp_path, name):
    model = make(name)
    grow(model)
    model.policy.save(tmp_path / "policy.pt")
    policy = type(model.policy).load(tmp_path / "policy.pt", device="cpu")
    obs = model.get_env().reset()
    assert (policy.predict(obs, deterministic=True)[0] == model.predict(obs, deterministic=True)[0]).all()
    assert policy.options == model.policy.options


@pytest.mark.parametrize("exact", [True, False])
def test_old_parameters_bring_the_old_pool_back(make, exact):
    model = make("sac").learn(32)
    old = copy.deepcopy(model.get_parameters())
    if not exact:
        old = {"policy": old["policy"]}
    grow(model, 2)
    model.set_parameters(old, exact_match=exact)
    for part in model.policy.parts():
        assert part.network.pool.ids == (0, 1)
        assert part.target is None or part.target.pool.ids == (0, 1)
    assert all(torch.equal(value, old["policy"][name]) for name, value in model.policy.state_dict().items())
    model.learn(32)


@pytest.mark.parametrize("name", WITH_TARGETS)
def test_targets_have_the_same_rows_in_the_same_order(make, name):
    model = make(name, alg_tau=0.1).learn(40)
    grow(model)
    model.learn(40)
    freeze(model, [0])
    grow(model, init="copy")
    remove(model, [1])
    model.learn(40)
    for part in model.policy.parts():
        if part.target is None:
            continue
        online, target = (dict(n.named_parameters()) for n in (part.network, part.target))
        assert list(online) == list(target)
        assert all(online[key].shape == target[key].shape for key in online)
        assert part.network.pool.book == part.target.pool.book
        assert any(not torch.equal(online[key], target[key]) for key in online)  # the target is slow
        for key, rows in part.network.pool.expert_state(0).items():  # frozen: polyak does not reach these
            assert torch.equal(rows, part.target.pool.expert_state(0)[key])


def test_a_target_keeps_its_slow_rows_when_the_online_network_grows(make):
    model = make("sac", alg_tau=0.01).learn(60)
    part = model.policy.parts()[1]
    before = part.target.pool.expert_state(0)
    assert any(not torch.equal(before[key], rows) for key, rows in part.network.pool.expert_state(0).items())
    new = grow(model)
    assert all(torch.equal(before[key], rows) for key, rows in part.target.pool.expert_state(0).items())
    for key, rows in part.network.pool.expert_state(new[0]).items():
        assert torch.equal(rows, part.target.pool.expert_state(new[0])[key])


@pytest.mark.parametrize("name", ["ppo", "sac", "dqn"])
def test_nothing_to_train_is_said_when_an_update_begins(make, name):
    model = make(name)
    freeze(model)
    model.predict(model.get_env().reset())  # acting is possible
    with pytest.raises(ValueError, match=r"every expert.* is frozen and nothing else is trained: grow"):
        model.learn(64)
    grow(model)
    model.learn(64)


class GrowAt(BaseCallback):
    def __init__(self, where: str):
        super().__init__()
        self.where = where

    def _on_step(self) -> bool:
        if self.where == "step" and self.n_calls == 1:
            grow(self.model)
        return self.where != "stop" or self.n_calls < 3

    def _on_rollout_start(self) -> None:
        if self.where == "start":
            grow(self.model)

    def _on_rollout_end(self) -> None:
        if self.where == "end":
            grow(self.model)


@pytest.mark.parametrize("name", ["ppo", "sac"])
@pytest.mark.parametrize("where", ["step", "end"])
def test_growth_in_the_middle_of_a_rollout_is_refused(make, name, where):
    model = make(name)
    with pytest.raises(ValueError, match="in the middle of a rollout"):
        model.learn(32, callback=GrowAt(where))
    assert model.policy.parts()[0].network.pool.num_experts == 2


def test_growth_at_a_rollouts_start_or_after_a_broken_one(make):
    model = make("ppo")
    model.learn(64, callback=GrowAt("start"))  # two rollouts of 16 x 2 steps
    assert model.policy.moe.pool.num_experts == 4
    model.learn(64, callback=GrowAt("stop"))
    grow(model)
    assert model.policy.moe.pool.num_experts == 5


def test_a_frozen_extractor_stays_through_load(make, tmp_path):
    model = make("ppo", trunk=[8], gate_input="hidden").learn(32)
    freeze(model, [0], shared=True)
    trunk = [p.clone() for p in model.policy.moe.trunk.parameters()]
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", model.get_env())
    loaded.learn(64)
    assert all(torch.equal(a, b) for a, b in zip(trunk, loaded.policy.moe.trunk.parameters(), strict=True))
    assert not any(p.requires_grad for p in loaded.policy.moe.trunk.parameters())


@pytest.mark.parametrize(("algorithm", "name"), [(PPO, "ppo"), (SAC, "sac"), (DQN, "dqn")])
def test_parameters_of_a_plain_policy_are_refused(make, tmp_path, algorithm, name):
    model = make(name)
    plain = algorithm("MlpPolicy", model.get_env(), device="cpu")
    with pytest.raises(ValueError, match="belong to a policy without experts"):
        model.set_parameters(plain.get_parameters())
    with pytest.raises(ValueError, match="Policy has no experts"):
        grow(plain)
