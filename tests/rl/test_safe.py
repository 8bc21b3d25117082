"""Loading without pickled code: equal to going on, and everything else refused."""

import io
import os
import pickle
import struct
import zipfile

import gymnasium as gym
import pytest
import torch
from stable_baselines3 import PPO

from modmoe import CheckpointError
from modmoe.rl import MACE, freeze, grow, load_safely, save_safely

EVERY = ["ppo", "ppo_discrete", "a2c", "sac", "td3", "dqn"]


@pytest.mark.parametrize("name", EVERY)
def test_a_grown_model_goes_on_as_if_never_saved(make, tmp_path, name):
    model = make(name).learn(40)
    grow(model)
    freeze(model, [0])
    model.learn(40)
    save_safely(model, tmp_path / "model.safetensors")
    loaded = make(name, model.get_env(), seed=9)
    load_safely(tmp_path / "model.safetensors", loaded)
    assert loaded.num_timesteps == model.num_timesteps
    assert loaded.policy_kwargs["num_experts"] == 3
    if hasattr(model, "replay_buffer"):
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    for one in (model, loaded):
        one.set_random_seed(5)
        one.learn(64)
    first, second = model.policy.state_dict(), loaded.policy.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def make_mace(env=None, seed: int = 0) -> MACE:
    settings = {"learning_starts": 10, "buffer_size": 300, "batch_size": 8, "train_freq": 2, "anneal_updates": 20}
    kwargs = {"num_pairs": 2, "trunk": [8], "critic_hidden": 8, "actor_hidden": 4}
    return MACE("MlpPolicy", env or gym.make("Pendulum-v1"), seed=seed, device="cpu", policy_kwargs=kwargs, **settings)


def test_a_grown_mace_goes_on_as_if_never_saved(tmp_path):
    model = make_mace().learn(40)
    model.add_pair("copy")
    model.freeze_pairs([0])
    model.learn(40, reset_num_timesteps=False)
    save_safely(model, tmp_path / "model.safetensors")
    loaded = make_mace(model.get_env(), seed=9)
    load_safely(tmp_path / "model.safetensors", loaded)
    assert loaded.policy.net.pool.ids == (0, 1, 2)
    assert loaded.policy.net.pool.frozen_ids == (0,)
    assert (loaded.num_timesteps, loaded._n_updates) == (80, model._n_updates)
    assert loaded.rng.random() == model.rng.random()
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    for one in (model, loaded):
        one.set_random_seed(5)
        one.learn(40)
    first, second = model.policy.state_dict(), loaded.policy.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_mace_is_grown_by_its_own_methods():
    for change in (grow, freeze):
        with pytest.raises(ValueError, match="use its add_pair, freeze_pairs"):
            change(make_mace())


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def plant(kind: str, path, mark) -> None:
    bomb = pickle.dumps(Planted(mark))
    if kind == "pickle":
        path.write_bytes(bomb)
    elif kind == "torch":
        torch.save({"policy": Planted(mark)}, path)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data", bomb)
            buffer = io.BytesIO()
            torch.save(Planted(mark), buffer)
            archive.writestr("policy.pth", buffer.getvalue())


@pytest.mark.parametrize("kind", ["pickle", "torch", "zip"])
def test_a_planted_pickle_is_refused_and_never_run(make, tmp_path, kind):
    path, mark = tmp_path / "model.zip", tmp_path / "was_here"
    plant(kind, path, mark)
    model = make("ppo")
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    with pytest.raises(CheckpointError, match="pickle"):
        load_safely(path, model)
    assert not mark.exists()
    assert all(torch.equal(value, before[name]) for name, value in model.policy.state_dict().items())
    if kind == "pickle":  # it does go off, so the test can fail
        pickle.loads(path.read_bytes())
        assert mark.exists()


def test_a_zip_of_sb3_is_refused_with_the_way_out(make, envs, tmp_path):
    PPO("MlpPolicy", envs(), device="cpu").save(tmp_path / "plain.zip")
    make("ppo").save(tmp_path / "mixture.zip")
    for name in ("plain", "mixture"):
        with pytest.raises(CheckpointError, match=r"as Stable-Baselines3's save\(\).*model.set_parameters\(\)"):
            load_safely(tmp_path / f"{name}.zip", make("ppo"))


def test_other_files_are_refused(make, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_safely(path, make("ppo"))
    save_safely(make("ppo"), path)
    with pytest.raises(CheckpointError, match="holds PPO with MoEActorCriticPolicy, the model is A2C"):
        load_safely(path, make("a2c"))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_safely(path, make("ppo", hidden_features=9))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="not a complete modmoe checkpoint"):
        load_safely(path, make("ppo"))


def test_a_plain_model_is_refused(envs, tmp_path):
    plain = PPO("MlpPolicy", envs(), device="cpu")
    with pytest.raises(ValueError, match="has no experts"):
        save_safely(plain, tmp_path / "model.safetensors")


@pytest.mark.parametrize("length", [0x280, 0x04034B50])
def test_a_length_that_looks_like_a_pickle_or_a_zip_is_none(make, tmp_path, length):
    # the file begins with the length of its header: 80 02 00 ..., or the letters PK 03 04
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{")
    with pytest.raises(CheckpointError, match="not a complete modmoe checkpoint"):
        load_safely(path, make("ppo"))
