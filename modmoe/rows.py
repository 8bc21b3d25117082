"""What a pool hands out: the book's lines, the rows of a namespace, and experts that a kernel can batch."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modmoe.growable import Growable

Task = str | int
Preserving = Literal["split", "tie", "zero"]
Growth = Literal["fresh", "copy", "zero"]


@dataclass(frozen=True)
class ExpertRecord:
    """The book's line for one expert: stable id, task or None, frozen or not, its own sizes."""

    id: int
    task: Task | None
    frozen: bool
    sizes: dict[str, int]


@dataclass(frozen=True)
class Group:
    """Experts that a kernel can batch: equal sizes, all frozen or all live.

    Args:
        ids: their ids, in the order of the tensors' first axis.
        positions: their positions in ``pool.ids``.
        frozen: whether the tensors need no gradient.
        tensors: row name -> (len(ids), ...).
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    frozen: bool
    tensors: dict[str, Tensor]

    def to(self, dtype: torch.dtype) -> "Group":
        """The same group with its tensors in another dtype; gradients flow back."""
        if all(tensor.dtype == dtype for tensor in self.tensors.values()):
            return self
        return dataclasses.replace(self, tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})


class Rows(Mapping[str, Tensor]):
    """The rows of one namespace in pool order: ``rows["weight"]`` is (R, ...), stacked when it is read."""

    def __init__(self, growables: Mapping[str, Growable], ids: Sequence[int]):
        self._growables = growables
        self.ids = tuple(ids)

    def __getitem__(self, name: str) -> Tensor:
        return self._growables[name].stack(self.ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._growables)

    def __len__(self) -> int:
        return len(self._growables)

    def owner(self, name: str) -> Tensor:
        """(R,) int64: the position in ``ids`` of each row's owner."""
        growable = self._growables[name]
        return torch.tensor(growable.owner_positions(self.ids), dtype=torch.int64, device=growable.like.device)
