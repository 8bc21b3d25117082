"""Keep an optimizer right while a pool grows, freezes and shrinks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modmoe.growable import GrowableParameter, Row


def sync_optimizer(optimizer: Optimizer, module: nn.Module) -> None:
    """Bring an optimizer in line with a module after any growth, freezing or removal.

    Afterwards the optimizer holds each trainable tensor of ``module`` exactly once; tensors that the module has
    retired or frozen are gone with their state; rows that live on in a new tensor keep their moments and step.
    Tensors that are not the module's are left alone. A new tensor joins the parameter group of the other rows of its
    kind, or else the first group.

    Args:
        optimizer: any torch optimizer whose per-tensor state is shaped like the tensor, or shared by all its rows.
        module: a model that contains pools.
    """
    growables = [m for m in module.modules() if isinstance(m, GrowableParameter)]
    retired = {id(t): (t, rows, g) for g in growables for t, rows in g.retired()}
    owner_of = {id(t): g for g in growables for t, _ in g.live()}
    groups = optimizer.param_groups
    home: dict[int, int] = {}  # id of a growable -> index of the group its rows are in
    stale: dict[int, list[tuple[Tensor, tuple[Row, ...]]]] = {}  # id of a growable -> retired tensors with state here
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            growable = owner_of.get(id(parameter))
            if id(parameter) in retired:
                _, rows, growable = retired[id(parameter)]
                stale.setdefault(id(growable), []).append((parameter, rows))
            if growable is not None:
                home.setdefault(id(growable), index)

    wanted = {id(p): p for p in module.parameters() if p.requires_grad}
    frozen = {id(p) for p in module.parameters() if not p.requires_grad}
    held: set[int] = set()
    for group in groups:
        kept = []
        for parameter in group["params"]:
            if id(parameter) in retired or id(parameter) in frozen or id(parameter) in held:
                continue
            held.add(id(parameter))
            kept.append(parameter)
        group["params"] = kept

    rows_of = {id(t): rows for g in growables for t, rows in g.live()}
    for parameter in wanted.values():
        if id(parameter) in held:
            continue
        growable = owner_of.get(id(parameter))
        group = groups[home.get(id(growable), 0)]
        group["params"].append(parameter)
        if growable is not None:
            state = _carried_state(optimizer, stale.get(id(growable), []), parameter, rows_of[id(parameter)])
            if state:
                optimizer.state[parameter] = state

    listed = {id(p) for group in groups for p in group["params"]}
    for parameter in [p for p in optimizer.state if id(p) not in listed]:
        del optimizer.state[parameter]


def _carried_state(
    optimizer: Optimizer,
    stale: Sequence[tuple[Tensor, tuple[Row, ...]]],
    parameter: Tensor,
    rows: tuple[Row, ...],
) -> dict:
    """The state of the retired tensor that held all of ``rows``, cut to them; empty where there is none."""
    for old, old_rows in stale:
        place = {row.number: index for index, row in enumerate(old_rows)}
        if old not in optimizer.state or any(row.number not in place for row in rows):
            continue
        index = torch.tensor([place[row.number] for row in rows], device=parameter.device)
        return {
            key: value.index_select(0, index.to(value.device))
            if isinstance(value, Tensor) and value.dim() == old.dim() and value.shape[0] == old.shape[0]
            else value.clone()
            if isinstance(value, Tensor)
            else value
            for key, value in optimizer.state[old].items()
        }
    return {}
