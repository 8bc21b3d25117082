"""Measure the backends on this machine."""

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from modmoe.experts import MLPExpert
from modmoe.kernels.choice import weights_of
from modmoe.kernels.select import compute_output
from modmoe.kernels.table import Measurement, Table, Work
from modmoe.pool import ExpertPool
from modmoe.routing import Routing

BACKENDS = ("dense", "bmm", "grouped", "fused")


class Case(NamedTuple):
    """Tokens, input features, hidden features, experts, assignments of each token."""

    tokens: int
    features: int
    hidden: int
    experts: int
    top_k: int


def grid() -> list[Case]:
    """The cases of the table: from one token of reinforcement learning to a transformer's batch."""
    sizes = [(16, 32), (64, 128), (256, 512)]
    cases = itertools.product([1, 8, 32, 128, 512, 2048], sizes, [2, 4, 16, 64], [1, 2])
    return [
        Case(tokens, features, hidden, experts, top_k)
        for tokens, (features, hidden), experts, top_k in cases
        if tokens * features * hidden <= 512 * 256 * 512  # beyond it the products alone count
    ]


def measure(
    cases: Iterable[Case] | None = None,
    dtype: torch.dtype = torch.float32,
    budget: float = 0.3,
    progress: Callable[[str], object] = lambda text: None,
) -> Table:
    """Time every backend on every case, on the CPU with torch's present number of threads.

    Loads are even, nothing is frozen. The backends take turns, so that drift of the machine's speed meets all of them;
    the median counts.

    Args:
        cases: None for :func:`grid`.
        dtype: of tokens and experts.
        budget: seconds for each case, roughly.
        progress: is told each case.
    """
    rows = []
    for case in grid() if cases is None else cases:
        progress(str(tuple(case)))
        rows += _measure(case, dtype, budget)
    return Table(tuple(rows), "this measurement")


def _measure(case: Case, dtype: torch.dtype, budget: float) -> list[Measurement]:
    generator = torch.Generator().manual_seed(0)
    pool = ExpertPool(MLPExpert(case.features, case.hidden), case.experts).to(dtype)
    x = torch.randn(case.tokens, case.features, generator=generator).to(dtype).requires_grad_()
    num = case.tokens * case.top_k
    start = torch.arange(num) % case.experts  # the experts in turn: even loads, and each token's are different ones
    routing = Routing(
        token_index=torch.arange(case.tokens).repeat_interleave(case.top_k),
        expert_index=start,
        weight=torch.full((num,), 1 / case.top_k, dtype=dtype).requires_grad_(),
        num_tokens=case.tokens,
        num_experts=case.experts,
        logits=torch.zeros(case.tokens, case.experts),
        probs=torch.full((case.tokens, case.experts), 1 / case.experts),
        top_k=case.top_k,
        has_drops=False,
    )
    candidates = [b for b in BACKENDS if not (b == "grouped" and dtype == torch.float64)]

    def forward(backend: str) -> None:
        with torch.no_grad():
            compute_output(pool, x, routing, backend)

    def both(backend: str) -> None:
        compute_output(pool, x, routing, backend).sum().backward()

    found = []
    for training, call in ((False, forward), (True, both)):
        work = Work(case.tokens, float(case.top_k), case.experts, weights_of(pool.expert), training)
        seconds = _median_seconds(call, candidates, budget / 2)
        found.append(Measurement("cpu", str(dtype).removeprefix("torch."), work, seconds))
    return found


def _median_seconds(call: Callable[[str], None], backends: Sequence[str], budget: float) -> dict[str, float]:
    for backend in backends:
        call(backend)
    seconds: dict[str, list[float]] = {backend: [] for backend in backends}
    end = time.perf_counter() + budget
    while len(seconds[backends[0]]) < 3 or time.perf_counter() < end:
        for backend in backends:
            start = time.perf_counter()
            call(backend)
            seconds[backend].append(time.perf_counter() - start)
    return {backend: float(f"{statistics.median(times):.3g}") for backend, times in seconds.items()}


def summary(table: Table) -> str:
    """How often each backend was the fastest, as lines of text."""
    lines = []
    for training, mode in ((False, "forward"), (True, "forward and backward")):
        fastest = [min(m.seconds, key=m.seconds.__getitem__) for m in table.measurements if m.work.training == training]
        wins = ", ".join(f"{name} {count}" for name, count in Counter(fastest).most_common())
        lines.append(f"{mode}: {wins} of {len(fastest)} cases")
    return "\n".join(lines)
