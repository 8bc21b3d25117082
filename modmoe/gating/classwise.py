"""Gates with a row for each class that an expert has observed, and such a gate inside another one."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from modmoe.gating.base import at_least_float32
from modmoe.gating.fitted import FittedRouter, sum_by_owner
from modmoe.growable import RowSpec
from modmoe.rows import Rows

SINGLE_CLASS = -1  # the label of an expert's only row where classes are not told apart
DENSITY = "density_"  # before the names of a density's rows that live beside another gate's


class ClasswiseRouter(FittedRouter):
    """One row for each class that an expert has observed, fitted to that class's samples alone.

    score(expert e) = log sum_c (n_c / n_e) exp(s_c(x)) over the classes c of e, where s_c is the class's own score
    (a raw log-likelihood, or minus a squared distance).

    Args:
        in_features: D.
        per_class: one row for each class; False for one row for each expert.
        top_k: see FittedRouter.
    """

    def __init__(self, in_features: int, per_class: bool = True, top_k: int = 1):
        super().__init__(in_features, top_k)
        self.per_class = per_class

    def row_specs(self) -> dict[str, RowSpec]:
        return {
            "label": RowSpec((), trainable=False, count=0, dtype=torch.int64),
            "count": RowSpec((), trainable=False, count=0),
        }

    @abstractmethod
    def class_score(self, x: Tensor, rows: Rows) -> Tensor:
        """(T, R) raw score of each row's class."""

    @abstractmethod
    def fit_class(self, old: dict[str, Tensor] | None, x: Tensor, label: int) -> dict[str, Tensor]:
        """One class's row (without a leading axis; no "label") after the inputs x (n, D).

        ``old`` is what it was, None for a class that is new, as it always is where the gate is not ``streaming``.
        """

    def merged_class(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        """One class's row (no leading axis, no "label") after what two experts observed of it; see ``mergeable``."""
        label = int(first["label"])
        raise ValueError(
            f"{type(self).__name__} cannot combine two fits "
            + ("of whole experts" if label == SINGLE_CLASS else f"of class {label}")
            + ": only the samples of both would tell what a fit to all of them is"
        )

    def merged_rows(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        return join_rows(first, second, self.merged_class)

    def class_log_joint(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """log n_c + s_c(x) of shape (T, R), and the labels (R,); see FittedRouter."""
        x = at_least_float32(x)
        return self.class_score(x, rows) + at_least_float32(rows["count"]).log(), rows["label"]

    def score(self, x: Tensor, rows: Rows) -> Tensor:
        x = at_least_float32(x)
        owner = rows.owner("label")
        count = at_least_float32(rows["count"])
        total = count.new_zeros(len(rows.ids)).index_add(0, owner, count)
        return sum_by_owner(self.class_score(x, rows) + (count / total[owner]).log(), owner, len(rows.ids), x)

    def observed_labels(self, x: Tensor, labels: Tensor | None) -> Tensor:
        if not self.per_class:
            return torch.full(x.shape[:1], SINGLE_CLASS, device=x.device)
        return super().observed_labels(x, labels)

    def updated_rows(self, old: dict[str, Tensor], x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        known: list[int] = old["label"].tolist()
        rows: list[dict[str, Tensor]] = [
            {name: tensor[index] for name, tensor in old.items()} for index in range(len(known))
        ]
        for label in labels.unique().tolist():
            before = rows[known.index(label)] if label in known else None
            values = self.fit_class(before, x[labels == label], label)
            row = {"label": torch.tensor(label), **values}
            if before is None:
                rows.append(row)
            else:
                rows[known.index(label)] = row
        return {
            name: torch.stack([row[name].to(dtype=like.dtype, device=like.device) for row in rows])
            for name, like in old.items()
        }


class DensityRouter(ClasswiseRouter):
    """A ClasswiseRouter whose class score is the log of a normalised density, which can be drawn from."""

    @abstractmethod
    def sample(self, row: Mapping[str, Tensor], n: int, generator: torch.Generator) -> Tensor:
        """Draw from one class's density, exactly as it is scored.

        Args:
            row: the class's row, without a leading axis.
            n: how many.
            generator: on the CPU.
        Returns:
            (n, D).
        """


def join_rows(
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    combine: Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The rows (R, ...) of two experts by "label": the first's in their order, then those that only the second has.

    ``combine`` makes one row (no leading axis, no "label") of the two of a label that both have.
    """
    known, labels = first["label"].tolist(), second["label"].tolist()
    fresh = [index for index, label in enumerate(labels) if label not in known]
    joined = {name: torch.cat([tensor, second[name][fresh]]) for name, tensor in first.items()}
    for index, label in enumerate(labels):
        if label in known:
            place = known.index(label)
            mine = {name: tensor[place] for name, tensor in first.items()}
            theirs = {name: tensor[index] for name, tensor in second.items()}
            for name, value in combine(mine, theirs).items():
                joined[name][place] = value
    return joined


class PartOfRows(Rows):
    """The rows of a namespace whose names start with a prefix, under the names without it."""

    def __init__(self, rows: Rows, prefix: str):
        self.ids = rows.ids
        self._rows = rows
        self._prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._rows[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._rows if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def owner(self, name: str) -> Tensor:
        return self._rows.owner(self._prefix + name)
