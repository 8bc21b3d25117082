"""Tensors that grow by rows, each row owned by an expert.

Rows added together form a *cohort*: one ordinary tensor whose shape never changes and whose name is never
reused. Frozen rows move into a *frozen bank*, a persistent buffer (one for each row shape), where autograd,
optimizers and regularisers do not see them. All bookkeeping is copied on write, because a module cloned with
``clone_module`` shares its Python attributes with the original.
"""

import json
import math
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

FORMAT_VERSION = 1
BANK_NAME = re.compile(r"c\d+|frozen_[\dx]*")

Book = TypeVar("Book")


class Row(NamedTuple):
    """One row: its own number (never reused, gives the order inside an owner) and the expert that owns it."""

    number: int
    owner: int


@dataclass(frozen=True)
class Init:
    """How new rows are drawn: uniform in +-1/sqrt(fan_in) as ``nn.Linear`` does, normal(0, std), or a constant.

    ``fan_in`` may name a size of the expert, for instance ``"hidden_features"``.
    """

    kind: Literal["uniform", "normal", "constant"]
    fan_in: int | str = 1
    std: float = 0.02
    value: float = 0.0


@dataclass(frozen=True)
class RowSpec:
    """What one kind of row looks like.

    Args:
        shape: of one row; a string names a size that may differ between experts.
        init: how a new row is drawn.
        trainable: True for parameters, False for statistics that no gradient trains.
        count: rows that each new expert gets; 0 where rows are added later (class heads, class densities).
        dtype: None for the default floating type.
    """

    shape: tuple[int | str, ...]
    init: Init = Init("constant")
    trainable: bool = True
    count: int = 1
    dtype: torch.dtype | None = None

    def template(self) -> tuple[int | None, ...]:
        """The row shape with None for each size that may differ."""
        return tuple(None if isinstance(size, str) else size for size in self.shape)

    def draw(self, num_rows: int, sizes: Mapping[str, int], like: Tensor) -> Tensor:
        """Draw (num_rows, *shape) new values with the dtype and device of ``like``."""
        shape = [num_rows, *(sizes[size] if isinstance(size, str) else size for size in self.shape)]
        values = torch.empty(shape, dtype=like.dtype, device=like.device)
        if self.init.kind == "normal":
            return values.normal_(0.0, self.init.std)
        if self.init.kind == "uniform":
            fan_in = sizes[self.init.fan_in] if isinstance(self.init.fan_in, str) else self.init.fan_in
            return values.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        return values.fill_(self.init.value)


