"""Timing and memory: arms in turn, medians of paired ratios."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

MIN_ROUNDS = 5
MIN_SLOW_ROUNDS = 3
MAX_ROUNDS = 201
SLOW = 3.0
LONG = 0.05  # seconds of a call

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


class Timings:
    """Seconds of each arm by round; an arm rests in some rounds where it is slow.

    Args:
        seconds: arm -> round -> seconds.
    """

    def __init__(self, seconds: Mapping[str, Mapping[int, float]]):
        self.seconds = seconds

    def spread(self, arm: str) -> Spread:
        """Of an arm's seconds."""
        return Spread.of(list(self.seconds[arm].values()))

    def ratio(self, arm: str, base: str) -> Spread:
        """Of the arm's seconds over the base's, over the rounds in which both ran."""
        own, other = self.seconds[arm], self.seconds[base]
        return Spread.of([own[number] / other[number] for number in own if number in other])


def clock(device: torch.device) -> Callable[[Call], float]:
    """A function that gives the seconds of one call: process time on a CPU, time between events on a GPU."""
    return gpu_seconds if device.type == "cuda" else process_seconds


def process_seconds(call: Call) -> float:
    """Seconds of this process's CPU time, whatever else the machine does."""
    start = time.process_time()
    call()
    return time.process_time() - start


def gpu_seconds(call: Call) -> float:
    """Seconds between an event before and one after the call on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def time_in_turn(
    calls: Mapping[str, Call], prepare: Callable[[str], object], budget: float, seconds_of: Callable[[Call], float]
) -> Timings:
    """Time the arms in turn, in another order each round, so that drift of the machine's speed meets all of them.

    On a CPU each timed call follows one of the same arm that is not timed (unless it is LONG): it finds the caches and
    the heap as a training loop leaves them, not as another arm does. Each arm gets an equal share of the budget: a slow
    one runs in every n-th round only, n a power of two so that the rounds of any two arms meet. Even where it costs
    more than its share each runs MIN_ROUNDS times, or MIN_SLOW_ROUNDS if it takes more than SLOW times the median
    arm's time.

    Args:
        calls: arm -> what is timed. Each runs before it counts: twice, or once if a call is LONG.
        prepare: gets the arm's name before each call of it; not timed.
        budget: seconds for all of them.
        seconds_of: the clock.
    """
    first: dict[str, float] = {}

    def warms_up(name: str) -> bool:
        return seconds_of is process_seconds and first[name] < LONG

    for name, call in calls.items():
        prepare(name)
        first[name] = seconds_of(call)
    slow = SLOW * statistics.median(first.values())
    rounds = {}
    for name, call in calls.items():
        if first[name] < LONG or seconds_of is gpu_seconds:  # a GPU's first call may compile
            prepare(name)
            first[name] = seconds_of(call)
        share = math.floor(budget / len(calls) / max(first[name], 1e-7) / (2 if warms_up(name) else 1))
        rounds[name] = min(max(share, MIN_ROUNDS if first[name] < slow else MIN_SLOW_ROUNDS), MAX_ROUNDS)
    total = max(rounds.values())
    strides = {name: 2 ** math.floor(math.log2(total / own)) for name, own in rounds.items()}
    order, shuffle = list(calls), random.Random(0).shuffle
    seconds: dict[str, dict[int, float]] = {name: {} for name in calls}
    gc.collect()
    gc.disable()
    try:
        for number in range(total):
            shuffle(order)
            for name in order:
                if number % strides[name]:
                    continue
                if warms_up(name):
                    prepare(name)
                    calls[name]()
                prepare(name)
                seconds[name][number] = seconds_of(calls[name])
    finally:
        gc.enable()
    return Timings(seconds)


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most bytes that torch held at once during a call, above what it held before.

    On a CPU the sum over every allocation and release that the profiler saw, temporaries inside operators included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += size
        peak = max(peak, held)
    return peak
