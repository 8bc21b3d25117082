"""From mixture-of-experts layers back to dense feed-forward blocks."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from modmoe.conversion.feed_forward import FFN, dense_module
from modmoe.conversion.upcycle import substitute
from modmoe.experts import MLPExpert, SwiGLUExpert
from modmoe.layer import MoELayer


class WithShared(nn.Module):
    """dense(x) + shared(x): a dense block beside what was a layer's shared expert."""

    def __init__(self, dense: nn.Module, shared: nn.Module):
        super().__init__()
        self.dense = dense
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D_out)."""
        return self.dense(x) + self.shared(x)


@torch.no_grad()
def average_expert(layer: MoELayer, weights: Tensor | None = None) -> nn.Module:
    """One dense block with the experts' weighted mean of weights: theta = sum_e w_e theta_e / sum_e w_e.

    A shared expert is not in it.

    Args:
        layer: of MLPExpert or SwiGLUExpert of equal sizes; left as it is.
        weights: (E,) in the order of ``layer.pool.ids``, not negative, for instance their loads; None for equal ones.
    Returns:
        A Sequential(Linear, activation, Linear) or a SwiGLU module (..., D) -> (..., D_out), trainable.
    Raises:
        ValueError: on another kind of expert, experts of different sizes, or weights that are not such.
    """
    expert = _feed_forward_kind(layer)
    pool = layer.pool
    share = torch.ones(pool.num_experts) if weights is None else weights
    share = _check_weights(share, pool.num_experts)
    sizes = {expert_id: pool.record(expert_id).sizes for expert_id in pool.ids}
    if any(size != sizes[pool.ids[0]] for size in sizes.values()):
        raise ValueError(f"experts of different sizes have no average: {sizes}")
    rows = pool.namespace("expert")
    averaged = {}
    for name in rows:
        tensor = rows[name]
        wide = tensor.double()
        averaged[name] = torch.tensordot(share.to(wide) / share.sum().to(wide), wide, dims=1).to(tensor.dtype)
    return dense_module(expert, averaged)


@torch.no_grad()
def busiest_expert(layer: MoELayer, load: Tensor) -> nn.Module:
    """A copy of the expert with the highest load (the older one of equals) as a dense block.

    Args:
        layer: of MLPExpert or SwiGLUExpert; left as it is.
        load: (E,) in the order of ``layer.pool.ids``, see :func:`measure_load`.
    Returns:
        As :func:`average_expert`.
    Raises:
        ValueError: on another kind of expert, or a load that is not such, or nowhere positive.
    """
    expert = _feed_forward_kind(layer)
    busiest = layer.pool.ids[int(_check_weights(load, layer.pool.num_experts).argmax())]
    rows = layer.pool.namespace("expert", [busiest])
    return dense_module(expert, {name: rows[name][0] for name in rows})


def to_dense(
    model: nn.Module, how: Literal["average", "busiest"] = "average", load: Mapping[str, Tensor] | None = None
) -> list[tuple[str, nn.Module]]:
    """Replace every MoELayer of a model in place by one dense block, beside its shared expert where it has one.

    The model no longer computes what it did: :func:`distill` it from a copy made before. A dense block takes x only:
    a model that hands its layers a mask, tasks or ids has to stop doing so.

    Args:
        model: changed in place.
        how: "average" as :func:`average_expert`, "busiest" as :func:`busiest_expert`.
        load: layer name -> (E,), see :func:`measure_load`; "busiest" needs it, "average" weighs by it if it is given.
    Returns:
        (name, module) for each layer, in its place.
    Raises:
        ValueError: if the model has no layer or is one itself, on missing or unknown names in load, and as the two
            functions do, with the layer's name; nothing is changed then.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    if not layers or "" in layers:
        raise ValueError("a model that holds MoELayers is needed; of one layer alone take average_expert")
    if how not in ("average", "busiest"):
        raise ValueError(f"how is 'average' or 'busiest', got {how!r}")
    if (load is None and how == "busiest") or (load is not None and set(load) != set(layers)):
        raise ValueError(f"the load of each of {sorted(layers)} is needed, got {sorted(load or ())}")
    dense: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        given = None if load is None else load[name]
        try:
            block = average_expert(layer, given) if given is None or how == "average" else busiest_expert(layer, given)
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from error
        dense[name] = block if layer.shared_expert is None else WithShared(block, layer.shared_expert)
        dense[name].training = layer.training
        block.train(layer.training)
    for name, layer in layers.items():
        substitute(model, layer, dense[name])
    return list(dense.items())


@torch.no_grad()
def measure_load(model: nn.Module, batches: Iterable[Tensor | tuple | list]) -> dict[str, Tensor]:
    """How many assignments each expert of each layer receives, in evaluation and without gradients.

    Args:
        model: called with each batch's inputs; the modes of its modules are as before afterwards.
        batches: each the inputs, or a tuple or list that starts with them.
    Returns:
        Layer name -> (E,) int64, in the order of ``pool.ids``.
    Raises:
        ValueError: on a model without MoELayer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} contains no MoELayer")
    loads = {name: torch.zeros(layer.pool.num_experts, dtype=torch.int64) for name, layer in layers.items()}

    def count(name: str, layer: MoELayer) -> None:
        assert layer.routing is not None
        loads[name] += layer.routing.load.cpu()

    hooks = [
        layer.register_forward_hook(lambda *_, name=name, layer=layer: count(name, layer))
        for name, layer in layers.items()
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for batch in batches:
            model(batch if isinstance(batch, Tensor) else batch[0])
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return loads


def _feed_forward_kind(layer: MoELayer) -> FFN:
    expert = layer.pool.expert
    if not isinstance(expert, MLPExpert | SwiGLUExpert):
        raise ValueError(f"an MLPExpert or a SwiGLUExpert becomes a dense block, got {expert}")
    return expert


def _check_weights(weights: Tensor, num_experts: int) -> Tensor:
    if weights.shape != (num_experts,):
        raise ValueError(f"a number for each of {num_experts} experts is needed, got {tuple(weights.shape)}")
    if not torch.isfinite(weights).all() or bool((weights < 0).any()) or not bool(weights.sum() > 0):
        raise ValueError(f"numbers of at least 0, and positive somewhere, are needed, got {weights.tolist()}")
    return weights
