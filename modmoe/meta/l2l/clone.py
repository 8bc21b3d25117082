"""Differentiable clones that leave their base as it was, to the last bit."""

import functools
import types
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from modmoe.growable import Growable, GrowableParameter, Row
from modmoe.growth import pools
from modmoe.pool import ExpertPool
from modmoe.routing import Routing

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
COPIED_ON_WRITE = ("_banks", "_plans", "_retired", "_book", "_specs", "_preserving")  # a pool's books, never altered


def safe_clone(
    module: nn.Module,
    parameters: Collection[str] | None = None,
    experts: Mapping[str, Collection[int]] | None = None,
    detach: bool = False,
) -> nn.Module:
    """A differentiable copy: gradients through it, of second order too, reach the base's parameters.

    Beyond what learn2learn's ``clone_module`` copies: every buffer; modules and tensors inside lists, dicts, tuples,
    sets, partials and bound methods, each module and each tied parameter once; NumPy arrays. Forward and backward
    hooks stay with the base, but for those with which ``torch.nn.utils`` computes weights. A layer's last routing is
    not taken over. Objects of other classes are shared.

    Args:
        module: any module, whatever pools it contains.
        parameters: names, as of ``named_parameters``, of those that are copied; the others are the base's own tensors
            (their views, with ``detach``), and so are the pools' statistics and frozen rows. None copies everything.
        experts: pool name -> ids of the experts that the clone has; its routers choose among them, as with an
            ``expert_mask``. None, or a pool that is not named, for all.
        detach: leaves of their own, with no way back to the base: for evaluation.
    Returns:
        A module of the same class and mode.
    Raises:
        ValueError: on unknown names or ids, no ids, parameters that a lazy module has not made yet, a compiled or
            scripted module, or a parameter in a tuple, where it could not be replaced.
    Source:
        ``clone_module`` of learn2learn (Arnold et al. 2020), which shares buffers, hooks and lists with the base.
    """
    return clone_with_places(module, parameters, experts, detach).module


@dataclass
class Cloned:
    """A clone, and where its copied parameters are.

    Args:
        module: the clone.
        tensors: the base's name -> the copy.
        places: name -> every (dict or list, key) that holds it: several for a tied one.
        rows: name -> which rows it holds, where it belongs to a pool.
        kept: name -> (R,) int64, which of the base's rows these are; missing where it has all of them.
    """

    module: nn.Module
    tensors: dict[str, Tensor]
    places: dict[str, list[tuple[Any, Any]]]
    rows: dict[str, tuple[Row, ...]]
    kept: dict[str, Tensor]

    def replace(self, name: str, value: Tensor) -> None:
        """Put another tensor wherever a parameter is."""
        self.tensors[name] = value
        for container, key in self.places[name]:
            container[key] = value


