"""MACE: its equations by hand, what an update touches, determinism, saving, and a task with a known optimum."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from modmoe.rl.mace import MACE
from modmoe.rl.mace_network import TerrainFeatures
from modmoe.rl.mace_policy import MACEPolicy
from modmoe.rl.mace_rules import anneal, boltzmann_probabilities, critic_target, improves

SMALL_NET = {"trunk": (16,), "critic_hidden": 16, "actor_hidden": 8}


class Sides(gym.Env):
    """One step an episode: the right action is sign(s) * .6 times 2, reward 1 - distance; the optimum is 1.

    The action space is [-2, 2], so that scaling matters.
    """

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.side = float(self.np_random.choice([-1, 1]))
        return self._observe(), {}

    def _observe(self):
        return np.array([self.side, self.np_random.uniform(-1, 1)], dtype=np.float32)

    def step(self, action):
        assert self.action_space.contains(action)
        reward = 1 - abs(float(action[0]) - 1.2 * self.side)
        return self._observe(), reward, True, False, {}


def mace(env=None, seed=0, **options) -> MACE:
    settings = {
        "learning_starts": 20,
        "batch_size": 8,
        "buffer_size": 1000,
        "train_freq": 1,
        "anneal_updates": 100,
        "target_update_interval": 10,
        "noise_probability": (0.6, 0.2),
        "base_action_probability": (0.2, 0.002),
        "device": "cpu",
    }
    policy_kwargs = {"num_pairs": 3, "biases": [[-0.6], [0.2]], **SMALL_NET, **options.pop("policy_kwargs", {})}
    return MACE("MlpPolicy", env or Sides(), seed=seed, policy_kwargs=policy_kwargs, **{**settings, **options})


def parameters(model: MACE) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


def assert_equal(model: MACE, other: MACE) -> None:
    first, second = parameters(model), parameters(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- equations by hand -----------------------------------------------------------------------------------


def test_critic_target():
    rewards, dones = torch.tensor([2.0, 2.0]), torch.tensor([0.0, 1.0])
    next_values = torch.tensor([[1.0, 3.0, -1.0], [1.0, 3.0, -1.0]])
    # (1 - .9) * 2 + .9 * max(1, 3, -1) = .2 + 2.7; after a fall .2
    target = critic_target(rewards, dones, next_values, gamma=0.9)
    torch.testing.assert_close(target, torch.tensor([2.9, 0.2]))


def test_cacla_condition():
    values = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    # 1.5 beats critic 0 but not the highest one; a tie is no improvement
    assert improves(torch.tensor([2.5, 1.5, 2.0]), values).tolist() == [True, False, False]


def test_boltzmann_probabilities():
    values = torch.tensor([[0.0, np.log(2.0), np.log(3.0)]])
    values = values.float()
    torch.testing.assert_close(boltzmann_probabilities(values, 1.0), torch.tensor([[1.0, 2.0, 3.0]]) / 6)
    # at temperature 1/2 the weights are squared: 1, 4, 9
    torch.testing.assert_close(boltzmann_probabilities(values, 0.5), torch.tensor([[1.0, 4.0, 9.0]]) / 14)


def test_anneal():
    assert anneal((20.0, 10.0), 0.5) == 15.0
    assert anneal((20.0, 5.0), 0.5, "geometric") == pytest.approx(10.0)  # 20 * (1/4)^(1/2)
    assert anneal((0.9, 0.2), 1.0) == pytest.approx(0.2)


def test_pairs_are_chosen_with_boltzmann_probabilities():
    model = mace(noise_probability=(0.0, 0.0), base_action_probability=(0.0, 0.0), temperature=(1.0, 1.0))
    with torch.no_grad():
        for pair, value in zip((0, 1, 2), (0.0, np.log(2.0), np.log(3.0)), strict=True):
            model.policy.net.start_pair(pair, value, None)
        model.policy.net.pool.growable("critic", "weight").live()[0][0].zero_()
    model._last_obs = np.zeros((6000, 2), dtype=np.float32)
    model._sample_action(0, n_envs=6000)
    share = np.bincount(model._choice[0]) / 6000
    assert share == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=0.03)  # 4 standard deviations are .026


def test_actors_start_at_their_controllers():
    model = mace()
    _, actions = model.policy.net(torch.zeros(1, 2))
    # biases -.6, .2 of [-2, 2] are -.3, .1 scaled; actor 2 takes number 2 mod 2 = 0
    assert actions.flatten().tolist() == pytest.approx([-0.3, 0.1, -0.3], abs=0.1)
    assert model.policy.net.pool.namespace("controller")["action"].flatten().tolist() == pytest.approx(
        [-0.3, 0.1, -0.3]
    )


def test_without_biases_actors_start_in_the_middle():
    model = mace(policy_kwargs={"biases": None})
    assert model.policy.net.pool.namespace("expert")["b_out"].abs().max() == 0


# -- exploration and routing to buffers ------------------------------------------------------------------


def collect(steps=60, n_envs=1, **options) -> MACE:
    env = make_vec_env(Sides, n_envs=n_envs, seed=1)
    model = mace(env, learning_starts=10**6, **options)
    model.learn(steps * n_envs)
    return model


@pytest.mark.parametrize("n_envs", [1, 3])
def test_noisy_actions_go_to_the_actor_buffer(n_envs):
    model = collect(n_envs=n_envs, noise_probability=(0.5, 0.5), base_action_probability=(0.0, 0.0))
    buffer = model.replay_buffer
    assert len(buffer.critic) + len(buffer.actor) == 60 * n_envs
    stored = buffer.at(np.arange(60 * n_envs))
    with torch.no_grad():
        own = model.policy.net.actions_of(stored.observations, stored.pairs).clamp(-1, 1)
    exact = (own - stored.actions).abs().flatten() < 1e-6
    for place in range(60 * n_envs):
        assert (place in buffer.critic) == bool(exact[place])
        assert (place in buffer.actor) == (not exact[place])


def test_choices_other_than_argmax_go_to_the_critic_buffer():
    model = collect(noise_probability=(0.0, 0.0), base_action_probability=(0.0, 0.0))
    stored = model.replay_buffer.at(np.arange(60))
    with torch.no_grad():
        best = model.policy.net.values(stored.observations).argmax(1)
    assert (best != stored.pairs).sum() > 10  # at temperature 20 two choices in three
    assert len(model.replay_buffer.critic) == 60
    assert len(model.replay_buffer.actor) == 0


def test_base_actions_are_the_pair_s_controller_and_teach_actors():
    model = collect(base_action_probability=(1.0, 1.0))
    stored = model.replay_buffer.at(np.arange(60))
    assert set(stored.pairs.tolist()) == {0, 1, 2}
    expected = torch.tensor([-0.3, 0.1, -0.3])[stored.pairs]
    torch.testing.assert_close(stored.actions.flatten(), expected)
    assert len(model.replay_buffer.actor) == 60


def test_base_actions_without_controllers_are_uniform():
    model = collect(base_action_probability=(1.0, 1.0), policy_kwargs={"biases": None})
    actions = model.replay_buffer.at(np.arange(60)).actions
    assert actions.min() < -0.8
    assert actions.max() > 0.8


def test_exploration_fades_with_updates():
    model = mace(anneal_updates=20, temperature=(20.0, 0.5), noise_probability=(0.6, 0.0))
    model.learn(100)
    assert model._n_updates > 20
    assert float(model.policy.temperature) == 0.5
    newest = len(model.replay_buffer.critic)
    model.learn(50, reset_num_timesteps=False)
    base_actions = 50 - (len(model.replay_buffer.critic) - newest)
    assert base_actions <= 3  # .002 of 50; noise is at 0


# -- updates ---------------------------------------------------------------------------------------------


def test_an_update_changes_the_chosen_heads_only():
    model = mace(update_actors=True, batch_size=4, policy_kwargs={"shared_critic": False, "trunk": ()})
    model.learn(1)
    batch = model.replay_buffer.at(np.zeros(4, dtype=np.int64))
    batch = batch._replace(pairs=torch.tensor([1, 1, 1, 1]))
    before = {pair: model.policy.net.pool.expert_state(pair) for pair in (0, 1, 2)}
    loss = model._critic_loss(batch, torch.ones(4))
    loss.backward()
    model.policy.optimizer.step()
    after = {pair: model.policy.net.pool.expert_state(pair) for pair in (0, 1, 2)}
    for pair in (0, 2):
        assert all(torch.equal(before[pair][name], after[pair][name]) for name in before[pair])
    changed = {name for name in before[1] if not torch.equal(before[1][name], after[1][name])}
    assert changed >= {"critic.weight", "critic.bias"}
    assert all(name.startswith("critic.") for name in changed)  # and no actor


def test_actor_regresses_the_chosen_actor_to_the_executed_action():
    model = mace(policy_kwargs={"trunk": ()})
    model.learn(1)
    batch = model.replay_buffer.at(np.zeros(2, dtype=np.int64))._replace(pairs=torch.tensor([1, 1]))
    with torch.no_grad():
        distance = model.policy.net.actions_of(batch.observations, batch.pairs) - batch.actions
    loss = model._actor_loss(batch)
    assert loss.item() == pytest.approx((distance[0] ** 2).sum().item())
    loss.backward()
    grad = model.policy.net.pool.growable("expert", "b_out").live()[0][0].grad
    assert grad is not None
    torch.testing.assert_close(grad[1], 2 * distance[0])  # d/da (a - executed)^2
    assert grad[[0, 2]].abs().max() == 0
    assert model.policy.net.critic_branch[0].weight.grad is None  # CACLA teaches no critic


@pytest.mark.parametrize(("value", "expected"), [(-100.0, [True] * 8), (100.0, [False] * 8)])
def test_actors_learn_from_what_was_better_than_expected(value, expected):
    model = mace(gamma=0.5)
    model.learn(8)
    for pair in (0, 1, 2):
        model.policy.target.start_pair(pair, value, None)
    places = np.arange(8)
    batch, y, better = model._look_ahead(places, places)
    # each of these episodes ends by a fall: y = r / 2, far from what the target network expects
    torch.testing.assert_close(y, batch.rewards / 2)
    assert better.tolist() == expected


def test_actor_updates_off_leaves_actors_where_they_are():
    model = mace(update_actors=False, policy_kwargs={"trunk": ()})
    before = model.policy.net.pool.namespace("expert")["w_in"].clone()
    model.learn(50)
    assert model._n_updates > 0
    assert model.num_actor_updates == 0
    assert torch.equal(before, model.policy.net.pool.namespace("expert")["w_in"])


def test_target_is_copied_on_schedule():
    model = mace(target_update_interval=10, noise_probability=(0.2, 0.2), base_action_probability=(0.0, 0.0))
    model.learn(40)
    model.train(10 - model._n_updates % 10, 8)  # just copied
    obs = torch.zeros(1, 2)
    copied = model.policy.target.values(obs).clone()
    torch.testing.assert_close(copied, model.policy.net.values(obs), rtol=0, atol=0)
    model.train(9, 8)
    assert torch.equal(model.policy.target.values(obs), copied)
    assert not torch.equal(model.policy.net.values(obs), copied)
    model.train(1, 8)
    assert torch.equal(model.policy.target.values(obs), model.policy.net.values(obs))


# -- runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 4])
def test_equal_seeds_give_equal_runs(n_envs):
    models = [mace(make_vec_env(Sides, n_envs=n_envs), seed=3).learn(100) for _ in range(2)]
    assert models[0]._n_updates > 0
    assert_equal(*models)


def test_another_seed_gives_another_run():
    first, second = (mace(seed=seed).learn(60) for seed in (3, 4))
    assert any(not torch.equal(a, parameters(second)[name]) for name, a in parameters(first).items())


def test_one_environment_is_the_vector_of_one():
    assert_equal(mace(Sides(), seed=3).learn(60), mace(DummyVecEnv([Sides]), seed=3).learn(60))


@pytest.mark.parametrize("n_envs", [1, 2])
def test_saved_and_loaded_runs_go_on_as_uninterrupted_ones(tmp_path, n_envs):
    whole = mace(make_vec_env(Sides, n_envs=n_envs), seed=5)
    whole.learn(50)
    whole.learn(50, reset_num_timesteps=False)

    env = make_vec_env(Sides, n_envs=n_envs)
    part = mace(env, seed=5).learn(50)
    part.save(tmp_path / "model")
    part.save_replay_buffer(tmp_path / "buffer")
    del part
    np.random.seed(99)
    torch.manual_seed(99)  # global generators play no part
    loaded = MACE.load(tmp_path / "model", env, device="cpu", force_reset=False)
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.learn(50, reset_num_timesteps=False)
    assert loaded._n_updates == whole._n_updates
    assert_equal(loaded, whole)


def test_loaded_model_predicts_the_same(tmp_path):
    model = mace().learn(100)
    model.save(tmp_path / "model")
    obs = np.linspace(-1, 1, 20, dtype=np.float32).reshape(10, 2)
    expected, _ = model.predict(obs, deterministic=True)
    got, _ = MACE.load(tmp_path / "model", device="cpu").predict(obs, deterministic=True)
    assert np.array_equal(expected, got)
    model.policy.save(str(tmp_path / "policy"))
    assert np.array_equal(
        MACEPolicy.load(str(tmp_path / "policy"), "cpu").predict(obs, deterministic=True)[0], expected
    )


def test_predict_exploits_by_argmax_and_stays_in_the_action_space():
    model = mace(policy_kwargs={"biases": [[-2.0], [2.0]]})
    model.policy.net.start_pair(1, 5.0, None)
    obs = np.random.default_rng(0).uniform(-1, 1, (50, 2)).astype(np.float32)
    greedy, _ = model.predict(obs, deterministic=True)
    assert greedy.min() > 1.5
    assert greedy.max() <= 2.0
    model.policy.temperature.fill_(1000.0)
    torch.manual_seed(0)
    sampled, _ = model.predict(obs)
    assert sampled.min() < -1.5
    assert model.predict(obs[0])[0].shape == (1,)


class Clock(gym.Wrapper):
    """Cuts episodes by time, without a fall."""

    def step(self, action):
        obs, reward, _, _, info = self.env.step(action)
        return obs, reward, False, True, info


def test_observations_and_rewards_are_normalised_when_they_are_sampled():
    env = VecNormalize(DummyVecEnv([Sides]), gamma=0.5)
    model = mace(env, gamma=0.5).learn(60)
    assert model._n_updates > 0
    raw, normalised = (model.replay_buffer.at(np.arange(5), vec) for vec in (None, env))
    torch.testing.assert_close(normalised.observations, torch.from_numpy(env.normalize_obs(raw.observations.numpy())))
    torch.testing.assert_close(normalised.rewards, torch.from_numpy(env.normalize_reward(raw.rewards.numpy())))
    assert not torch.allclose(normalised.observations, raw.observations)


def test_a_time_limit_is_no_fall():
    model = mace(Clock(Sides()), learning_starts=10**6)
    model.learn(10)
    assert model.replay_buffer.dones[:10].sum() == 10
    assert model.replay_buffer.at(np.arange(10)).dones.sum() == 0


def test_terrain_features():
    features = TerrainFeatures(spaces.Box(-1, 1, (43,), np.float32), num_heights=40)
    # 40 heights: 40 - 7 - 3 - 3 = 27 places of 32 filters into 64; 3 numbers of the body pass through
    assert features.terrain[-2].in_features == 27 * 32
    assert features.features_dim == 67
    x = torch.randn(5, 43)
    assert torch.equal(features(x)[:, 64:], x[:, 40:])


def test_learns_two_sides():
    """Two controllers far from the optimum, one pair for each side: actors must move from .3 to 1.2."""
    model = mace(
        make_vec_env(Sides, n_envs=8, seed=7),
        seed=7,
        learning_rate=5e-3,
        batch_size=32,
        learning_starts=100,
        gradient_steps=2,
        anneal_updates=250,
        gamma=0.0,
        noise_std=0.4,
        temperature_decay="geometric",
        policy_kwargs={"num_pairs": 2, "biases": [[-0.3], [0.3]], "trunk": (32,), "actor_hidden": 16},
    )
    model.learn(1000)
    sides = np.array([[side, x] for side in (-1, 1) for x in (-0.5, 0.0, 0.5)], dtype=np.float32)
    actions, _ = model.predict(sides, deterministic=True)
    error = np.abs(actions[:, 0] - 1.2 * sides[:, 0]).mean()
    assert error < 0.25  # it starts at .9; four seeds gave .03 to .08


# -- refusals --------------------------------------------------------------------------------------------


class Discrete(gym.Env):
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(3)


class DictEnv(gym.Env):
    observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float32)})
    action_space = spaces.Box(-1, 1, (1,), np.float32)


def test_other_action_spaces_are_refused():
    with pytest.raises(ValueError, match=r"a Box is needed, got Discrete\(3\)"):
        MACE("MlpPolicy", Discrete())
    with pytest.raises(ValueError, match="a Box action space is needed"):
        MACEPolicy(Discrete.observation_space, Discrete.action_space, lambda _: 1e-3)


def test_dict_observations_are_refused():
    with pytest.raises(ValueError, match="no dict observations"):
        MACE(MACEPolicy, DictEnv())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature_decay": "cosine"}, "'linear' or 'geometric'"),
        ({"temperature": (20.0, 0.0)}, "temperatures are above 0"),
        ({"target_update_interval": 0}, "at least 1"),
        ({"noise_probability": (0.9, 1.5)}, r"in \[0, 1\]"),
        ({"policy_kwargs": {"biases": [[3.0]]}}, "a bias is an action of"),
        ({"policy_kwargs": {"biases": [[0.0, 0.0]]}}, "a bias is an action of"),
        ({"policy_kwargs": {"biases": []}}, "biases is empty"),
        ({"policy_kwargs": {"num_pairs": 0}}, "at least 1"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mace(**options)
