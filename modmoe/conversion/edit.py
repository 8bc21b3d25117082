"""Within a pool: drop experts that are not used, make one of two, change k."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from modmoe.experts import MLPExpert, SwiGLUExpert
from modmoe.gating import (
    BaseAssignmentRouter,
    CosineRouter,
    DenseRouter,
    ExpertChoiceRouter,
    ReLURouter,
    Router,
    SoftRouter,
    TopKRouter,
)
from modmoe.gating.fitted import FittedRouter
from modmoe.growable import GrowableBuffer
from modmoe.layer import MoELayer
from modmoe.pool import ExpertPool
from modmoe.segmentation import HIDDEN


def prune_unused(layer: MoELayer, load: Tensor, min_share: float = 0.01, keep: Collection[int] = ()) -> list[int]:
    """Remove the experts e with load_e / sum_i load_i < min_share, the least used first, with all that they own.

    What is left computes as if the removed ones had been masked, but where a router counts experts (a capacity, or
    experts that choose). As many stay as this layer's router needs; other layers on its pool are not asked. Call
    ``sync_optimizer`` after. Over a model:

        for name, load in measure_load(model, batches).items():
            prune_unused(model.get_submodule(name), load)

    Experts that are named are removed with ``layer.remove`` or :func:`modmoe.remove`.

    Args:
        layer: the layer.
        load: (E,) in the order of ``layer.pool.ids``, see :func:`measure_load`.
        min_share: in [0, 1].
        keep: ids that are not removed.
    Returns:
        The removed ids, in the order of removal.
    Raises:
        ValueError: if load has another shape, is negative or nowhere positive, if min_share is outside [0, 1], or on
            an unknown id to keep; nothing is changed then.
    """
    ids = layer.pool.ids
    if load.shape != (len(ids),):
        raise ValueError(f"a load of each of {len(ids)} experts is needed, got {tuple(load.shape)}")
    for expert_id in keep:
        layer.pool.record(expert_id)

    def may_leave(expert_id: int, left: Sequence[int]) -> bool:
        return expert_id not in keep and _routes(layer.router, len(left) - 1)

    removed = underused(ids, dict(zip(ids, load.tolist(), strict=True)), min_share, may_leave)
    if removed:
        layer.remove(removed)
    return removed


def underused(
    ids: Sequence[int],
    usage: Mapping[int, float],
    min_share: float,
    may_leave: Callable[[int, Sequence[int]], bool],
) -> list[int]:
    """The experts with a smaller share of the usage, the least used first; the last expert is never one of them.

    Args:
        ids: all experts.
        usage: a number >= 0 for each of them.
        min_share: in [0, 1].
        may_leave: (id, those that are still left, itself included) -> whether it may go.
    Raises:
        ValueError: if usage does not name every expert (and no other), is negative or nowhere positive, or if
            min_share is outside [0, 1].
    """
    if set(usage) != set(ids):
        raise ValueError(f"usage must name the experts {list(ids)}, it names {sorted(usage)}")
    total = sum(usage.values())
    if min(usage.values()) < 0 or not total > 0:
        raise ValueError(f"usage must not be negative, and positive somewhere, got {dict(usage)}")
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share must be in [0, 1], got {min_share}")
    left, leaving = list(ids), []
    for expert_id in sorted(ids, key=lambda i: usage[i]):
        if len(left) > 1 and usage[expert_id] / total < min_share and may_leave(expert_id, left):
            left.remove(expert_id)
            leaving.append(expert_id)
    return leaving


@torch.no_grad()
def merge_experts(
    layer: MoELayer, keep: int, drop: int, weights: tuple[float, float] = (0.5, 0.5), align: bool = False
) -> None:
    """Let one live expert become the weighted mean of two, s theta_keep + (1 - s) theta_drop, and remove the other.

    The gate's rows become:

    - linear gates that select (top-k and its kin, expert choice, BASE): the same mean;
    - a dense gate: the mean of the weights, and b = log(exp(b_keep) + exp(b_drop)), so that two equal experts under
      equal gate weights leave the layer's function as it was;
    - a ReLU gate: the sum of both, to the same end;
    - gates in which a row's direction alone counts (cosine, soft): the mean of the normalised rows;
    - gates fitted to data: what ``FittedRouter.merged_rows`` says.

    The expert belongs to the task of both, or, where they differ, to none: it is open to every task. Its optimizer
    state is that of ``keep``; call ``sync_optimizer`` after.

    Args:
        layer: the only layer on its pool.
        keep: the expert that changes.
        drop: the one that is removed, frozen or not.
        weights: of keep and drop, not negative, for instance their loads; divided by their sum.
        align: reorder the hidden units of ``drop`` first so that they are closest to those of ``keep``: experts that
            were trained apart may hold the same function in another order.
    Raises:
        ValueError: on an unknown id, the same one twice, a frozen ``keep``, different sizes, weights that are not such,
            align for experts without hidden units, a router for which nothing is said above or that needs more
            experts, or rows of others on the pool; nothing is changed then.
    Source:
        align: weight matching of Ainsworth et al. 2022 (Git Re-Basin); with one hidden layer a single linear
        assignment is its optimum.
    """
    pool = layer.pool
    mine, theirs = pool.record(keep), pool.record(drop)
    if keep == drop:
        raise ValueError(f"two experts are needed, got {keep} twice")
    if mine.frozen:
        raise ValueError(f"expert {keep} is frozen, and merging would change it: unfreeze it, or keep another one")
    if mine.sizes != theirs.sizes:
        raise ValueError(f"experts of sizes {mine.sizes} and {theirs.sizes} have no average")
    if min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"weights must not be negative, and positive somewhere, got {weights}")
    others = sorted(set(pool.namespaces) - {"expert", layer.namespace})
    if others:
        raise ValueError(f"nothing says how the rows of {others} are merged")
    layer.router.check_pool(pool.num_experts - 1)
    share = weights[0] / sum(weights)
    first, second = expert_rows(pool, "expert", keep), expert_rows(pool, "expert", drop)
    if align:
        second = _aligned(pool, first, second)
    gates = expert_rows(pool, layer.namespace, keep), expert_rows(pool, layer.namespace, drop)
    gate = _merged_gate(layer.router, *gates, share)

    # every refusal is behind us: from here on the pool changes
    _write(pool, "expert", keep, mean_rows(first, second, share))
    _write(pool, layer.namespace, keep, gate)
    if mine.task != theirs.task:
        pool.assign_task(keep, None)
    layer.remove([drop])


def change_top_k(model: nn.Module, k: int) -> list[str]:
    """Set how many experts each token gets, in every layer of a model, from now on.

    With ``renormalize=None`` a top-k router weighs one expert by its probability, and more by weights that add up to
    1: between 1 and more the outputs' scale changes. For a ReLU router it is the number that it aims at. k is no part
    of a state dict: a model that is loaded has the k that it was built with.

    Args:
        model: a MoELayer, or a model that contains some.
        k: at least 1.
    Returns:
        The names of the layers.
    Raises:
        ValueError: if there is no layer, if k is no number of experts of some pool, or if a router has no k; nothing
            is changed then.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} contains no MoELayer")
    without = [f"'{name}' ({type(m.router).__name__})" for name, m in layers.items() if not hasattr(m.router, "top_k")]
    if without:
        raise ValueError(f"these routers have no top_k: {', '.join(without)}")
    for name, layer in layers.items():
        if not 1 <= k <= layer.pool.num_experts:
            raise ValueError(f"top_k={k} experts cannot be chosen out of {layer.pool.num_experts} in '{name}'")
    for layer in layers.values():
        cast(TopKRouter | FittedRouter | ReLURouter, layer.router).top_k = k
        layer.pool.set_preserving(layer.namespace, layer.router.preserving_growth)
    return list(layers)