def clone_with_places(
    module: nn.Module,
    parameters: Collection[str] | None = None,
    experts: Mapping[str, Collection[int]] | None = None,
    detach: bool = False,
) -> Cloned:
    """:func:`safe_clone`, with what it takes to update the clone."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    if parameters is not None and set(parameters) - set(names.values()):
        raise ValueError(f"no parameters named {sorted(set(parameters) - set(names.values()))}")
    return _Cloner(names, parameters, _kept_experts(module, experts), detach).run(module)


def _kept_experts(module: nn.Module, experts: Mapping[str, Collection[int]] | None) -> dict[int, frozenset[int]]:
    """id of a pool, or of a kind of its rows -> the experts that the clone keeps."""
    kept: dict[int, frozenset[int]] = {}
    found = pools(module) if experts else {}
    for name, ids in (experts or {}).items():
        if name not in found:
            raise ValueError(f"no pool named '{name}', the module has {sorted(found)}")
        pool = found[name]
        pool.namespace("expert", list(ids))  # raises on unknown ids
        if not ids:
            raise ValueError(f"a clone keeps at least one expert of '{name}'")
        for part in (pool, *(growable for growable in pool.modules() if isinstance(growable, Growable))):
            kept[id(part)] = frozenset(ids)
    return kept


class _Cloner:
    """One walk over a module; what was copied once is found again by its id."""

    def __init__(
        self,
        names: dict[int, str],
        parameters: Collection[str] | None,
        kept_experts: dict[int, frozenset[int]],
        detach: bool,
    ):
        self.names = names
        self.partial = parameters is not None
        self.chosen = set(names.values() if parameters is None else parameters)
        self.kept_experts = kept_experts
        self.detach = detach
        self.memo: dict[int, Any] = {}
        self.places: dict[str, list[tuple[Any, Any]]] = {}
        self.rows: dict[str, tuple[Row, ...]] = {}
        self.kept: dict[str, Tensor] = {}

    def run(self, module: nn.Module) -> Cloned:
        clone = self.module(module)
        tensors = {name: places[0][0][places[0][1]] for name, places in self.places.items()}
        order = [name for name in self.names.values() if name in tensors]
        return Cloned(clone, {name: tensors[name] for name in order}, self.places, self.rows, self.kept)

    def module(self, base: nn.Module) -> nn.Module:
        if id(base) in self.memo:
            return self.memo[id(base)]
        if isinstance(base, torch.jit.ScriptModule) or type(base).__name__ == "OptimizedModule":
            raise ValueError(
                f"{type(base).__name__} runs code that is tied to its own tensors: clone what it was made of"
            )
        clone = self.memo[id(base)] = base.__new__(type(base))
        state = clone.__dict__
        for key, value in base.__dict__.items():
            if key in HOOKS:
                state[key] = self.hooks(value)
            elif key in ("_parameters", "_buffers", "_modules"):
                state[key] = {}
            elif isinstance(base, Growable | ExpertPool) and key in COPIED_ON_WRITE:
                state[key] = value
        if id(base) in self.kept_experts and isinstance(base, Growable):
            self.cut_rows(base, state)
        else:
            for key, value in base._parameters.items():
                self.put(state["_parameters"], key, value)
            shared = self.partial and isinstance(base, Growable)
            for key, value in base._buffers.items():
                state["_buffers"][key] = value if shared or value is None else self.tensor(value)
        if id(base) in self.kept_experts and isinstance(base, ExpertPool):
            ids = self.kept_experts[id(base)]
            state["_book"] = {expert_id: record for expert_id, record in base.book.items() if expert_id in ids}
        if isinstance(base, GrowableParameter):
            self.note_rows(base, state["_banks"])
        for key, value in base._modules.items():
            state["_modules"][key] = None if value is None else self.module(value)
        for key, value in base.__dict__.items():
            if key not in state:
                self.put(state, key, value)
        return clone

    def hooks(self, hooks: dict[int, Any]) -> "OrderedDict[int, Any]":
        """Those that compute a weight from parameters: without them the clone would compute with an old one."""
        kept = [(key, hook) for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils.")]
        return OrderedDict(kept)

    def put(self, container: Any, key: Any, value: Any) -> None:
        """Set container[key] to the copy of value, and note the place where it is a parameter that is copied."""
        container[key] = self.value(value)
        if isinstance(value, Tensor) and self.names.get(id(value)) in self.chosen:
            self.places.setdefault(self.names[id(value)], []).append((container, key))

    def tensor(self, base: Tensor) -> Tensor:
        if id(base) not in self.memo:
            if is_lazy(base):
                raise ValueError("a lazy module has not made its parameters yet: run one batch through it first")
            if self.names.get(id(base)) in self.chosen or id(base) not in self.names:
                copy = base.detach().clone().requires_grad_(base.requires_grad) if self.detach else base.clone()
            else:
                copy = base.detach() if self.detach else base
            self.memo[id(base)] = copy
        return self.memo[id(base)]

    def cut_rows(self, base: Growable, state: dict[str, Any]) -> None:
        """Copy the kept experts' rows and no others, so that the cost is theirs."""
        owners = self.kept_experts[id(base)]
        banks = {}
        for name, rows in base._banks.items():
            index = [position for position, row in enumerate(rows) if row.owner in owners]
            if not index:
                continue
            whole = getattr(base, name)
            which = torch.tensor(index, device=whole.device)
            part = whole.index_select(0, which)
            if self.detach:
                part = part.detach().requires_grad_(whole.requires_grad)
            banks[name] = tuple(rows[position] for position in index)
            kind = "_parameters" if name in base._parameters else "_buffers"
            state[kind][name] = part
            label = self.names.get(id(whole))
            if label is not None and label in self.chosen:
                self.places[label] = [(state[kind], name)]
                self.kept[label] = which
        state["_buffers"]["_anchor"] = base.like
        state["_banks"], state["_plans"] = banks, {}

    def note_rows(self, base: GrowableParameter, banks: dict[str, tuple[Row, ...]]) -> None:
        for name, rows in banks.items():
            label = self.names.get(id(getattr(base, name)))
            if label in self.chosen:
                self.rows[label] = rows

    def value(self, value: Any) -> Any:
        """The copy of anything that a module may hold."""
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, Routing):
            return None  # a record of the base's last batch, with its graph
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.module(value.__self__))
        if isinstance(value, functools.partial):
            arguments = [self.value(argument) for argument in value.args]
            keywords = {key: self.value(argument) for key, argument in value.keywords.items()}
            return functools.partial(self.value(value.func), *arguments, **keywords)
        if isinstance(value, list | dict | deque | set | frozenset | tuple | np.ndarray):
            if id(value) not in self.memo:
                self.memo[id(value)] = self.container(value)
            return self.memo[id(value)]
        return value

    def container(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, tuple):
            if any(isinstance(item, Tensor) and self.names.get(id(item)) in self.chosen for item in value):
                raise ValueError("a parameter in a tuple cannot be replaced when it adapts: keep it in a list")
            items = [self.value(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, set | frozenset):
            return type(value)(self.value(item) for item in value)
        copy = self.memo[id(value)] = value.copy()  # noted first: it may contain itself
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            self.put(copy, key, item)
        return copy
