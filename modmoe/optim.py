"""Keep an optimizer right while a pool grows, freezes and shrinks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modmoe.growable import GrowableParameter, Row

HOME = "modmoe_home"  # key of a parameter group: what belongs to it, remembered while all of it is frozen


def sync_optimizer(optimizer: Optimizer, module: nn.Module) -> None:
    """Bring an optimizer in line with a module after any growth, freezing or removal.

    Afterwards the optimizer holds each trainable tensor of ``module`` exactly once, in the module's order (so that
    its state dict fits an optimizer made for a model that was loaded from a state dict); tensors that the module has
    retired or frozen are gone with their state; rows that live on in a new tensor keep their moments and step.
    Tensors that are not the module's are left alone. A new tensor joins the parameter group in which the rows of its
    kind are or last were, or else the first group.

    Args:
        optimizer: any torch optimizer whose per-tensor state is shaped like the tensor, or shared by all its rows.
        module: a model that contains pools; the same one in each call.
    """
    growables = {name: m for name, m in module.named_modules() if isinstance(m, GrowableParameter)}
    retired = [(tensor, rows, name) for name, growable in growables.items() for tensor, rows in growable.retired()]
    live = [(tensor, rows, name) for name, growable in growables.items() for tensor, rows in growable.live()]
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    kinds = named | {id(tensor): name for tensor, _, name in (*retired, *live)}
    groups = optimizer.param_groups

    held: dict[int, int] = {}  # id of a tensor -> index of the group that holds it
    now: dict[str, int] = {}  # kind -> index of the group it is in
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            held.setdefault(id(parameter), index)
            if id(parameter) in kinds:
                now.setdefault(kinds[id(parameter)], index)
    home = {kind: index for index, group in enumerate(groups) for kind in group.get(HOME, ())} | now
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    place = {id(p): held.get(id(p), home.get(kinds[id(p)], 0)) for p in trainable}

    for index, group in enumerate(groups):
        params = group["params"]
        labels = dict(zip(map(id, params), group.get("param_names", ()), strict=False))
        start = next((i for i, p in enumerate(params) if id(p) in kinds), len(params))
        foreign = [p for p in params[start:] if id(p) not in kinds]
        params[start:] = [p for p in trainable if place[id(p)] == index] + foreign
        if "param_names" in group:
            group["param_names"] = [labels.get(id(p)) or named[id(p)] for p in params]
        if len(groups) > 1:
            group[HOME] = sorted(kind for kind, where in home.items() if where == index)

    stale = [(tensor, rows, name) for tensor, rows, name in retired if tensor in optimizer.state]
    for parameter, rows, name in live:
        if id(parameter) in place and parameter not in optimizer.state:
            state = _carried_state(optimizer, [(t, r) for t, r, kind in stale if kind == name], parameter, rows)
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
        if any(row.number not in place for row in rows):
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
