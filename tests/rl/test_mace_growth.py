"""MACE: adding, copying, freezing and removing actor-critic pairs in the middle of training."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import save_to_pkl

from modmoe.rl.mace import MACE
from modmoe.rl.mace_buffers import NOISY, PAIR, PairReplayBuffer

OBS = np.linspace(-1, 1, 20, dtype=np.float32).reshape(10, 2)


class Slide(gym.Env):
    """Episodes of five steps; the reward is how near the action is to the first observation."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 5
        return self._observe(), {}

    def _observe(self):
        self.place = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.place

    def step(self, action):
        reward = 1 - abs(float(action[0] - self.place[0]))
        self.left -= 1
        return self._observe(), reward, self.left == 0, False, {}


def mace(steps=0, seed=0, shared_critic=True, **options) -> MACE:
    model = MACE(
        "MlpPolicy",
        Slide(),
        seed=seed,
        learning_starts=20,
        batch_size=8,
        buffer_size=options.pop("buffer_size", 1000),
        train_freq=1,
        anneal_updates=100,
        target_update_interval=10,
        noise_probability=(0.5, 0.2),
        base_action_probability=(0.1, 0.0),
        device="cpu",
        policy_kwargs={
            "biases": [[-0.6], [0.2]],
            "trunk": (16,),
            "critic_hidden": 16,
            "actor_hidden": 8,
            "shared_critic": shared_critic,
            **options.pop("policy_kwargs", {}),
        },
        **options,
    )
    return model.learn(steps) if steps else model


def outputs(net, obs=OBS) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return net(torch.from_numpy(obs))


def moments(model: MACE, pair: int) -> dict[str, torch.Tensor]:
    """Adam's first moments of every row that a pair owns."""
    found = {}
    for namespace in ("expert", "critic"):
        for name in model.policy.net.pool.namespace(namespace):
            for tensor, rows in model.policy.net.pool.growable(namespace, name).live():
                for index, row in enumerate(rows):
                    if row.owner == pair and tensor in model.policy.optimizer.state:
                        found[f"{namespace}.{name}"] = model.policy.optimizer.state[tensor]["exp_avg"][index].clone()
    return found


def assert_equal(model: MACE, other: MACE) -> None:
    first, second = model.policy.state_dict(), other.policy.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shared_critic", [True, False])
@pytest.mark.parametrize("init", ["fresh", "copy"])
def test_old_pairs_stay_as_they_are(init, shared_critic):
    model = mace(40, shared_critic=shared_critic)
    before = [outputs(net) for net in (model.policy.net, model.policy.target)]
    state = {pair: moments(model, pair) for pair in (0, 1, 2)}
    assert state[0]
    assert model.add_pair(init, bias=[1.0] if init == "fresh" else None) == 3
    for net, (values, actions) in zip((model.policy.net, model.policy.target), before, strict=True):
        new_values, new_actions = outputs(net)
        assert new_values.shape == (10, 4)
        torch.testing.assert_close(new_values[:, :3], values, rtol=0, atol=1e-6)
        torch.testing.assert_close(new_actions[:, :3], actions, rtol=0, atol=1e-6)
    for pair in (0, 1, 2):
        now = moments(model, pair)
        assert now.keys() == state[pair].keys()
        assert all(torch.equal(state[pair][name], now[name]) for name in now)
    assert moments(model, 3) == {}  # a new pair starts without momentum


