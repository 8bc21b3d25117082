"""What ``backend="auto"`` takes, and why."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from modmoe.experts.base import Expert
from modmoe.kernels.table import Table, Work, current_table
from modmoe.kernels.triton import supports, usable
from modmoe.routing import Routing

# Where nothing was measured: below these, computing everything beats moving tokens.
DENSE_MAX_EXPERTS = 4
DENSE_MAX_TOKENS = 64


class Choice(NamedTuple):
    """A backend, and why it was taken.

    Args:
        backend: its name.
        why: where nothing was measured.
        seconds: (backend, seconds) of the nearest measurement, the fastest first.
        source: of that measurement.
    """

    backend: str
    why: str = ""
    seconds: Sequence[tuple[str, float]] = ()
    source: str = ""

    @property
    def reason(self) -> str:
        """The why in words."""
        if not self.seconds:
            return self.why
        times = dict(self.seconds)
        others = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in self.seconds if name != self.backend)
        return f"{1e3 * times[self.backend]:.3g} ms where {self.source} ({others})"

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


def choose_backend(expert: Expert, num_experts: int, x: Tensor, routing: Routing) -> Choice:
    """What ``auto`` takes for a whole layer.

    In eager mode on the CPU it is the fastest in the nearest measurement of the table, where a batched product counts
    as longer by the factor that the largest load is above the mean. Elsewhere it depends on kind and sizes only, so
    that a compiled choice is static and nobody waits for a GPU.

    Args:
        expert: the kind.
        num_experts: E.
        x: (T, D) tokens.
        routing: flat triples.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or expert.one_by_one_on_cpu:
        return default_backend(expert, num_experts, len(x), x.dtype, x.device)
    # the fused backend looks at the loads itself, and pads where that pays
    candidates = ("dense", "fused") if expert.two_layers() is not None else ("dense", "bmm", "grouped")
    training = torch.is_grad_enabled()
    work = Work(len(x), len(routing.token_index) / max(len(x), 1), num_experts, weights_of(expert), training)
    ranking, source = _ranking(current_table(), "cpu", str(x.dtype).removeprefix("torch."), _rounded(work), candidates)
    if not ranking:
        return default_backend(expert, num_experts, len(x), x.dtype, x.device)
    for place, (name, seconds) in enumerate(ranking):
        if name == "bmm" and place + 1 < len(ranking):
            load = routing.load  # measured with even loads; all experts wait for the largest
            imbalance = float(load.max() / load.double().mean().clamp(min=1e-9))
            if seconds * imbalance > ranking[place + 1][1]:
                continue
        return Choice(name, seconds=ranking, source=source)
    raise AssertionError("the last candidate is taken")


def default_backend(
    expert: Expert, num_experts: int, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> Choice:
    """What is taken where nothing was measured, by kind and sizes only."""
    compiling = torch.compiler.is_compiling()
    on_cpu = device.type == "cpu"
    if on_cpu and not compiling and expert.one_by_one_on_cpu:
        return Choice("reference", why="the CPU computes such experts faster one after the other")
    if on_cpu and num_experts <= DENSE_MAX_EXPERTS and num_tokens <= DENSE_MAX_TOKENS and dtype != torch.float64:
        return Choice("dense", why="few experts and few tokens: computing everything beats moving tokens")
    if on_cpu and not compiling and expert.two_layers() is not None:
        return Choice("fused", why="one function for the whole layer")
    if dtype == torch.float64:
        if compiling:
            return Choice("dense", why="grouped_mm takes no float64, and a loop over loads would break the graph")
        return Choice("reference", why="grouped_mm takes no float64")
    if device.type == "cuda" and not compiling and supports(expert) and usable(device, dtype) and _has_triton():
        hopper = torch.cuda.get_device_capability(device) == (9, 0)
        if not (hopper and dtype == torch.bfloat16 and _is_aligned(expert)):
            return Choice("triton", why="a few kernels for the whole layer, which wait for nothing")
    return Choice("grouped", why="one grouped product for all experts of a size")


def _has_triton() -> bool:
    return find_spec("triton") is not None


def _is_aligned(expert: Expert) -> bool:
    """Whether grouped_mm takes every matrix without padding: rows of 16 bytes, which are 8 numbers in bfloat16."""
    return all(size % 8 == 0 for shape in matrix_shapes(expert) for size in shape)


@lru_cache(maxsize=256)
def weights_of(expert: Expert) -> int:
    """Numbers in the matrices of one expert of the description's sizes."""
    return sum(prod(shape) for shape in matrix_shapes(expert))


def matrix_shapes(expert: Expert) -> list[list[int]]:
    """The shapes of one expert's matrices, of the description's sizes."""
    sizes = expert.sizes()
    shapes = [[sizes[s] if isinstance(s, str) else s for s in spec.shape] for spec in expert.row_specs().values()]
    return [shape for shape in shapes if len(shape) > 1]


def _rounded(work: Work) -> Work:
    """With T to about a tenth, so that a batch of another size finds the answer of the last one."""
    if work.tokens < 16:
        return work
    step = 2 ** (work.tokens.bit_length() - 4)
    return work._replace(tokens=round(work.tokens / step) * step)


@lru_cache(maxsize=4096)
def _ranking(
    table: Table, device: str, dtype: str, work: Work, candidates: tuple[str, ...]
) -> tuple[list[tuple[str, float]], str]:
    found = table.nearest(device, dtype, work)
    where = "" if found is None else f"{table.source} is nearest: {found.work}"
    return list(table.ranking(device, dtype, work, candidates)), where