def expert_rows(pool: ExpertPool, namespace: str, expert_id: int) -> dict[str, Tensor]:
    """Copies of one expert's rows in a namespace: name -> (R, ...)."""
    rows = pool.namespace(namespace, [expert_id])
    return {name: rows[name].detach().clone() for name in rows}


def mean_rows(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """share * first + (1 - share) * second by name, computed in float64."""
    pairs = {name: (tensor.double(), second[name].double()) for name, tensor in first.items()}
    return {name: (share * a + (1 - share) * b).to(first[name].dtype) for name, (a, b) in pairs.items()}


def _routes(router: Router, num_experts: int) -> bool:
    try:
        router.check_pool(num_experts)
    except ValueError:
        return False
    return True


def _merged_gate(
    router: Router, first: dict[str, Tensor], second: dict[str, Tensor], share: float
) -> dict[str, Tensor]:
    if isinstance(router, FittedRouter):
        return router.merged_rows(first, second)
    if isinstance(router, ReLURouter):
        return {name: tensor + second[name] for name, tensor in first.items()}
    if isinstance(router, CosineRouter | SoftRouter):
        unit = [{name: F.normalize(tensor, dim=-1) for name, tensor in rows.items()} for rows in (first, second)]
        return mean_rows(unit[0], unit[1], share)
    if isinstance(router, DenseRouter):
        return {**mean_rows(first, second, share), "bias": torch.logaddexp(first["bias"], second["bias"])}
    if isinstance(router, TopKRouter | ExpertChoiceRouter | BaseAssignmentRouter):
        return mean_rows(first, second, share)
    raise ValueError(f"nothing says how the gate rows of {type(router).__name__} are merged")


def _aligned(pool: ExpertPool, first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second expert with its hidden units in the order in which their weights are closest to the first's."""
    if not isinstance(pool.expert, MLPExpert | SwiGLUExpert):
        raise ValueError(f"an MLPExpert or a SwiGLUExpert has hidden units to align, got {pool.expert}")
    axes = {  # with the leading axis of one row
        name: 1 + spec.shape.index(HIDDEN) for name, spec in pool.specs("expert").items() if HIDDEN in spec.shape
    }
    units = [
        torch.cat([rows[name].double().movedim(axis, 0).flatten(1) for name, axis in axes.items()], dim=1)
        for rows in (first, second)
    ]
    # the closest order has the largest sum of products: the norms do not depend on it
    _, order = linear_sum_assignment((units[0] @ units[1].T).cpu().numpy(), maximize=True)
    index = torch.as_tensor(order, device=units[1].device)
    return {name: row.index_select(axes[name], index) if name in axes else row for name, row in second.items()}


def _write(pool: ExpertPool, namespace: str, expert_id: int, rows: Mapping[str, Tensor]) -> None:
    """Overwrite a live expert's rows; statistics may have become more rows."""
    for name, values in rows.items():
        growable = pool.growable(namespace, name)
        if isinstance(growable, GrowableBuffer):
            held = growable.row_counts().get(expert_id, 0)
            growable.add([expert_id] * (len(values) - held), values[held:])
            growable.write(expert_id, values)
            continue
        places = sorted(
            (row.number, number, index)
            for number, (_, bank, _) in enumerate(growable.banks())
            for index, row in enumerate(bank)
            if row.owner == expert_id
        )
        assert len(places) == len(values)
        for value, (_, number, index) in zip(values, places, strict=True):
            growable.banks()[number][0][index] = value