def test_a_copy_does_what_its_source_does():
    model = mace(40)
    model.add_pair("copy", source=1)
    values, actions = outputs(model.policy.net)
    torch.testing.assert_close(values[:, 3], values[:, 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(actions[:, 3], actions[:, 1], rtol=0, atol=1e-6)
    greedy = model.predict(OBS, deterministic=True)[0]
    model.add_pair("copy")
    np.testing.assert_allclose(model.predict(OBS, deterministic=True)[0], greedy, atol=1e-6)


def test_a_fresh_pair_starts_at_its_bias_and_value_in_the_target_too():
    model = mace(40)
    pair = model.add_pair("fresh", bias=[1.0], value=7.0)
    for net in (model.policy.net, model.policy.target):
        assert net.pool.namespace("critic", [pair])["bias"].tolist() == [7.0]
        assert net.pool.namespace("expert", [pair])["b_out"].tolist() == [[0.5]]  # 1 of [-2, 2] scaled
        assert net.pool.namespace("controller", [pair])["action"].tolist() == [[0.5]]
    actions = model.predict(OBS, deterministic=True)[0]  # the highest value is its own
    assert np.abs(actions - 1.0).max() < 0.5


def test_a_new_pair_learns():
    model = mace(40)
    pair = model.add_pair("fresh", bias=[1.0], value=0.6)
    before = model.policy.net.pool.expert_state(pair)
    model.learn(100, reset_num_timesteps=False)
    after = model.policy.net.pool.expert_state(pair)
    assert (model.replay_buffer.pairs[: model.replay_buffer.size()] == pair).sum() > 10
    assert not torch.equal(before["critic.weight"], after["critic.weight"])
    assert not torch.equal(before["expert.w_out"], after["expert.w_out"])
    assert torch.equal(before["controller.action"], after["controller.action"])
    listed = {id(p) for group in model.policy.optimizer.param_groups for p in group["params"]}
    assert listed == {id(p) for p in model.policy.net.parameters()}


def test_frozen_pairs_are_bit_identical_under_adamw():
    options = {"optimizer_class": torch.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}}
    model = mace(40, policy_kwargs=options)
    model.freeze_pairs([0, 2])
    before = {pair: model.policy.net.pool.expert_state(pair) for pair in (0, 1, 2)}
    model.learn(30, reset_num_timesteps=False)
    after = {pair: model.policy.net.pool.expert_state(pair) for pair in (0, 1, 2)}
    for pair in (0, 2):
        assert all(torch.equal(before[pair][name], after[pair][name]) for name in before[pair])
    assert not torch.equal(before[1]["critic.weight"], after[1]["critic.weight"])
    model.unfreeze_pairs([0])
    model.learn(30, reset_num_timesteps=False)
    assert not torch.equal(before[0]["critic.weight"], model.policy.net.pool.expert_state(0)["critic.weight"])


def test_what_frozen_pairs_do_is_fixed_once_the_shared_layers_are_frozen():
    model = mace(40)
    model.freeze_pairs()
    pair = model.add_pair("copy", source=0)  # of a frozen pair, which the pool alone would refuse
    values, actions = outputs(model.policy.net)
    model.learn(30, reset_num_timesteps=False)
    new_values, new_actions = outputs(model.policy.net)
    torch.testing.assert_close(new_values[:, :3], values[:, :3], rtol=0, atol=0)
    torch.testing.assert_close(new_actions[:, :3], actions[:, :3], rtol=0, atol=0)
    assert not torch.equal(new_values[:, 3], values[:, 3])
    assert model.policy.net.pool.record(pair).frozen is False


def test_training_with_every_pair_frozen_is_refused():
    model = mace(40)
    model.freeze_pairs()
    with pytest.raises(ValueError, match="every pair is frozen"):
        model.learn(10, reset_num_timesteps=False)


def test_removed_pairs_leave_with_their_transitions():
    model = mace(40)
    values, _ = outputs(model.policy.net)
    buffer = model.replay_buffer
    left = int((buffer.pairs[: buffer.size()] != 1).sum())
    model.remove_pairs([1])
    assert len(buffer.critic) + len(buffer.actor) == left
    torch.testing.assert_close(outputs(model.policy.net)[0], values[:, [0, 2]], rtol=0, atol=1e-6)
    assert model.policy.target.pool.ids == (0, 2)
    model.learn(30, reset_num_timesteps=False)
    assert model.add_pair() == 3  # ids are not used again


def test_a_buffer_from_before_a_removal_loads_without_the_removed_pair(tmp_path):
    model = mace(40)
    model.save_replay_buffer(tmp_path / "buffer")
    model.remove_pairs([1])
    model.load_replay_buffer(tmp_path / "buffer")
    buffer = model.replay_buffer
    assert len(buffer.critic) + len(buffer.actor) == int((buffer.pairs[: buffer.size()] != 1).sum())
    model.learn(20, reset_num_timesteps=False)


def test_another_kind_of_buffer_is_refused(tmp_path):
    model = mace(40)
    buffer = model.replay_buffer
    save_to_pkl(tmp_path / "other", ReplayBuffer(4, Slide.observation_space, Slide.action_space, "cpu"))
    with pytest.raises(ValueError, match="MACE needs a PairReplayBuffer"):
        model.load_replay_buffer(tmp_path / "other")
    assert model.replay_buffer is buffer


@pytest.mark.parametrize("change", ["copy", "fresh", "freeze", "freeze all"])
def test_grown_models_go_on_after_loading_as_without(tmp_path, change):
    def start() -> MACE:
        model = mace(40, seed=4)
        if change == "freeze":
            model.freeze_pairs([0])
        elif change == "freeze all":
            model.freeze_pairs()
        model.add_pair("copy", source=1) if change == "copy" else model.add_pair("fresh", bias=[0.5])
        return model.learn(15, reset_num_timesteps=False)

    whole = start().learn(25, reset_num_timesteps=False)
    part = start()
    part.save(tmp_path / "model")
    part.save_replay_buffer(tmp_path / "buffer")
    loaded = MACE.load(tmp_path / "model", part.get_env(), device="cpu", force_reset=False)
    assert_equal(loaded, part)
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.learn(25, reset_num_timesteps=False)
    assert_equal(loaded, whole)


class Growing(BaseCallback):
    """Adds one pair at a given place of SB3's loop."""

    def __init__(self, place: str):
        super().__init__()
        self.place = place
        self.added: list[int] = []

    def _act(self, place: str) -> None:
        if place == self.place and self.num_timesteps > 30 and not self.added:
            self.added.append(self.model.add_pair())

    def _on_rollout_start(self) -> None:
        self._act("start")

    def _on_step(self) -> bool:
        self._act("step")
        return True


def test_growth_at_a_rollout_s_start():
    callback = Growing("start")
    model = mace()
    model.learn(80, callback=callback)
    assert callback.added == [3]
    assert model.policy.net.pool.num_experts == 4


def test_growth_in_the_middle_of_a_rollout_is_refused():
    model = mace()
    with pytest.raises(RuntimeError, match="add_pair in the middle of a rollout"):
        model.learn(80, callback=Growing("step"))
    assert model.policy.net.pool.num_experts == 3
    model.add_pair()  # the rollout is over


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "zero"}, "'fresh' or 'copy'"),
        ({"init": "copy", "bias": [0.0]}, "are for init='fresh'"),
        ({"init": "fresh", "source": 1}, "has no source"),
        ({"init": "copy", "source": 9}, "no experts with ids"),
        ({"init": "fresh", "bias": [3.0]}, "a bias is an action of"),
    ],
)
def test_bad_growth_is_refused_and_changes_nothing(arguments, message):
    model = mace()
    with pytest.raises(ValueError, match=message):
        model.add_pair(**arguments)
    assert model.policy.net.pool.ids == model.policy.target.pool.ids == (0, 1, 2)


