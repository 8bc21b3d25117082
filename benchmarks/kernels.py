"""How fast the backends are, as a multiple of the dense MLP with the same FLOPs.

    python benchmarks/kernels.py --json FILE [--repeats N] [--cases PATTERN]

One thread; arms interleaved, so that drift of the machine's speed meets all of them; the median of paired ratios.
Rows: {"case", "arm", "metric", "value"}. Metrics: ``forward`` and ``step`` (forward + backward + AdamW) as ratios to
the dense MLP (lower is better), ``forward_ms``, ``step_ms``. Cases are named T<tokens>,d<D>,h<H>,E<experts>,k<top_k>,
with ``,frozen<percent>`` where that share of the experts is frozen.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from modmoe import ExpertPool, MLPExpert, MoELayer, TopKRouter

CASES = [
    # tokens, D, H, experts, top_k, percent of experts frozen
    (32, 32, 64, 4, 1, 0),
    (32, 64, 128, 16, 2, 0),
    (128, 64, 128, 16, 2, 0),
    (256, 128, 256, 16, 2, 0),
    (1024, 64, 128, 64, 2, 0),
    (1024, 64, 128, 64, 2, 90),
    (1024, 256, 512, 16, 2, 0),
    (1024, 256, 512, 16, 2, 50),
]
BACKENDS = ("reference", "dense", "bmm", "grouped", "auto")


def make_arms(tokens: int, d: int, h: int, experts: int, k: int, frozen: int) -> dict[str, nn.Module]:
    """The dense MLP of the same FLOPs, and the same layer on every backend."""
    arms: dict[str, nn.Module] = {
        "dense_mlp": nn.Sequential(nn.Linear(d, h * k), nn.GELU(), nn.Linear(h * k, d)),
    }
    for backend in BACKENDS:
        torch.manual_seed(0)
        layer = MoELayer(ExpertPool(MLPExpert(d, h), experts), TopKRouter(d, k), backend=backend)
        layer.pool.freeze(layer.pool.ids[: experts * frozen // 100])
        arms[backend] = layer
    return arms


def time_arms(arms: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the arms in turn."""
    for call in arms.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, call in arms.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(case: tuple[int, int, int, int, int, int], repeats: int) -> list[dict]:
    """All rows of one case."""
    tokens, d, h, experts, k, frozen = case
    name = f"T{tokens},d{d},h{h},E{experts},k{k}" + (f",frozen{frozen}" if frozen else "")
    arms = make_arms(*case)
    x = torch.randn(tokens, d)

    def forward(module: nn.Module) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                module(x)

        return call

    def step(module: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

        def call() -> None:
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()

        return call

    rows = []
    for metric, make_call in (("forward", forward), ("step", step)):
        seconds = time_arms({arm: make_call(module) for arm, module in arms.items()}, repeats)
        base = seconds["dense_mlp"]
        for arm, own in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
            rows.append({"case": name, "arm": arm, "metric": metric, "value": ratio})
            rows.append({"case": name, "arm": arm, "metric": f"{metric}_ms", "value": 1e3 * statistics.median(own)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where to write the rows")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each arm")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [case for case in CASES if args.cases in f"T{case[0]},d{case[1]},h{case[2]},E{case[3]},k{case[4]}"]
    rows = [row for case in tqdm(cases, unit="case") for row in measure(case, args.repeats)]
    conditions = {"torch": torch.__version__, "python": platform.python_version(), "device": "cpu", "threads": 1}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")
    print(f"{'case':34} {'arm':10} {'forward':>8} {'step':>8}   (multiples of the dense MLP)")
    for row in rows:
        if row["metric"] == "forward":
            step_value = next(
                r["value"] for r in rows if (r["case"], r["arm"], r["metric"]) == (row["case"], row["arm"], "step")
            )
            print(f"{row['case']:34} {row['arm']:10} {row['value']:8.2f} {step_value:8.2f}")


if __name__ == "__main__":
    main()
