"""The growable pool of experts: the owner of every expert's rows and the book of who is who. Read this first."""

import dataclasses
import math
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from modmoe.experts.base import Expert
from modmoe.growable import (
    FORMAT_VERSION,
    Growable,
    GrowableBuffer,
    GrowableParameter,
    RowSpec,
    decode_book,
    encode_book,
    is_frozen,
)
from modmoe.rows import ExpertRecord, Group, Growth, Preserving, Rows, Task


class ExpertPool(nn.Module):
    """Experts that can be added, frozen, unfrozen and removed, with everything that they own.

    Rows live in namespaces: ``"expert"`` holds the experts' weights; routers and heads declare their own, so that
    a gate row is added, frozen, saved and removed together with its expert.

    Args:
        expert: the expert kind.
        num_experts: how many to start with, at least 1.
        task: the task of these experts, or None for experts that are open to every task.
    Raises:
        ValueError: if num_experts < 1.
    """

    def __init__(self, expert: Expert, num_experts: int = 1, task: Task | None = None):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}: no experts compute nothing")
        self.expert = expert
        self.rows = nn.ModuleDict()
        self._specs: dict[str, dict[str, RowSpec]] = {}
        self._preserving: dict[str, Preserving | None] = {}
        self._book: dict[int, ExpertRecord] = {}
        self._next_id = 0
        self.declare("expert", expert.row_specs(), preserving="tie")
        self.add_experts(num_experts, task=task)

    # -- reading -----------------------------------------------------------------------------------

    @property
    def ids(self) -> tuple[int, ...]:
        """Stable ids in order of addition; never reused. A Routing's expert_index counts positions in this."""
        return tuple(self._book)

    @property
    def frozen_ids(self) -> tuple[int, ...]:
        return tuple(record.id for record in self._book.values() if record.frozen)

    @property
    def num_experts(self) -> int:
        return len(self._book)

    @property
    def like(self) -> Tensor:
        """An empty tensor with the experts' device and dtype."""
        return next(iter(self._growables("expert").values())).like

    @property
    def book(self) -> Mapping[int, ExpertRecord]:
        """Every expert's line by id; another object after each change, so that what is derived from it can be kept."""
        return self._book

    @property
    def namespaces(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def record(self, expert_id: int) -> ExpertRecord:
        """The book's line for one expert."""
        self._check_ids([expert_id])
        return self._book[expert_id]

    def specs(self, namespace: str) -> dict[str, RowSpec]:
        """What the rows of a namespace look like, by name."""
        self._growables(namespace)
        return self._specs[namespace]

    def tasks(self) -> tuple[Task | None, ...]:
        """The task of each expert, in the order of ``ids``."""
        return tuple(record.task for record in self._book.values())

    def namespace(self, namespace: str, ids: Sequence[int] | None = None) -> Rows:
        """The rows of one namespace, of the experts ``ids``; None for all, in pool order."""
        if ids is not None:
            self._check_ids(ids)
        return Rows(self._growables(namespace), self.ids if ids is None else ids)

    def expert_state(self, expert_id: int) -> dict[str, Tensor]:
        """Every row that the expert owns, in all namespaces, as copies.

        Returns:
            ``"namespace.name"`` -> (number of its rows, ...).
        """
        self._check_ids([expert_id])
        return {
            f"{namespace}.{name}": growable.stack([expert_id]).detach().clone()
            for namespace in self.namespaces
            for name, growable in self._growables(namespace).items()
            if expert_id in growable.row_counts()
        }

    def growable(self, namespace: str, name: str) -> Growable:
        """One kind of row, with its bookkeeping."""
        growables = self._growables(namespace)
        if name not in growables:
            raise ValueError(f"no rows '{name}' in '{namespace}', it has {sorted(growables)}")
        return growables[name]

    def groups(self) -> list[Group]:
        """The experts as kernel-ready groups; live cohorts of equal sizes are joined, frozen banks used in place."""
        return self._grouped(lambda bank, record: tuple(sorted(record.sizes.items())))

    def banks(self) -> list[Group]:
        """The experts as groups whose tensors are the parameters and buffers themselves: no copy, more groups.

        The one exception: frozen experts of unequal sizes share a bank of the rows that have equal shapes, of which
        their groups hold copies.
        """
        return self._grouped(lambda bank, record: bank)

    def _grouped(self, key: Callable[[int, ExpertRecord], Hashable]) -> list[Group]:
        """Groups of the experts with equal keys, given the number of an expert's bank and its line in the book."""
        growables = self._growables("expert")
        banks = {name: growable.banks() for name, growable in growables.items()}
        _, rows, frozen = next(iter(banks.values()))[0]
        one_bank = all(len(of_name) == 1 for of_name in banks.values())
        if one_bank and tuple(row.owner for row in rows) == self.ids:  # nothing to look up
            tensors = {name: of_name[0][0] for name, of_name in banks.items()}
            return [Group(self.ids, tuple(range(len(rows))), frozen, tensors)]
        largest = max(banks.values(), key=len)  # the most finely divided
        members: dict[tuple[Hashable, bool], list[int]] = {}
        for number, (_, rows, frozen) in enumerate(largest):
            for row in rows:
                members.setdefault((key(number, self._book[row.owner]), frozen), []).append(row.owner)
        position = {expert_id: index for index, expert_id in enumerate(self.ids)}
        return [
            Group(
                ids=tuple(ids),
                positions=tuple(position[expert_id] for expert_id in ids),
                frozen=frozen,
                tensors={name: growable.stack(ids) for name, growable in growables.items()},
            )
            for (_, frozen), ids in members.items()
        ]

    # -- namespaces --------------------------------------------------------------------------------

    def declare(self, namespace: str, specs: dict[str, RowSpec], preserving: Preserving | None = None) -> None:
        """Open a namespace of rows, and give every expert its rows there.

        Args:
            namespace: an identifier, for instance ``"gate"``.
            specs: what the rows look like, by name.
            preserving: how a copied expert's rows keep the layer's function: "tie" copies them, "split" also lowers
                the row ``"bias"`` of the source and of the copy by log 2; "zero" draws new rows, for an expert whose
                output is 0 at first; None where no way is known.
        Raises:
            ValueError: if the namespace exists.
        """
        if namespace in self._specs:
            raise ValueError(f"the pool has a namespace '{namespace}' already: {self.namespaces}")
        growables: dict[str, nn.Module] = {
            name: (GrowableParameter if spec.trainable else GrowableBuffer)(spec.template(), spec.dtype)
            for name, spec in specs.items()
        }
        if "expert" in self._specs:
            like = next(iter(self._growables("expert").values())).like
            for growable in growables.values():
                growable.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)
        self.rows[namespace] = nn.ModuleDict(growables)
        self._specs = {**self._specs, namespace: specs}
        self._preserving = {**self._preserving, namespace: preserving}
        for ids in self._cohorts():
            sizes = self._book[ids[0]].sizes
            for name, growable in self._growables(namespace).items():
                owners = [expert_id for expert_id in ids for _ in range(specs[name].count)]
                growable.add(owners, specs[name].draw(len(owners), sizes, growable.like))
        self._growables_freeze(namespace, self.frozen_ids)
        _allow_new_graphs()

    def set_preserving(self, namespace: str, preserving: Preserving | None) -> None:
        """Say anew how growth keeps the function, where a router's settings have changed; see :meth:`declare`."""
        self._growables(namespace)
        self._preserving = {**self._preserving, namespace: preserving}

    def _cohorts(self) -> list[list[int]]:
        """The ids of each bank of experts: rows declared later split along the same lines."""
        if "expert" not in self._specs or not self._book:
            return []
        first = next(iter(self._growables("expert").values()))
        return [[row.owner for row in rows] for _, rows, _ in first.banks()]

    def add_rows(self, namespace: str, expert_id: int, values: Mapping[str, Tensor]) -> None:
        """Give one live expert more rows in a namespace, as one cohort for each name.

        Args:
            namespace: a declared namespace.
            expert_id: the owner.
            values: row name -> (R, ...); every name of the namespace, with the same R.
        Raises:
            ValueError: on a frozen owner, a missing name or a wrong shape; nothing is changed then.
        """
        self._check_ids([expert_id])
        if namespace == "expert":
            raise ValueError("an expert has one row of each weight: add experts instead")
        growables = self._growables(namespace)
        if set(values) != set(growables):
            raise ValueError(f"'{namespace}' needs rows {sorted(growables)}, got {sorted(values)}")
        if self._book[expert_id].frozen:
            raise ValueError(f"expert {expert_id} is frozen: unfreeze it to add rows")
        counts = {tensor.shape[0] if tensor.dim() else 0 for tensor in values.values()}
        if len(counts) != 1:
            raise ValueError(f"every name needs the same number of rows, got {sorted(counts)}")
        for name, tensor in values.items():
            growables[name].check_rows(tensor)
        for name, tensor in values.items():
            growables[name].add([expert_id] * tensor.shape[0], tensor)
        _allow_new_graphs()

    # -- growing -----------------------------------------------------------------------------------

    @torch.no_grad()
    def add_experts(
        self,
        n: int = 1,
        init: Growth = "fresh",
        task: Task | None = None,
        source: int | None = None,
        **sizes: int,
    ) -> list[int]:
        """Add experts as one cohort.

        Args:
            n: how many, at least 1.
            init: "fresh" draws new rows. The others change no output, which works where every router on this pool says
                so (``Router.preserving_growth``): "copy" repeats one live expert, "zero" draws new rows but for those
                that the expert's output is multiplied by.
            task: the new experts' task, or None; copies belong to their source's.
            source: the expert to copy; None for the newest live one.
            sizes: sizes that differ from the expert kind's, for instance ``hidden_features=64``.
        Returns:
            The new stable ids.
        Raises:
            ValueError: on n < 1, an unknown size, a frozen or unknown source, or a router for which a copy (or an
                expert without output) would change the layer's function. Nothing is changed then.
        """
        merged, source = self.check_growth(n, init, task, source, **sizes)
        new_ids = list(range(self._next_id, self._next_id + n))
        drawn: list[tuple[Growable, list[int], Tensor]] = []  # all of it before the first change
        for namespace, specs in self._specs.items():
            for name, growable in self._growables(namespace).items():
                if init == "copy":
                    rows = growable.stack([cast(int, source)]) if growable.num_rows else growable.like
                    count, values = rows.shape[0], rows.repeat(n, *([1] * (rows.dim() - 1)))
                else:
                    count = specs[name].count
                    values = specs[name].draw(n * count, merged, growable.like) if count else growable.like
                    if init == "zero" and namespace == "expert" and name in self.expert.output_rows:
                        values = torch.zeros_like(values)
                if count:
                    drawn.append((growable, [expert_id for expert_id in new_ids for _ in range(count)], values))
        for growable, owners, values in drawn:
            growable.add(owners, values)
        if init == "copy":
            self._split(cast(int, source), new_ids)
            task = self._book[cast(int, source)].task
        self._next_id += n
        self._set_book({**self._book, **{i: ExpertRecord(i, task, False, dict(merged)) for i in new_ids}})
        return new_ids

    def check_growth(
        self,
        n: int = 1,
        init: Growth = "fresh",
        task: Task | None = None,
        source: int | None = None,
        **sizes: int,
    ) -> tuple[dict[str, int], int | None]:
        """Raise the ValueError that :meth:`add_experts` would; returns the new experts' sizes and the source."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if task is not None and not isinstance(task, Task):
            raise ValueError(f"a task is a str, an int or None, got {type(task).__name__}")
        merged = self.expert.sizes()
        for name, size in sizes.items():
            if name not in merged:
                raise ValueError(f"unknown size '{name}', {self.expert} has {sorted(merged)}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        merged.update(sizes)
        if init == "copy":
            if sizes:
                raise ValueError("init='copy' takes the sizes of its source, give none")
            source = self._copy_source(source)
            if task not in (None, self._book[source].task):
                raise ValueError(
                    f"init='copy' keeps the layer's function only within the source's task {self._book[source].task!r}"
                )
            merged = dict(self._book[source].sizes)
        elif init not in ("fresh", "zero") or source is not None:
            raise ValueError(
                f"init is 'fresh', 'zero' or 'copy' (which may name a source), got init={init!r}, source={source!r}"
            )
        elif init == "zero":
            if not self.expert.output_rows:
                raise ValueError(f"init='zero' does not know which rows give {self.expert} its output")
            self._check_preserving("zero", ("zero",), "a ReLU gate does")
        return merged, source

    def _copy_source(self, source: int | None) -> int:
        if source is None:
            live = [expert_id for expert_id in self.ids if not self._book[expert_id].frozen]
            if not live:
                raise ValueError("init='copy' needs a live source, and every expert is frozen")
            source = live[-1]
        self._check_ids([source])
        if self._book[source].frozen:
            raise ValueError(f"init='copy' would have to change expert {source}, which is frozen")
        self._check_preserving("copy", ("split", "tie"), "a dense gate and a renormalised top-1 do")
        return source

    def _check_preserving(self, init: Growth, ways: tuple[Preserving, ...], known: str) -> None:
        others = {namespace: how for namespace, how in self._preserving.items() if namespace != "expert"}
        unable = [namespace for namespace, how in others.items() if how not in ways]
        if unable:
            raise ValueError(
                f"init='{init}' cannot keep the layer's function: the rows of {unable} know no such growth "
                f"({known}); use init='fresh'"
            )

    def _split(self, source: int, new_ids: list[int]) -> None:
        """Share the source's softmax mass: n + 1 equal logits, each lowered by log(n + 1), add up to the old one."""
        shift = math.log(len(new_ids) + 1)
        for namespace, how in self._preserving.items():
            if how == "split":
                growable = cast(GrowableParameter, self._growables(namespace)["bias"])
                for tensor, rows in growable.live():
                    for index, row in enumerate(rows):
                        if row.owner == source or row.owner in new_ids:
                            tensor[index] -= shift

    def assign_task(self, expert_id: int, task: Task | None) -> None:
        """Write an expert's task into the book."""
        record = self.record(expert_id)
        self._set_book({**self._book, expert_id: dataclasses.replace(record, task=task)})

    def freeze(self, ids: Sequence[int] | None = None) -> None:
        """Freeze experts with all rows that they own; None means all. Frozen ones may be named again.

        Their rows are bit-identical from now on, whatever optimizer runs. Call :func:`modmoe.sync_optimizer` after.
        """
        wanted = self._set_frozen(self.ids if ids is None else ids, True)
        for namespace in self.namespaces:
            self._growables_freeze(namespace, wanted)

    def unfreeze(self, ids: Sequence[int]) -> None:
        """Make experts trainable again; each frozen bank's share becomes a new cohort."""
        wanted = self._set_frozen(ids, False)
        for namespace in self.namespaces:
            for growable in self._growables(namespace).values():
                growable.unfreeze(wanted)

    def remove(self, ids: Sequence[int]) -> None:
        """Remove experts with all rows that they own. Ids are not used again.

        Raises:
            ValueError: on an unknown id, or if no expert would be left; nothing is changed then.
        """
        self.check_removal(ids)
        for namespace in self.namespaces:
            for growable in self._growables(namespace).values():
                growable.remove(ids)
        self._set_book({expert_id: record for expert_id, record in self._book.items() if expert_id not in set(ids)})

    def check_removal(self, ids: Sequence[int]) -> None:
        """Raise the ValueError that :meth:`remove` would."""
        self._check_ids(ids)
        if set(ids) >= set(self.ids):
            raise ValueError("a pool keeps at least one expert: these are all it has")

    def _set_frozen(self, ids: Sequence[int], frozen: bool) -> list[int]:
        self._check_ids(ids)
        changed = [expert_id for expert_id in dict.fromkeys(ids) if self._book[expert_id].frozen != frozen]
        self._set_book(
            {
                expert_id: dataclasses.replace(record, frozen=frozen) if expert_id in changed else record
                for expert_id, record in self._book.items()
            }
        )
        return changed

    def _growables_freeze(self, namespace: str, ids: Sequence[int]) -> None:
        for growable in self._growables(namespace).values():
            growable.freeze(ids)

    def _growables(self, namespace: str) -> dict[str, Growable]:
        if namespace not in self.rows:
            raise ValueError(f"no namespace '{namespace}', the pool has {self.namespaces}")
        return cast(dict[str, Growable], dict(cast(nn.ModuleDict, self.rows[namespace]).items()))

    def _set_book(self, book: dict[int, ExpertRecord]) -> None:
        self._book = book
        _allow_new_graphs()

    def _check_ids(self, ids: Sequence[int]) -> None:
        unknown = [expert_id for expert_id in ids if expert_id not in self._book]
        if unknown:
            raise ValueError(f"no experts with ids {unknown}, the pool has {list(self.ids)}")

    # -- saving and loading ------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The book as a uint8 tensor of JSON."""
        experts = [dataclasses.asdict(record) for record in self._book.values()]
        return encode_book({"version": FORMAT_VERSION, "next_id": self._next_id, "experts": experts})

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the book of a state dict; the rows rebuild themselves from theirs."""
        book, self._next_id = decode_book(state, _parse_book)
        self._set_book(book)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        self._check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_state(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Raise ValueError if a state dict does not fit this pool, before its first part is loaded."""
        start, end = f"{prefix}rows.", "._extra_state"
        stored = sorted(k[len(start) : -len(end)] for k in state_dict if k.startswith(start) and k.endswith(end))
        if prefix + "_extra_state" not in state_dict:
            if stored:
                raise ValueError(f"the state dict has rows {stored} but no book '{prefix}_extra_state'")
            return  # nothing of this pool: a missing key, which load_state_dict reports
        book, _ = decode_book(state_dict[prefix + "_extra_state"], _parse_book)
        growables = {
            f"{namespace}.{name}": growable
            for namespace in self.namespaces
            for name, growable in self._growables(namespace).items()
        }
        if stored != sorted(growables):
            raise ValueError(f"the state dict has the rows {stored}, this pool has {sorted(growables)}")
        for name, growable in growables.items():
            owners: list[int] = []
            for bank, rows in growable.read_state(state_dict, f"{start}{name}.").banks.items():
                owners += [row.owner for row in rows]
                if any(row.owner not in book or book[row.owner].frozen != is_frozen(bank) for row in rows):
                    raise ValueError(f"the owners of '{prefix}rows.{name}.{bank}' do not agree with the pool's book")
            if name.startswith("expert.") and sorted(owners) != sorted(book):
                raise ValueError(f"experts {sorted(book)} need one row each in '{name}', they have {sorted(owners)}")

    def extra_repr(self) -> str:
        return f"{self.expert}, num_experts={self.num_experts}, frozen={len(self.frozen_ids)}"


def _parse_book(book: dict) -> tuple[dict[int, ExpertRecord], int]:
    """The records by id, and the next id."""
    records = {record["id"]: ExpertRecord(**record) for record in book["experts"]}
    if not records:
        raise ValueError("a pool keeps at least one expert")
    return records, int(book["next_id"])


def _allow_new_graphs() -> None:
    """Let torch.compile trace again: a new structure needs a graph with gradients and one without.

    Dynamo counts the graphs of former structures towards its limit (8 by default), also when they are dead; without
    this, a pool that grows often would silently run uncompiled.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:  # loaded only once something was compiled
        dynamo.config.recompile_limit += 2
