"""Measured times of the backends, and which of them speaks for a call at hand."""

import json
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from modmoe.errors import TableError

VERSION = 1
VARIABLE = "MODMOE_TABLE"


class Work(NamedTuple):
    """The size of one call.

    Args:
        tokens: T.
        top_k: assignments of each token, on average.
        experts: E.
        weights: numbers in the matrices of one expert: multiplications for one assignment.
        training: whether a backward pass follows.
    """

    tokens: int
    top_k: float
    experts: int
    weights: int
    training: bool

    def distance(self, other: "Work") -> float:
        """By how many doublings the two differ, in all sizes together."""
        pairs = zip(self[:4], other[:4], strict=True)
        return sum(abs(math.log2(max(a, 0.5) / max(b, 0.5))) for a, b in pairs)

    def __str__(self) -> str:
        doing = "forward and backward" if self.training else "forward"
        sizes = f"{self.tokens} tokens, top-{self.top_k:g} of {self.experts} experts of {self.weights} weights"
        return f"{sizes}, {doing}"


@dataclass(frozen=True)
class Measurement:
    """Seconds that each backend took for one kind of call.

    Args:
        device: "cpu", or the name of a GPU.
        dtype: for instance "float32".
        work: the call's size.
        seconds: backend -> seconds.
    """

    device: str
    dtype: str
    work: Work
    seconds: dict[str, float]


@dataclass(frozen=True)
class Table:
    """What was measured on one machine.

    Args:
        measurements: in any order.
        source: where it comes from, for explanations.
    """

    measurements: tuple[Measurement, ...]
    source: str

    __hash__ = object.__hash__  # a key of caches: each table is one

    def nearest(self, device: str, dtype: str, work: Work) -> Measurement | None:
        """The measurement of the same device, dtype and mode whose sizes are closest; None if there is none."""
        alike = [m for m in self.measurements if (m.device, m.dtype, m.work.training) == (device, dtype, work.training)]
        return min(alike, key=lambda m: m.work.distance(work), default=None)

    def ranking(self, device: str, dtype: str, work: Work, candidates: Collection[str]) -> Sequence[tuple[str, float]]:
        """(backend, seconds) of the nearest measurement, the fastest first; empty if there is none."""
        found = self.nearest(device, dtype, work)
        measured = {} if found is None else {name: s for name, s in found.seconds.items() if name in candidates}
        return sorted(measured.items(), key=lambda item: item[1])

    def save(self, path: Path) -> None:
        """Write it as JSON, folders included."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**asdict(m), "work": m.work._asdict()} for m in self.measurements]
        path.write_text(json.dumps({"version": VERSION, "measurements": rows}, indent=1) + "\n", encoding="utf-8")


def read_table(path: Path, source: str | None = None) -> Table:
    """Read what :meth:`Table.save` wrote.

    Raises:
        TableError: if the file cannot be read, or is no such table.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, this one reads {VERSION}")
        rows = [Measurement(**{**row, "work": Work(**row["work"])}) for row in content["measurements"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TableError(f"{path} is no table of `modmoe tune`: {error}") from error
    return Table(tuple(rows), source or str(path))


def user_path() -> Path:
    """Where ``modmoe tune`` keeps its result: $MODMOE_TABLE, or a file in the user's cache folder."""
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "modmoe" / "table.json"


@lru_cache(maxsize=1)
def current_table() -> Table:
    """The user's own table if there is one, else the one that comes with modmoe; read once."""
    own = user_path()
    if own.exists():
        return read_table(own, "this machine's own table (`modmoe tune`)")
    return read_table(Path(str(files("modmoe.kernels") / "table.json")), "the table that comes with modmoe")
