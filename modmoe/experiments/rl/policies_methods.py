"""The methods of a comparison: their policies, all of one size, and the models that train them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from gymnasium import spaces
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.sac.policies import SACPolicy

from modmoe.experiments.rl.policies_heads import MultiHeadActorCriticPolicy, MultiHeadSACPolicy
from modmoe.experiments.rl.policies_settings import Method, PoliciesSettings
from modmoe.rl import MoEActorCriticPolicy, MoESACPolicy, grow

TOLERANCE = 0.05  # by how much parameters may differ
LARGEST = 1 << 14  # hidden units that no search goes beyond


class Kinds(NamedTuple):
    """The classes of an algorithm: itself, and its mixture, plain and multi-head policies."""

    algorithm: Callable[..., BaseAlgorithm]
    moe: type[BasePolicy]
    mlp: type[BasePolicy]
    multi_head: type[BasePolicy]


KINDS = {
    "ppo": Kinds(PPO, MoEActorCriticPolicy, ActorCriticPolicy, MultiHeadActorCriticPolicy),
    "sac": Kinds(SAC, MoESACPolicy, SACPolicy, MultiHeadSACPolicy),
}

ABOUT: dict[Method, str] = {
    "moe": "{experts} experts of {hidden} hidden units, each with an actor and a critic of its own; the router "
    "'{router}' scores the observation",
    "moe_oracle": "an expert of {hidden} hidden units for each context, which the visible context chooses: what "
    "routing by the truth would give",
    "mlp": "Stable-Baselines3's MlpPolicy with two layers of {hidden}, for actor and critic each",
    "multi_head_mlp": "an MLP with two layers of {hidden} that all contexts share, and an output head for each "
    "context, which the visible context chooses",
    "scaled_expert": "a mixture policy with a single expert of {hidden} hidden units, as large as the whole mixture",
}


def policy_of(
    method: Method, config: PoliciesSettings, space: spaces.Space[Any], hidden: int
) -> tuple[type[BasePolicy], dict[str, Any]]:
    """The class and the keyword arguments of a method's policy.

    Args:
        method: one of ``ABOUT``.
        config: the settings.
        space: of the observations, whose last numbers are the context.
        hidden: units in each of two hidden layers.
    """
    kinds, layers = KINDS[config.algorithm], (hidden, hidden)
    if method == "mlp":
        return kinds.mlp, {"net_arch": list(layers)}
    if method == "multi_head_mlp":
        return kinds.multi_head, {"num_contexts": config.context_width, "hidden_features": hidden}
    if method == "scaled_expert":
        return kinds.moe, {"num_experts": 1, "router": "dense", "hidden_features": layers}
    if method == "moe_oracle":
        width = spaces.flatdim(space)
        context = (width - config.context_width, width)
        one = {"num_experts": 1, "router": "dense", "task": 0, "context": context, "task_of": "one_hot"}
        return kinds.moe, {**one, "hidden_features": layers}  # the others are grown, each with its task
    routed = {"router": config.router, "router_kwargs": config.router_kwargs, "balance_coef": config.balance_coef}
    return kinds.moe, {"num_experts": config.num_experts, "hidden_features": layers, **routed}


def num_parameters(policy: BasePolicy) -> int:
    """How many numbers are trained; targets are copies and do not count."""
    named = policy.named_parameters()
    return sum(parameter.numel() for name, parameter in named if not name.startswith("critic_target."))


def count(
    method: Method, config: PoliciesSettings, space: spaces.Space[Any], actions: spaces.Space[Any], hidden: int
) -> int:
    """The parameters that a method's policy has with so many hidden units, once all its experts are there."""
    policy_class, kwargs = policy_of(method, config, space, hidden)
    if method == "moe_oracle":
        kwargs["num_experts"] = config.context_width
    return num_parameters(policy_class(space, actions, lambda _: 1e-3, **kwargs))


def equal_sizes(config: PoliciesSettings, space: spaces.Space[Any], actions: spaces.Space[Any]) -> dict[Method, int]:
    """For each method the hidden units that bring its parameters closest to those of ``moe``.

    Args:
        config: the settings.
        space: of the observations.
        actions: the space of actions.
    Returns:
        Method -> H.
    Raises:
        ValueError: if a method cannot come within 5%, which happens with a handful of parameters only.
    """
    target = count("moe", config, space, actions, config.hidden_features)
    sizes: dict[Method, int] = {}
    for method in config.methods:
        if method == "moe":
            sizes[method] = config.hidden_features
            continue

        def size(hidden: int, method: Method = method) -> int:
            return count(method, config, space, actions, hidden)

        low, high = 1, 2
        while size(high) < target and high < LARGEST:
            low, high = high, 2 * high
        while high - low > 1:  # parameters rise with the hidden units
            middle = (low + high) // 2
            low, high = (middle, high) if size(middle) < target else (low, middle)
        found = min((low, high), key=lambda hidden: abs(size(hidden) - target))
        if abs(size(found) - target) > TOLERANCE * target:
            raise ValueError(
                f"{method} comes no closer to the {target} parameters of moe than {size(found)}, with {found} hidden "
                "units: give moe more hidden_features"
            )
        sizes[method] = found
    return sizes


def make_model(method: Method, config: PoliciesSettings, envs: VecEnv, hidden: int, seed: int) -> BaseAlgorithm:
    """The algorithm with a method's policy, ready to learn.

    Args:
        method: one of ``ABOUT``.
        config: the settings.
        envs: to train in.
        hidden: units in each of two hidden layers.
        seed: of the weights, the actions and the environments.
    """
    policy_class, kwargs = policy_of(method, config, envs.observation_space, hidden)
    arguments = {"device": "cpu", **config.algorithm_kwargs, "policy_kwargs": kwargs, "seed": seed}
    model = KINDS[config.algorithm].algorithm(policy_class, envs, **arguments)
    if method == "moe_oracle":
        for context in range(1, config.context_width):
            grow(model, task=context)
    return model


def describe(method: Method, config: PoliciesSettings, hidden: int) -> str:
    """One sentence on what a method is."""
    return ABOUT[method].format(experts=config.num_experts, hidden=hidden, router=config.router)