class Growable(nn.Module):
    """The bookkeeping that GrowableParameter and GrowableBuffer share; use one of those.

    Args:
        row_shape: shape of one row, None for a size that may differ between cohorts.
        dtype: of the rows; None for torch's default.
    """

    _anchor: Tensor

    def __init__(self, row_shape: Sequence[int | None], dtype: torch.dtype | None = None):
        super().__init__()
        self.row_shape = tuple(row_shape)
        self._banks: dict[str, tuple[Row, ...]] = {}
        self._plans: dict[tuple[int, ...], tuple[tuple[str, ...], tuple[int, ...] | None]] = {}
        self._next_cohort = 0
        self._next_row = 0
        # Holds device and dtype while there are no rows; follows .to().
        self.register_buffer("_anchor", torch.empty(0, dtype=dtype), persistent=False)

    # -- reading -----------------------------------------------------------------------------------

    @property
    def like(self) -> Tensor:
        """An empty tensor with the dtype and device that new rows need."""
        return self._anchor

    @property
    def num_rows(self) -> int:
        return sum(len(rows) for rows in self._banks.values())

    def banks(self) -> list[tuple[Tensor, tuple[Row, ...], bool]]:
        """Every bank as (tensor (R, *row_shape), its rows, frozen or not)."""
        return [(getattr(self, name), rows, is_frozen(name)) for name, rows in self._banks.items()]

    def owner_positions(self, ids: Sequence[int]) -> list[int]:
        """For each row that :meth:`stack` returns: the position of its owner in ``ids``."""
        counts = self.row_counts()
        return [position for position, owner in enumerate(ids) for _ in range(counts.get(owner, 0))]

    def row_counts(self) -> dict[int, int]:
        """Number of rows of each owner."""
        counts: dict[int, int] = {}
        for rows in self._banks.values():
            for row in rows:
                counts[row.owner] = counts.get(row.owner, 0) + 1
        return counts

    def stack(self, ids: Sequence[int]) -> Tensor:
        """The rows of ``ids`` in that order, each owner's rows in the order in which they were added.

        Args:
            ids: expert ids; an expert without rows here contributes none.
        Returns:
            (R, *row_shape). A whole bank is returned as it is, without a copy, where its rows are just these.
        Raises:
            ValueError: if the rows asked for differ in shape.
        """
        names, order = self._plan(tuple(ids))
        if not names:
            if None in self.row_shape:
                raise ValueError(f"no rows for experts {list(ids)}, and their shape {self.row_shape} is open")
            return self._anchor.new_empty((0, *(size or 0 for size in self.row_shape)))
        tensors = [getattr(self, name) for name in names]
        if any(tensor.shape[1:] != tensors[0].shape[1:] for tensor in tensors):
            raise ValueError(f"experts {list(ids)} have rows of different shapes")
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return joined if order is None else joined.index_select(0, torch.tensor(order, device=joined.device))

    def _plan(self, ids: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
        """Which banks hold the rows of ``ids``, and the order of these rows in the joined banks (None: as they are)."""
        if torch.compiler.is_compiling():
            return self._make_plan(ids)  # a cache would be one more thing that the graph is guarded on
        if ids not in self._plans:
            self._plans[ids] = self._make_plan(ids)
        return self._plans[ids]

    def _make_plan(self, ids: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
        rank = {owner: position for position, owner in enumerate(ids)}
        found = sorted(
            (rank[row.owner], row.number, name, index)
            for name, rows in self._banks.items()
            for index, row in enumerate(rows)
            if row.owner in rank
        )
        starts: dict[str, int] = {}
        total = 0
        for _, _, name, _ in found:
            if name not in starts:
                starts[name] = total
                total += len(self._banks[name])
        order = tuple(starts[name] + index for _, _, name, index in found)
        return tuple(starts), None if order == tuple(range(total)) else order

    # -- changing the structure --------------------------------------------------------------------

    def check_rows(self, values: Tensor) -> None:
        """Raise ValueError unless ``values`` is (R, *row_shape)."""
        shape = tuple(values.shape[1:])
        fits = len(shape) == len(self.row_shape) and all(
            want is None or want == got for want, got in zip(self.row_shape, shape, strict=True)
        )
        if values.dim() == 0 or not fits:
            raise ValueError(f"rows of shape {self.row_shape} are needed, got {shape} (None fits any size)")

    @torch.no_grad()
    def add(self, owners: Sequence[int], values: Tensor) -> None:
        """Add one cohort.

        Args:
            owners: the expert id that owns each row.
            values: (len(owners), *row_shape); copied.
        Raises:
            ValueError: on a wrong shape, or where an owner's rows are frozen.
        """
        self.check_rows(values)
        if len(owners) != values.shape[0]:
            raise ValueError(f"{len(owners)} owners for {values.shape[0]} rows")
        frozen = {row.owner for name, rows in self._banks.items() if is_frozen(name) for row in rows}
        if frozen & set(owners):
            raise ValueError(f"experts {sorted(frozen & set(owners))} are frozen: unfreeze them to add rows")
        if owners:
            rows = tuple(Row(self._next_row + index, owner) for index, owner in enumerate(owners))
            self._next_row += len(rows)
            self._add_cohort(values.to(dtype=self._anchor.dtype, device=self._anchor.device), rows)

    def freeze(self, owners: Iterable[int]) -> None:
        """Move the rows of ``owners`` into the frozen bank of their shape; what is left is a new cohort."""
        for values, rows in self._take(set(owners), frozen=False):
            self._extend_frozen(values, rows)

    def unfreeze(self, owners: Iterable[int]) -> None:
        """Move the rows of ``owners`` out of the frozen banks into new cohorts."""
        for values, rows in self._take(set(owners), frozen=True):
            self._add_cohort(values, rows)

    def remove(self, owners: Iterable[int]) -> None:
        """Drop the rows of ``owners``, frozen or not."""
        wanted = set(owners)
        self._take(wanted, frozen=False)
        self._take(wanted, frozen=True)

    def _take(self, owners: set[int], frozen: bool) -> list[tuple[Tensor, tuple[Row, ...]]]:
        """Cut the rows of ``owners`` out of the banks that are (not) frozen, and return them bank by bank."""
        taken = []
        for name, rows in list(self._banks.items()):
            cut = [index for index, row in enumerate(rows) if row.owner in owners]
            if is_frozen(name) != frozen or not cut:
                continue
            tensor = getattr(self, name).detach()
            rest = [index for index, row in enumerate(rows) if row.owner not in owners]
            self._drop(name)
            if rest:
                rest_rows = tuple(rows[index] for index in rest)
                if frozen:
                    self._store_frozen(name, tensor[rest].clone(), rest_rows)
                else:
                    self._add_cohort(tensor[rest], rest_rows)
            taken.append((tensor[cut], tuple(rows[index] for index in cut)))
        return taken

    def _extend_frozen(self, values: Tensor, rows: tuple[Row, ...]) -> None:
        name = "frozen_" + "x".join(str(size) for size in values.shape[1:])
        if name in self._banks:
            values = torch.cat([getattr(self, name), values])
            rows = self._banks[name] + rows
            self._drop(name)
        self._store_frozen(name, values.clone(), rows)

    def _store_frozen(self, name: str, values: Tensor, rows: tuple[Row, ...]) -> None:
        self.register_buffer(name, values)
        self._set_banks({**self._banks, name: rows})

    def _add_cohort(self, values: Tensor, rows: tuple[Row, ...]) -> None:
        name = f"c{self._next_cohort}"
        self._next_cohort += 1
        self._store_cohort(name, values.detach().clone())
        self._set_banks({**self._banks, name: rows})

    def _store_cohort(self, name: str, values: Tensor) -> None:
        raise NotImplementedError

    def _drop(self, name: str) -> None:
        self._set_banks({other: rows for other, rows in self._banks.items() if other != name})
        delattr(self, name)

    def _set_banks(self, banks: dict[str, tuple[Row, ...]]) -> None:
        self._banks = banks
        self._plans = {}

    # -- saving and loading ------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The book as a uint8 tensor of JSON: a state dict then holds tensors only, as safetensors needs."""
        book = {
            "version": FORMAT_VERSION,
            "next_cohort": self._next_cohort,
            "next_row": self._next_row,
            "banks": self._banks,
        }
        return encode_book(book)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to do: ``_load_from_state_dict`` has to read the book before the tensors."""

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if prefix + "_extra_state" in state_dict:
            self._rebuild(self.read_state(state_dict, prefix), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def read_state(self, state_dict: Mapping[str, Tensor], prefix: str) -> "RowBook":
        """The book of this module's part of a state dict, once it is sure that it can be loaded; changes nothing.

        Raises:
            ValueError: on a book that cannot be read, and on banks that are missing or of another shape.
        """
        book = decode_book(state_dict[prefix + "_extra_state"], RowBook.parse)
        for name, rows in book.banks.items():
            if prefix + name not in state_dict:
                raise ValueError(f"the state dict names the bank '{prefix}{name}' but does not hold it")
            self.check_rows(state_dict[prefix + name])
            if state_dict[prefix + name].shape[0] != len(rows):
                raise ValueError(f"the bank '{prefix}{name}' does not have the {len(rows)} rows of its book")
        return book

    def _rebuild(self, book: "RowBook", state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Give this module the banks that ``book`` names, with the shapes in ``state_dict``."""
        banks = book.banks
        self._next_cohort, self._next_row = book.next_cohort, book.next_row
        if banks == self._banks and all(getattr(self, name).shape == state_dict[prefix + name].shape for name in banks):
            return  # the same structure: keep the tensors that an optimizer may hold
        for name in list(self._banks):
            self._drop(name)
        self._forget()
        for name, rows in banks.items():
            values = torch.empty_like(state_dict[prefix + name], dtype=self._anchor.dtype, device=self._anchor.device)
            if is_frozen(name):
                self._store_frozen(name, values, rows)
            else:
                self._store_cohort(name, values)
                self._set_banks({**self._banks, name: rows})

    def _forget(self) -> None:
        """Rows of before a load are none of those after it, whatever their numbers."""


class GrowableParameter(Growable):
    """A trainable tensor (R, *row_shape) of rows with owners.

    Live rows are ``nn.Parameter`` cohorts ``c0, c1, ...``; frozen rows are persistent buffers. A tensor that a
    change of structure retires is remembered for as long as somebody else (an optimizer) still holds it, so
    that :func:`modmoe.sync_optimizer` can carry its state over row by row.
    """

    def __init__(self, row_shape: Sequence[int | None], dtype: torch.dtype | None = None):
        super().__init__(row_shape, dtype)
        self._retired: tuple[tuple[weakref.ref[Tensor], tuple[Row, ...]], ...] = ()

    def live(self) -> list[tuple[Tensor, tuple[Row, ...]]]:
        """The trainable cohorts as (tensor, its rows)."""
        return [(tensor, rows) for tensor, rows, frozen in self.banks() if not frozen]

    def retired(self) -> list[tuple[Tensor, tuple[Row, ...]]]:
        """Former cohorts that somebody still holds, newest first."""
        alive = [(reference(), rows) for reference, rows in reversed(self._retired)]
        return [(tensor, rows) for tensor, rows in alive if tensor is not None]

    def _store_cohort(self, name: str, values: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(values))

    def _drop(self, name: str) -> None:
        if not is_frozen(name):
            record = (weakref.ref(getattr(self, name)), self._banks[name])
            self._retired = (*(entry for entry in self._retired if entry[0]() is not None), record)
        super()._drop(name)

    def _forget(self) -> None:
        self._retired = tuple((reference, ()) for reference, _ in self._retired)

    def __getstate__(self) -> dict:
        # deepcopy and pickle cannot follow a weak reference; deepcopy's memo keeps model and optimizer together.
        return {**self.__dict__, "_retired": tuple(self.retired()[::-1])}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._retired = tuple((weakref.ref(tensor), rows) for tensor, rows in state["_retired"])


class GrowableBuffer(Growable):
    """Rows with owners that no gradient trains: density moments, usage counts. Frozen ones are never written."""

    def _store_cohort(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values)

    @torch.no_grad()
    def write(self, owner: int, values: Tensor) -> None:
        """Overwrite all rows of one live owner.

        Args:
            owner: an expert id.
            values: (its number of rows, *row_shape), in the order in which the rows were added.
        Raises:
            ValueError: if the owner is frozen or has another number of rows.
        """
        self.check_rows(values)
        places = sorted(
            (row.number, name, index)
            for name, rows in self._banks.items()
            for index, row in enumerate(rows)
            if row.owner == owner
        )
        if any(is_frozen(name) for _, name, _ in places):
            raise ValueError(f"expert {owner} is frozen: its statistics are never written")
        if len(places) != values.shape[0]:
            raise ValueError(f"expert {owner} has {len(places)} rows here, got {values.shape[0]}")
        banks = {name: getattr(self, name).clone() for _, name, _ in places}  # a module's clone shares its buffers
        for value, (_, name, index) in zip(values, places, strict=True):
            banks[name][index] = value
        for name, bank in banks.items():
            setattr(self, name, bank)


class RowBook(NamedTuple):
    """The bookkeeping of one growable as a state dict holds it."""

    banks: dict[str, tuple[Row, ...]]
    next_cohort: int
    next_row: int

    @classmethod
    def parse(cls, book: dict) -> "RowBook":
        banks = {name: tuple(Row(*row) for row in rows) for name, rows in book["banks"].items()}
        if not all(BANK_NAME.fullmatch(name) for name in banks):
            raise ValueError(f"unknown names of banks in {sorted(banks)}")
        return cls(banks, int(book["next_cohort"]), int(book["next_row"]))


def encode_book(book: dict) -> Tensor:
    """JSON as a uint8 tensor."""
    return torch.tensor(list(json.dumps(book).encode()), dtype=torch.uint8)


def decode_book(tensor: Tensor, parse: Callable[[dict], Book]) -> Book:
    """The inverse of :func:`encode_book`.

    Args:
        tensor: uint8.
        parse: makes the result out of the JSON object.
    Raises:
        ValueError: if it is not a book, or one of a newer format.
    """
    try:
        book = json.loads(bytes(tensor.tolist()))
        version = int(book["version"])
        if version <= FORMAT_VERSION:
            return parse(book)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError("the state dict's book of rows cannot be read") from error
    raise ValueError(f"the state dict has format {version}, this modmoe reads up to {FORMAT_VERSION}")


def is_frozen(name: str) -> bool:
    return name.startswith("frozen")