# -- the replay memory -----------------------------------------------------------------------------------


def filled(steps: int, size: int, noisy) -> PairReplayBuffer:
    buffer = PairReplayBuffer(size, Slide.observation_space, Slide.action_space, "cpu")
    for step in range(steps):
        infos = [{PAIR: step % 3, NOISY: noisy(step)}]
        obs = np.full((1, 2), step, dtype=np.float32)
        buffer.add(obs, obs, np.zeros((1, 1)), np.array([float(step)]), np.array([False]), infos)
    return buffer


def test_overwritten_transitions_leave_their_buffer():
    buffer = filled(4, 4, noisy=lambda step: step % 2 == 0)
    buffer.pending = [0, 2]
    assert [place for place in range(4) if place in buffer.actor] == [0, 2]
    buffer.add(
        np.zeros((1, 2)), np.zeros((1, 2)), np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{PAIR: 0, NOISY: False}]
    )
    # place 0 was noisy and is overwritten by one that is not
    assert [place for place in range(4) if place in buffer.actor] == [2]
    assert [place for place in range(4) if place in buffer.critic] == [0, 1, 3]
    assert buffer.pending == [2]


def test_draws_come_from_their_own_buffer():
    buffer = filled(30, 40, noisy=lambda step: step % 3 == 0)
    rng = np.random.default_rng(0)
    assert buffer.draw_critic(21, rng) is None  # 20 of 30
    critic = buffer.draw_critic(20, rng)
    assert critic is not None
    assert (critic % 3 != 0).all()
    buffer.pending = [0, 3]
    actor = buffer.draw_actor(100, rng)
    assert set(actor.tolist()) <= set(range(6, 30, 3))
    assert len(set(actor.tolist())) == len(actor)
    assert buffer.at(np.array([7])).rewards.tolist() == [7.0]
    assert buffer.at(np.array([7])).pairs.tolist() == [1]


def test_memory_saving_mode_is_refused():
    with pytest.raises(ValueError, match="optimize_memory_usage"):
        PairReplayBuffer(4, Slide.observation_space, Slide.action_space, "cpu", optimize_memory_usage=True)
