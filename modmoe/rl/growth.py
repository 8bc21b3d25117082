"""Grow, freeze and remove experts of an SB3 algorithm: networks, targets, optimizers and policy_kwargs together."""

import inspect
from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor

from modmoe.growable import GrowableParameter
from modmoe.growth import freeze as freeze_pools
from modmoe.growth import remove as remove_experts
from modmoe.growth import unfreeze as unfreeze_pools
from modmoe.pool import Task
from modmoe.rl.mace_growth import GrowingPairs
from modmoe.rl.network import MoENetwork
from modmoe.rl.policy import MoEPolicy, mirror


def grow(
    model: BaseAlgorithm,
    n: int = 1,
    init: Literal["fresh", "copy", "zero"] | ArrayLike = "fresh",
    task: Task | None = None,
    source: int | None = None,
) -> list[int]:
    """Add experts to every network of a model, its targets included, between rollouts.

    Args:
        model: an algorithm of SB3 with a mixture policy.
        n: how many, at least 1.
        init: "fresh" draws new ones; "copy" repeats a live one and "zero" adds none of an output, both without a
            change of the function, where the router declares that (``Router.preserving_growth``). Numbers, (A,) or
            (n, A), draw fresh ones and set the bias of their action outputs: means, logits or Q-values; for SAC and
            TD3 in [-1, 1], before SB3 rescales them.
        task: the new experts' task.
        source: the expert to copy; None for the newest live one.
    Returns:
        The new stable ids, the same in every network.
    Raises:
        ValueError: in the middle of a rollout, on a bad argument, or as ``ExpertPool.add_experts``; nothing is
            changed then.
    """
    policy = check_model(model)
    kind = init if isinstance(init, str) else "fresh"
    bias = None if isinstance(init, str) else _bias(policy, init, n)
    for part in policy.parts():
        for network in (part.network, part.target):
            if network is not None:
                network.pool.check_growth(n, init=kind, task=task, source=source)  # type: ignore[arg-type]
    new: list[int] = []
    for part in policy.parts():
        new = part.network.pool.add_experts(n, init=kind, task=task, source=source)  # type: ignore[arg-type]
        if bias is not None:
            set_action_bias(part.network, new, bias)
        if part.target is not None and kind == "copy":
            part.target.pool.add_experts(n, init=kind, task=task, source=source)  # its own function stays, too
    _finish(model, policy, copied=kind == "copy")
    return new


def freeze(model: BaseAlgorithm, ids: Sequence[int] | None = None, shared: bool = False) -> None:
    """Freeze experts with all that they own; targets take over their values.

    Args:
        model: an algorithm of SB3 with a mixture policy.
        ids: which; None for all.
        shared: freeze what stands outside the pools as well: trunk, shared heads, the extractor's weights.
    Raises:
        ValueError: in the middle of a rollout, or on an unknown id; nothing is changed then.
    """
    policy = check_model(model)
    wanted = policy.parts()[0].network.pool.ids if ids is None else ids
    for part in policy.parts():
        freeze_pools(part.network, wanted)
    if shared:
        policy.freeze_shared()
        model.policy_kwargs = {**model.policy_kwargs, "shared_frozen": True}
    _finish(model, policy)


def unfreeze(model: BaseAlgorithm, ids: Sequence[int]) -> None:
    """Make experts trainable again; arguments and errors as of :func:`freeze`."""
    policy = check_model(model)
    for part in policy.parts():
        unfreeze_pools(part.network, ids)
    _finish(model, policy)


def remove(model: BaseAlgorithm, ids: Sequence[int]) -> None:
    """Remove experts from every network of a model, its targets included.

    Raises:
        ValueError: in the middle of a rollout, on an unknown id, or where too few would be left; nothing is changed.
    """
    policy = check_model(model)
    for part in policy.parts():
        remove_experts(part.network, ids)
    _finish(model, policy)


def check_model(model: BaseAlgorithm) -> MoEPolicy:
    """The policy of a model that may change its structure now.

    Raises:
        ValueError: if the policy has no pools, or the model is in the middle of a rollout.
    """
    policy = model.policy
    if isinstance(model, GrowingPairs):
        raise ValueError(
            "a MACE has pairs of its own kind: use its add_pair, freeze_pairs, unfreeze_pairs, remove_pairs"
        )
    if not isinstance(policy, MoEPolicy):
        raise ValueError(f"{type(policy).__name__} has no experts: make the model with a policy of modmoe.rl")
    if in_rollout(model):
        raise ValueError(
            "the model is in the middle of a rollout, whose actions the present policy took: change its experts when "
            "a rollout starts (a callback's _on_rollout_start) or outside learn()"
        )
    policy.set_training_mode(False)  # a router's last adjustment is due before experts change
    return policy


def in_rollout(model: BaseAlgorithm) -> bool:
    """Whether ``model.collect_rollouts`` is running and has taken a step.

    SB3 keeps no such mark, and its counters look alike after a rollout that a callback has broken off; so this looks
    at the call itself, which has a ``new_obs`` from its first step on.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "collect_rollouts" and frame.f_locals.get("self") is model:
            return "new_obs" in frame.f_locals
        frame = frame.f_back
    return False


@torch.no_grad()
def set_action_bias(network: MoENetwork, ids: Sequence[int], bias: Tensor) -> None:
    """Set the output bias of experts' actions; networks without action outputs are left alone.

    Args:
        network: with an output "pi".
        ids: live experts.
        bias: (len(ids), A).
    """
    if "pi" not in network.outputs:
        return
    growable = cast(GrowableParameter, network.pool.growable("expert", "pi_b_out"))
    for tensor, rows in growable.live():
        for index, row in enumerate(rows):
            if row.owner in ids:
                tensor[index, : bias.shape[1]] = bias[list(ids).index(row.owner)]


def _bias(policy: MoEPolicy, init: ArrayLike, n: int) -> Tensor:
    values = torch.as_tensor(np.asarray(init, dtype=np.float32))
    network = next((p.network for p in policy.parts() if "pi" in p.network.outputs), None)
    if network is None or "pi_b_out" not in network.pool.specs("expert"):
        raise ValueError("an initial bias needs experts that own their action outputs, with a bias (own_heads=True)")
    size = policy.num_actions()
    if values.shape not in ((size,), (n, size)) or not torch.isfinite(values).all():
        raise ValueError(f"an initial bias is finite, of shape ({size},) or ({n}, {size}), got {tuple(values.shape)}")
    return policy.action_bias(values.expand(n, size)).to(policy.device)


def _finish(model: BaseAlgorithm, policy: MoEPolicy, copied: bool = False) -> None:
    """Bring targets, optimizers and what load() builds from in line."""
    for part in policy.parts():
        if part.target is not None and not copied:
            mirror(part.network, part.target)
    policy.sync_optimizers()
    policy.options_from_pools()
    model.policy_kwargs = {**model.policy_kwargs, "num_experts": policy.options.num_experts}


__all__ = ["check_model", "freeze", "grow", "in_rollout", "remove", "set_action_bias", "unfreeze"]
