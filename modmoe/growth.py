"""Grow, freeze and remove over a whole model, and count what it holds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from modmoe.growable import GrowableBuffer, GrowableParameter
from modmoe.layer import MoELayer
from modmoe.pool import ExpertPool
from modmoe.rows import Growth, Task

Ids = Sequence[int] | Mapping[str, Sequence[int]]


def pools(module: nn.Module) -> dict[str, ExpertPool]:
    """Every pool of a model once, however many layers share it, by its (first) qualified name.

    Raises:
        ValueError: if there is none.
    """
    found = {name: m for name, m in module.named_modules() if isinstance(m, ExpertPool)}
    if not found:
        raise ValueError(f"{type(module).__name__} contains no ExpertPool")
    return found


def grow(module: nn.Module, n: int = 1, task: Task | None = None, init: Growth = "fresh") -> dict[str, list[int]]:
    """Add n experts to every pool of a model.

    Returns:
        pool name -> new ids, which :func:`freeze`, :func:`unfreeze` and :func:`remove` take.
    Raises:
        ValueError: if one pool refuses; none has grown then.
    """
    found = pools(module)
    for pool in found.values():
        pool.check_growth(n, init=init, task=task)
    return {name: pool.add_experts(n, init=init, task=task) for name, pool in found.items()}


def freeze(module: nn.Module, ids: Ids | None = None) -> None:
    """Freeze experts in every pool; without ids all of them, with the parts that layers' experts share.

    Args:
        module: any model that contains pools.
        ids: pool name -> ids, or ids that hold in every pool; None for all.
    """
    for pool, chosen in _chosen(module, ids):
        pool.freeze(chosen)
    if ids is None:
        for layer in module.modules():
            if isinstance(layer, MoELayer):
                layer.freeze()


def unfreeze(module: nn.Module, ids: Ids) -> None:
    """Make experts trainable again in every pool; ids as in :func:`freeze`."""
    for pool, chosen in _chosen(module, ids):
        pool.unfreeze(chosen or ())


def remove(module: nn.Module, ids: Ids) -> None:
    """Remove experts from every pool; ids as in :func:`freeze`. Nothing is removed if one layer refuses."""
    targets = _chosen(module, ids)
    leaving = {id(pool): set(chosen or ()) for pool, chosen in targets}
    for pool, chosen in targets:
        pool.check_removal(chosen or ())
    for layer in module.modules():
        if isinstance(layer, MoELayer):
            layer.router.check_pool(layer.pool.num_experts - len(leaving.get(id(layer.pool), ())))
    for pool, chosen in targets:
        pool.remove(chosen or ())


class ParameterCount(NamedTuple):
    """Numbers of scalars: trainable, frozen, their total, those that compute one token, and kept statistics."""

    trainable: int
    frozen: int
    total: int
    active: int
    statistics: int


def count_parameters(module: nn.Module) -> ParameterCount:
    """Count a model's parameters; frozen rows are buffers, so ``parameters()`` alone would miss them.

    ``active`` counts everything but the experts that a token does not use: in each layer the mean expert size times
    the number of experts that its router takes. ``statistics`` (densities, usage) are not parameters and are counted
    apart.
    """
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    statistics = 0
    for growable in module.modules():
        if isinstance(growable, GrowableParameter):
            frozen += sum(tensor.numel() for tensor, _, is_frozen in growable.banks() if is_frozen)
        elif isinstance(growable, GrowableBuffer):
            statistics += sum(tensor.numel() for tensor, _, _ in growable.banks())
    total = trainable + frozen
    seen: dict[int, float] = {}  # a shared pool is idle only as far as its most demanding layer leaves it
    for layer in module.modules():
        if isinstance(layer, MoELayer):
            size = sum(tensor.numel() for group in layer.pool.groups() for tensor in group.tensors.values())
            used = layer.router.num_active(layer.pool.num_experts) / layer.pool.num_experts
            seen[id(layer.pool)] = min(seen.get(id(layer.pool), float("inf")), size * (1 - used))
    idle = sum(seen.values())
    return ParameterCount(trainable, frozen, total, round(total - idle), statistics)


def _chosen(module: nn.Module, ids: Ids | None) -> Sequence[tuple[ExpertPool, Sequence[int] | None]]:
    found = pools(module)
    if isinstance(ids, Mapping):
        unknown = sorted(set(ids) - set(found))
        if unknown:
            raise ValueError(f"no pools named {unknown}, the model has {sorted(found)}")
        chosen = [(found[name], some) for name, some in ids.items()]
    else:
        chosen = [(pool, ids) for pool in found.values()]
    for pool, some in chosen:  # all of them before the first one changes
        for expert_id in some or ():
            pool.record(expert_id)
    return chosen


__all__ = ["ParameterCount", "count_parameters", "freeze", "grow", "pools", "remove", "unfreeze"]
