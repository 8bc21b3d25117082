"""The settings of a run on LeapTerrain, and the learner that each method is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from modmoe.rl import MACE, MoEActorCriticPolicy
from modmoe.rl.growth import set_action_bias

if TYPE_CHECKING:
    from stable_baselines3 import PPO
    from stable_baselines3.common.base_class import BaseAlgorithm

Method = Literal["mace_k3", "mace_k1", "mace_k3_no_bias", "mace_k3_frozen_actors", "ppo", "mace_ppo"]
METHODS: list[Method] = ["mace_k3", "mace_k1", "mace_k3_no_bias", "mace_k3_frozen_actors", "ppo", "mace_ppo"]
SINGLE = ("mace_k1", "ppo")  # one actor: it starts at the bias that serves it best

ENV = "modmoe_envs:modmoe/LeapTerrain-v0"
NUM_ENVS, ROLLOUT = 8, 400  # of PPO: environments side by side, leaps between updates

# Hidden units, such that all methods have as many parameters within 3%.
SHARED, CRITICS = 64, 64  # of MACE, whatever its number of pairs
ACTOR, SINGLE_ACTOR = 16, 50  # of each of three actors, of the only one
PPO_LAYER, PAIR_LAYER = 53, 24  # of both layers of an actor and of a critic: of PPO, of each of three pairs


@dataclass
class MaceSettings:
    """What can be set.

    Args:
        leaps: steps of the environment that each method learns from; whole rollouts of PPO, of 400.
        methods: which run.
        courses: fresh ones of 50 m for the test, and others for the choice of a bias.
        biases: initial actions of the pairs, (a_0, a_1) in [-1, 1]; three, for equal parameters.
        candidates: initial actions to choose from for a method with one actor.
        choice_runs: trainings with each candidate, with seeds of their own.
        learning_starts: MACE's leaps before its first update.
    """

    leaps: int = 16_000
    methods: list[Method] = field(default_factory=lambda: list(METHODS))
    courses: int = 50
    biases: list[list[float]] = field(default_factory=lambda: [[-0.5, -0.5], [0.1, 0.0], [0.4, 0.3]])
    candidates: list[list[float]] = field(default_factory=lambda: [[-0.5, -0.5], [0.1, 0.0], [0.4, 0.3], [0.7, 0.7]])
    choice_runs: int = 2
    learning_starts: int = 500

    def __post_init__(self) -> None:
        if self.leaps < 1 or self.leaps % ROLLOUT:
            raise ValueError(f"leaps is a multiple of PPO's rollout of {ROLLOUT}, got {self.leaps}")
        if self.num_anneal_updates < 1:
            raise ValueError(f"learning_starts must leave updates in {self.leaps} leaps, got {self.learning_starts}")
        if not (self.methods and self.biases and self.candidates) or min(self.courses, self.choice_runs) < 1:
            raise ValueError("methods, biases, candidates, courses and choice_runs need one at least")

    @property
    def num_anneal_updates(self) -> int:
        """MACE's exploration fades over 60% of the leaps; an update comes every other leap."""
        return int((0.6 * self.leaps - self.learning_starts) / 2)


def make_learner(settings: MaceSettings, method: Method, seed: int, bias: Sequence[float] | None) -> "BaseAlgorithm":
    """An untrained learner.

    Args:
        settings: of the run.
        method: which one.
        seed: of its weights, its exploration and its courses.
        bias: where the only actor of a method starts.
    """
    if method == "ppo":
        assert bias is not None
        return make_ppo(seed, bias)
    if method == "mace_ppo":
        return make_mace_ppo(settings, seed)
    return make_mace(settings, method, seed, bias)


def make_mace(settings: MaceSettings, method: Method, seed: int, bias: Sequence[float] | None) -> MACE:
    """MACE with three pairs, or with one as large as three."""
    import gymnasium as gym

    single = method == "mace_k1"
    biases = {"mace_k1": [bias], "mace_k3_no_bias": None}.get(method, settings.biases)
    return MACE(
        "MlpPolicy",
        gym.make(ENV),
        learning_rate=1e-3,
        buffer_size=settings.leaps,
        learning_starts=settings.learning_starts,
        batch_size=128,
        gamma=0.9,
        train_freq=2,
        target_update_interval=250,
        anneal_updates=settings.num_anneal_updates,
        temperature=(20.0, 0.025),
        temperature_decay="geometric",
        noise_probability=(0.9, 0.2),
        base_action_probability=(0.0, 0.0),
        noise_std=0.35,
        critic_weight=8.0,
        update_actors=method != "mace_k3_frozen_actors",
        policy_kwargs={
            "num_pairs": 1 if single else len(settings.biases),
            "biases": biases,
            "trunk": [SHARED],
            "critic_hidden": CRITICS,
            "actor_hidden": SINGLE_ACTOR if single else ACTOR,
        },
        device="cpu",
        seed=seed,
    )


def make_ppo(seed: int, bias: Sequence[float]) -> "PPO":
    """SB3's PPO with its plain policy, whose actor starts at a bias."""
    model = _ppo("MlpPolicy", seed, {"net_arch": [PPO_LAYER, PPO_LAYER], "activation_fn": nn.Tanh})
    actor = model.policy.action_net
    assert isinstance(actor, nn.Linear)
    with torch.no_grad():
        actor.bias.copy_(torch.tensor(bias))
    return model


def make_mace_ppo(settings: MaceSettings, seed: int) -> "PPO":
    """PPO over pairs with biases of their own, mixed by a softmax gate."""
    layers = [PAIR_LAYER, PAIR_LAYER]
    mixture = {"num_experts": len(settings.biases), "router": "dense", "hidden_features": layers}
    model = _ppo(MoEActorCriticPolicy, seed, mixture)
    assert isinstance(model.policy, MoEActorCriticPolicy)
    network = model.policy.moe
    set_action_bias(network, network.pool.ids, torch.tensor(settings.biases))
    return model


def _ppo(policy: Any, seed: int, policy_kwargs: dict[str, Any]) -> "PPO":
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    seed *= NUM_ENVS  # SB3 gives seed + i to environment i: two seeds of a study shall share no course
    return PPO(
        policy,
        make_vec_env(ENV, NUM_ENVS, seed=seed),
        learning_rate=1.5e-3,
        n_steps=ROLLOUT // NUM_ENVS,
        batch_size=100,
        n_epochs=10,
        gamma=0.9,
        policy_kwargs={"log_std_init": -0.7, **policy_kwargs},
        device="cpu",
        seed=seed,
    )
