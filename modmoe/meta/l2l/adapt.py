"""Which parameters adapt to a task, and which experts a task needs."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from modmoe.growth import pools
from modmoe.layer import MoELayer
from modmoe.meta.l2l.clone import safe_clone
from modmoe.meta.l2l.errors import AdaptationError

Named = Literal["all", "router", "active_experts", "heads"]
Adapt = Named | Callable[[str, Tensor], bool]
HEADS = ("head", "heads", "classifier")


def select_parameters(module: nn.Module, adapt: Adapt = "all") -> tuple[str, ...]:
    """The names of the parameters that adapt, in the order of ``named_parameters``; frozen ones never do.

    Args:
        module: any module.
        adapt: "all"; "router" for the gate rows and the routers' own parameters; "active_experts" for all rows that
            experts own (a wrapper's clone then holds only those that the task needs); "heads" for what lies in
            modules named "head", "heads" or "classifier", and rows of pools that are neither an expert's weights nor
            a gate's; or a function of name and parameter.
    Raises:
        AdaptationError: on an unknown word, or if nothing is left to adapt.
    """
    if not callable(adapt) and adapt not in get_args(Named):
        raise AdaptationError(f"adapt is one of {get_args(Named)} or a function of name and parameter, got {adapt!r}")
    chosen = adapt if callable(adapt) else _predicate(module, adapt)
    trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    names = tuple(name for name, parameter in trainable if chosen(name, parameter))
    if not names:
        raise AdaptationError(
            f"adapt={adapt!r} leaves nothing to adapt among the trainable parameters "
            f"{[name for name, _ in trainable]}: give a function of name and parameter that chooses some"
        )
    return names


def _predicate(module: nn.Module, adapt: Named) -> Callable[[str, Tensor], bool]:
    if adapt == "all":
        return lambda name, parameter: True
    rows = {f"{name}.rows." if name else "rows.": pool for name, pool in _pools(module).items()}
    gates = tuple(prefix for _, prefix, _ in gate_layers(module))
    if adapt == "active_experts":
        return lambda name, parameter: name.startswith(tuple(rows))
    if adapt == "router":
        routers = {id(p) for _, _, layer in gate_layers(module) for p in layer.router.parameters()}
        return lambda name, parameter: name.startswith(gates) or id(parameter) in routers
    weights = tuple(f"{prefix}expert." for prefix in rows)

    def is_head(name: str, parameter: Tensor) -> bool:
        if name.startswith(tuple(rows)):
            return not name.startswith((*weights, *gates))
        return any(part in HEADS for part in name.split(".")[:-1])

    return is_head


def gate_layers(module: nn.Module) -> Iterator[tuple[str, str, MoELayer]]:
    """Each layer with its name and the prefix of its gate rows' names."""
    prefixes = {id(pool): f"{name}.rows." if name else "rows." for name, pool in _pools(module).items()}
    for name, layer in module.named_modules():
        if isinstance(layer, MoELayer):
            yield name, f"{prefixes[id(layer.pool)]}{layer.namespace}.", layer


def _pools(module: nn.Module) -> dict[str, Any]:
    try:
        return dict(pools(module))
    except ValueError:  # none
        return {}


@torch.no_grad()
def active_experts(module: nn.Module, *batch: Any, **named: Any) -> dict[str, tuple[int, ...]]:
    """The experts that the layers of a module choose for a batch, in evaluation mode; the module is left as it is.

    Args:
        module: it contains pools in layers.
        batch: the arguments of its forward, the task's context.
        named: its named arguments.
    Returns:
        Pool name -> ids in pool order; of a pool with several layers, what any of them chooses.
    Raises:
        AdaptationError: if the module has no layer with a pool, or a layer has routed nothing.
    """
    probe = safe_clone(module, parameters=()).eval()
    names = {id(pool): name for name, pool in _pools(probe).items()}
    layers = [layer for layer in probe.modules() if isinstance(layer, MoELayer)]
    if not layers:
        raise AdaptationError(f"{type(module).__name__} has no MoELayer: adapt='active_experts' has nothing to go by")
    probe(*batch, **named)
    used: dict[str, set[int]] = {}
    for layer in layers:
        if layer.routing is not None:
            chosen = [layer.pool.ids[position] for position in layer.routing.load.nonzero().flatten().tolist()]
            used.setdefault(names[id(layer.pool)], set()).update(chosen)
    for layer in layers:
        if not used.get(names[id(layer.pool)]):
            raise AdaptationError(f"the batch reaches no expert of the pool '{names[id(layer.pool)]}'")
    found = {name: pool.ids for name, pool in _pools(probe).items() if name in used}
    return {name: tuple(expert_id for expert_id in ids if expert_id in used[name]) for name, ids in found.items()}
