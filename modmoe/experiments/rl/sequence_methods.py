"""What learns the tasks in sequence: pools that grow, and MLPs with what is done to them between tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from modmoe.experiments.rl.sequence_settings import SequenceSettings
from modmoe.gating import GaussianRouter
from modmoe.rl import MoEActorCriticPolicy, freeze, grow

SEED_STRIDE = 1000  # between the networks of one run that are drawn anew


class Learner(Protocol):
    """One learner through the whole sequence.

    Attributes:
        model: what acts now.
    """

    model: PPO

    def begin(self, task: int) -> None:
        """Get ready for a task; its environment is already the one that is trained on."""


class Pool:
    """An expert for each task, an actor with its critic; those of earlier tasks are frozen.

    Nothing that is trained is shared: no trunk, no extractor with weights, no normalisation.

    Args:
        settings: see there.
        env: to train on.
        seed: of the first weights and the actions.
        oracle: whether the observation tells the expert; else a density of each expert decides, which is fitted to
            starts of its task before it is trained. A density's score is the same whatever experts come later.
    """

    def __init__(self, settings: SequenceSettings, env: VecEnv, seed: int, oracle: bool):
        self.oracle, self.env, self.gate_samples = oracle, env, settings.gate_samples
        num_inputs = size_of(env)[0]
        options: dict[str, Any] = {
            "num_experts": 1,
            "router": "gaussian",
            "router_kwargs": {"per_class": False},
            "hidden_features": settings.hidden_features,
            "task": 0,
        }
        if oracle:
            # "newest" is for the evaluation of tasks that are still to come
            context = (num_inputs - settings.num_tasks, num_inputs)
            options |= {"context": context, "task_of": "one_hot", "unseen_task": "newest"}
        self.model = make_ppo(MoEActorCriticPolicy, options, settings, env, seed)

    def begin(self, task: int) -> None:
        if task:
            freeze(self.model)
            grow(self.model, task=task)
        if self.oracle:
            return
        network = moe_policy(self.model).moe
        router = network.layer.router
        assert isinstance(router, GaussianRouter)
        starts = [np.asarray(self.env.reset()) for _ in range(-(-self.gate_samples // self.env.num_envs))]
        x = torch.as_tensor(np.concatenate(starts)[: self.gate_samples])
        router.observe(network.pool, network.layer.namespace, network.pool.ids[-1], x)


class MLP:
    """Stable-Baselines3's MLP for all tasks.

    Args:
        settings: see there.
        env: to train on.
        seed: as of Pool.
        parameters: how many it has, as close as one width of all hidden layers comes to it.
        anew: what is drawn anew when a later task begins: nothing, the output heads with the log standard deviations,
            or all of it.
    Attributes:
        width: of the hidden layers.
    Raises:
        ValueError: if no number of parameters is given.
    """

    def __init__(self, settings: SequenceSettings, env: VecEnv, seed: int, parameters: int | None, anew: str):
        self.anew = anew
        if parameters is None:
            raise ValueError("an MLP is made as large as a pool: run the pool first, and say its number of parameters")
        depth = len(settings.hidden_features)
        self.width = width_for(parameters, depth, *size_of(env))
        self.make = partial(make_ppo, "MlpPolicy", {"net_arch": [self.width] * depth}, settings, env)
        self.seed = seed
        self.model = self.make(seed)

    def begin(self, task: int) -> None:
        if task and self.anew == "all":
            self.model = self.make(self.seed + SEED_STRIDE * task)
        elif task and self.anew == "heads":
            draw_heads_anew(self.model)


Make = Callable[[SequenceSettings, VecEnv, int, int | None], Learner]


@dataclass
class Method:
    """One row of the results.

    Args:
        about: one sentence for the report.
        make: (settings, environment, seed, parameters of an MLP) -> learner.
        context: what the observations tell of the task: "visible" or "hidden".
    """

    about: str
    make: Make
    context: str = "visible"


def pool(oracle: bool) -> Make:
    return lambda settings, env, seed, parameters: Pool(settings, env, seed, oracle)


def mlp(anew: str) -> Make:
    return lambda settings, env, seed, parameters: MLP(settings, env, seed, parameters, anew)


METHODS: dict[str, Method] = {
    "pool_oracle": Method(
        "an expert for each task, earlier ones frozen; the context in the observation says whose turn it is",
        pool(oracle=True),
    ),
    "pool_learned": Method(
        "the same pool, in which each expert's density of its task's first observations decides, in training as in "
        "evaluation; only the beginning of a new task is told",
        pool(oracle=False),
    ),
    "pool_hidden": Method("'pool_learned' where no observation tells the context", pool(oracle=False), "hidden"),
    "mlp_sequential": Method(
        "one MLP as large as the whole pool; its output heads, log standard deviations and Adam's moments begin anew "
        "with each task: the fair baseline",
        mlp("heads"),
    ),
    "mlp_sequential_no_reset": Method("the same MLP, of which nothing begins anew", mlp("nothing")),
    "mlp_reset": Method("an MLP of this size drawn anew for each task, and evaluated in all of them", mlp("all")),
}
"""In the order of the results; ``pool_oracle`` is first, since its size decides the MLPs'."""


def make_ppo(
    policy: str | type[ActorCriticPolicy], options: dict[str, Any], settings: SequenceSettings, env: VecEnv, seed: int
) -> PPO:
    """PPO, alike for every method but for the policy and its options."""
    return PPO(
        policy,
        env,
        learning_rate=settings.learning_rate_at,
        n_steps=settings.rollout,
        batch_size=settings.batch_size,
        n_epochs=settings.epochs,
        gamma=settings.discount,
        policy_kwargs=options,
        seed=seed,
        device="cpu",
    )


@torch.no_grad()
def draw_heads_anew(model: PPO) -> None:
    """Draw an MLP's output heads as Stable-Baselines3 draws them, reset its log standard deviations, forget Adam's
    moments; the hidden layers stay."""
    policy = model.policy
    for head, gain in ((policy.action_net, 0.01), (policy.value_net, 1.0)):
        head.apply(partial(policy.init_weights, gain=gain))
    policy.log_std.fill_(policy.log_std_init)
    policy.optimizer.state.clear()


def moe_policy(model: PPO) -> MoEActorCriticPolicy:
    assert isinstance(model.policy, MoEActorCriticPolicy)
    return model.policy


def size_of(env: VecEnv) -> tuple[int, int]:
    """Numbers in an observation and in an action."""
    assert env.observation_space.shape is not None
    assert env.action_space.shape is not None
    return env.observation_space.shape[0], env.action_space.shape[0]


def mlp_parameters(width: int, depth: int, num_inputs: int, num_actions: int) -> int:
    """Parameters of Stable-Baselines3's MLP: an actor and a critic, each of ``depth`` layers, and the log stds."""
    tower = (num_inputs + 1) * width + (depth - 1) * (width + 1) * width
    return 2 * tower + (width + 1) * (num_actions + 1) + num_actions


def width_for(parameters: int, depth: int, num_inputs: int, num_actions: int) -> int:
    """The width of the MLP whose number of parameters is closest to this one."""
    width = 1
    while mlp_parameters(width + 1, depth, num_inputs, num_actions) <= parameters:
        width += 1
    return min((width, width + 1), key=lambda w: abs(mlp_parameters(w, depth, num_inputs, num_actions) - parameters))
