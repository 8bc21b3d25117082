"""What a wrapper keeps for every parameter of its module, row by row: learning rates and transforms."""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from modmoe.growable import Growable, GrowableParameter, Row, is_frozen


def growable_parameters(module: nn.Module) -> dict[str, GrowableParameter]:
    """Every kind of trainable row by its path."""
    return {path: part for path, part in module.named_modules() if isinstance(part, GrowableParameter)}


def plain_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters that are no rows of a pool."""
    rows = {id(tensor) for growable in growable_parameters(module).values() for tensor, _ in growable.live()}
    return ((name, parameter) for name, parameter in module.named_parameters() if id(parameter) not in rows)


class Rates(nn.Module):
    """A learning rate for each scalar of a module; rows of rates follow their experts.

    Rates of a pool's rows are a GrowableParameter with the same banks and row numbers, so that ``sync_optimizer``
    carries their moments as it carries the rows' own.
    """

    def __init__(self, module: nn.Module, lr: float):
        super().__init__()
        self.lr = lr
        self.plain = nn.ParameterDict()
        self.grown = nn.ModuleDict()
        self.sync(module)

    @torch.no_grad()
    def sync(self, module: nn.Module) -> None:
        """Take over the structure of the module: rates of what stays are kept, new ones start at ``lr``."""
        plain = {key(name): parameter for name, parameter in plain_parameters(module)}
        for name in [name for name in self.plain if name not in plain]:
            del self.plain[name]
        for name, parameter in plain.items():
            if name not in self.plain or self.plain[name].shape != parameter.shape:
                self.plain[name] = nn.Parameter(torch.full_like(parameter, self.lr))
        growables = {key(path): growable for path, growable in growable_parameters(module).items()}
        for path in [path for path in self.grown if path not in growables]:
            del self.grown[path]
        for path, growable in growables.items():
            if path not in self.grown:
                mirror = GrowableParameter(growable.row_shape, growable.like.dtype)
                self.grown[path] = mirror.to(growable.like.device)
            _follow(growable, cast(GrowableParameter, self.grown[path]), self.lr)

    def of(self, name: str) -> Tensor:
        """The rates of a parameter, shaped like it."""
        if key(name) in self.plain:
            return self.plain[key(name)]
        path, _, bank = name.rpartition(".")
        return getattr(self.grown[key(path)], bank)


def _follow(source: Growable, mirror: GrowableParameter, fill: float) -> None:
    """Give a mirror the banks of its source, under the same names and row numbers."""
    known = {row.number: tensor[i].detach().clone() for tensor, rows, _ in mirror.banks() for i, row in enumerate(rows)}
    for name in [name for name, rows in mirror._banks.items() if source._banks.get(name) != rows]:
        mirror._drop(name)
    for name, rows in source._banks.items():
        if name in mirror._banks:
            continue
        values = torch.full_like(getattr(source, name).detach(), fill)
        for index, row in enumerate(rows):
            if row.number in known:
                values[index] = known[row.number]
        if is_frozen(name):
            mirror.register_buffer(name, values)
        else:
            mirror._store_cohort(name, values)
    # in the source's order, which is that of its parameters
    mirror._set_banks({name: mirror._banks.get(name, rows) for name, rows in source._banks.items()})
    mirror._next_cohort, mirror._next_row = source._next_cohort, source._next_row


class Transforms(nn.Module):
    """A transform of the gradient for each parameter of a module, and for each row of its pools.

    Args:
        module: what adapts.
        make: parameter or row -> a module that maps gradients to updates, or None for the gradient itself; as the
            ``transform`` of learn2learn's GBML, which is given whole parameters only.
    """

    def __init__(self, module: nn.Module, make: Callable[[Tensor], nn.Module | None]):
        super().__init__()
        self.make = make
        self.transforms = nn.ModuleDict()
        self._none: frozenset[str] = frozenset()
        self.sync(module)

    def sync(self, module: nn.Module) -> None:
        """New parameters and rows get transforms, those of removed ones go, those of frozen ones do not train."""
        wanted = {
            key(name): (parameter.detach(), parameter.requires_grad) for name, parameter in plain_parameters(module)
        }
        for path, growable in growable_parameters(module).items():
            for tensor, rows, frozen in growable.banks():
                for index, row in enumerate(rows):
                    wanted[row_key(path, row)] = (tensor[index].detach(), not frozen)
        for name in [name for name in self.transforms if name not in wanted]:
            del self.transforms[name]
        none = self._none & set(wanted)
        for name, (values, _) in wanted.items():
            if name not in self.transforms and name not in none:
                transform = self.make(nn.Parameter(values.clone()))
                if transform is None:
                    none |= {name}
                else:
                    self.transforms[name] = transform.to(values.device, values.dtype)
        self._none = none
        for name, (_, trains) in wanted.items():
            if name in self.transforms:
                self.transforms[name].requires_grad_(trains)

    def keys_of(self, name: str, rows: tuple[Row, ...] | None) -> list[str]:
        """The names of a parameter's transforms: one, or one for each row."""
        if rows is None:
            return [key(name)]
        return [row_key(name.rpartition(".")[0], row) for row in rows]

    def update(self, name: str, rows: tuple[Row, ...] | None, gradient: Tensor) -> Tensor:
        """The update for a gradient of a parameter with these rows (None: one that is no pool's)."""
        keys = self.keys_of(name, rows)
        if rows is None:
            return self._apply_to(keys[0], gradient)
        return torch.stack([self._apply_to(one, gradient[index]) for index, one in enumerate(keys)])

    def _apply_to(self, name: str, gradient: Tensor) -> Tensor:
        return self.transforms[name](gradient) if name in self.transforms else gradient


def key(name: str) -> str:
    """A name that a ModuleDict takes."""
    return "of/" + name.replace(".", "/")  # the prefix keeps it from being a method's name


def row_key(path: str, row: Row) -> str:
    return f"{key(path)}/row{row.number}"
