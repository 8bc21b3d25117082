"""How fast the expert kernels are, beside the dense layer of the same FLOPs and other libraries.

    python benchmarks/kernels.py --json FILE [--cases PATTERN] [--seconds S] [--quick]

Writes {"conditions": {...}, "must_reach": [...], "rows": [{"case", "arm", "metric", "value"}, ...]}.

Method: one thread, process time (on a GPU: time between events), the arms in turn in another order each round, each
arm with an equal share of the case's time, medians of paired ratios. A timed call follows an untimed one of the same
arm, so that it finds its caches as a training loop does. Before anything is timed, each arm that computes
the same function as ours is checked to give our output and gradients (1e-4). Every arm gets the same precomputed
routing, and its time is dispatch + experts + combine. The gradient of x and of the combine weights is computed by all.

Cases: T,d,h,E,k; the loads are equal to within one. Then ``,zipf`` (largest load 15 times the mean), ``,empty`` (each
fourth expert gets nothing), ``,frozen90`` (that percentage of experts and so of tokens frozen), ``,cohorts64`` (the
pool grew to E in that many equal steps), ``,bf16`` (on a GPU, where there is one; all others are fp32 on the CPU).

Arms:
  auto                     ours, as users get it: experts of two layers with GELU and biases
  auto_all_trainable       the same with nothing frozen, in the frozen cases
  auto_one_cohort          the same experts made at once, in the cases of several cohorts
  reference, bmm, ...      ours on that backend, without whole steps in the largest cases
  dense_backend            ours on the backend that is named "dense", as the name ``dense`` is that of the MLP; not at
                           more than 64 experts nor in the largest cases, where it takes minutes
  dense                    one MLP of hidden size h*k: the same FLOPs, nothing to route
  balanced_bmm             sort, two batched products over equal loads, index_add; on balanced loads in every case
  raw_grouped_mm           sort, two F.grouped_mm, index_add
  transformers_eager, transformers_grouped, st_moe, soft_moe, scattermoe
                           see kernel_peers.py for what was done to give each the precomputed routing
  auto_swiglu, auto_geglu, auto_soft, auto_no_bias
                           ours beside these peers, on the same kind of experts with the same weights
  dense_swiglu, dense_geglu
                           the dense layers of these kinds
  gate                     the router alone, which is in no other arm's time

Metrics: ``fwd_ms``, ``fwd_bwd_ms``, ``step_ms`` (zero_grad, forward, backward, AdamW); ``fwd_vs_dense`` and
``fwd_bwd_vs_dense``, the arm's time over that of the dense layer of its kind (lower is better); ``fwd_bwd_vs_auto`` and
``step_vs_auto``, the arm's time over that of ours on its kind of experts (above 1: ours is faster);
``fwd_bwd_vs_balanced_bmm``; ``percent_of_cublas`` on a GPU; each ratio of fwd_bwd and step also with ``_q1`` and
``_q3``, its quartiles. ``peak_bytes``: the most memory that a forward and backward pass takes above weights and input,
gradients included. ``grow_ms``, ``first_step_ms``: adding the last cohort, and the first step after it.
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, reports a missing GPU otherwise
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from datetime import date
from fnmatch import fnmatch
from pathlib import Path

import torch
from kernel_arms import Arm, Problem, check_equal, mlp_arms
from kernel_cases import Case
from kernel_growth import growth_rows
from kernel_peers import missing_peers, peer_arms, peer_versions
from kernel_summary import must_reach, report
from measure import Call, Spread, Timings, clock, peak_bytes, time_in_turn
from tqdm import tqdm

from modmoe.kernels.table import current_table

CASES = (
    "32,32,64,4,1",
    "32,64,128,16,2",
    "128,64,128,16,2",
    "256,128,256,16,2",
    "1024,256,512,16,2",
    "1024,512,1024,16,2",
    "1024,128,256,32,2,zipf",
    "1024,128,256,32,2,empty",
    *(f"1024,64,128,{experts},2" for experts in (16, 32, 64, 128, 256)),
    "2048,256,512,20,2,frozen50",
    "2048,256,512,20,2,frozen90",
    *(f"1024,64,128,{8 * cohorts},2,cohorts{cohorts}" for cohorts in (2, 4, 6, 8)),
    "1024,64,128,64,2,cohorts64",
)
GPU_CASES = (
    "4096,1024,2048,16,2,bf16",
    "8192,1024,2048,64,2,bf16",
    "8192,2048,4096,16,2,bf16",
    "8192,1024,2048,32,2,zipf,bf16",
)
QUICK_CASES = (
    "32,16,32,4,1",
    "64,16,32,16,2",
    "64,16,32,32,2,zipf",
    "64,16,32,16,2,empty",
    "64,16,32,20,2,frozen90",
    "64,16,32,8,2,cohorts4",
)
SHARES = {"fwd": 0.2, "fwd_bwd": 0.5, "step": 0.3}  # of a case's time


def measure(case: Case, seconds: float) -> list[dict]:
    """All rows of one case."""
    problem = Problem.of(case)
    arms = [*mlp_arms(problem), *peer_arms(problem)]
    check_equal(arms)
    rows = Rows(case, arms)

    def timed(metric: str, calls: dict[str, Call]) -> None:
        timings = time_in_turn(
            calls, lambda name: rows.arms[name].clear(), seconds * SHARES[metric], clock(case.device)
        )
        rows.add_timings(metric, timings)

    timed("fwd", {arm.name: without_gradient(arm) for arm in arms})
    timed("fwd_bwd", {arm.name: arm.forward_backward for arm in arms})
    for arm in arms:
        arm.clear()
        rows.add(arm.name, "peak_bytes", peak_bytes(arm.forward_backward, case.device))
    timed("step", make_steps([arm for arm in arms if arm.steps]))
    if case.kind == "cohorts":
        rows.rows += growth_rows(case)
    return rows.rows


class Rows:
    """The rows of one case, as they come.

    Args:
        case: which.
        arms: whose rows.
    """

    def __init__(self, case: Case, arms: Sequence[Arm]):
        self.case = case
        self.arms = {arm.name: arm for arm in arms}
        self.rows: list[dict] = []

    def add(self, arm: str, metric: str, value: float) -> None:
        """One row, to five digits."""
        self.rows.append({"case": self.case.name, "arm": arm, "metric": metric, "value": float(f"{value:.5g}")})

    def add_ratio(self, arm: str, metric: str, ratio: Spread) -> None:
        """A median with its quartiles."""
        self.add(arm, metric, ratio.median)
        self.add(arm, f"{metric}_q1", ratio.low)
        self.add(arm, f"{metric}_q3", ratio.high)

    def add_timings(self, metric: str, timings: Timings) -> None:
        """What is said of each arm's times."""
        for name in timings.seconds:
            arm = self.arms[name]
            self.add(name, f"{metric}_ms", 1e3 * timings.spread(name).median)
            if metric == "fwd":
                self.add(name, "fwd_vs_dense", timings.ratio(name, arm.dense).median)
                continue
            self.add_ratio(name, f"{metric}_vs_auto", timings.ratio(name, arm.ours))
            if metric == "fwd_bwd":
                self.add_ratio(name, "fwd_bwd_vs_dense", timings.ratio(name, arm.dense))
                if name == "auto" and "balanced_bmm" in self.arms:
                    self.add_ratio(name, "fwd_bwd_vs_balanced_bmm", timings.ratio(name, "balanced_bmm"))
                if name == "auto" and self.case.device.type == "cuda":
                    self.add(name, "percent_of_cublas", 100 * timings.ratio("dense", name).median)


def without_gradient(arm: Arm) -> Call:
    """The forward pass alone."""

    def call() -> None:
        with torch.no_grad():
            arm.forward()

    return call


def make_steps(arms: Sequence[Arm]) -> dict[str, Call]:
    """Whole training steps; arms that share their weights share an optimizer."""
    optimizers: dict[int, torch.optim.Optimizer] = {}

    def step_of(arm: Arm) -> Callable[[], None]:
        key = id(arm.parameters[0])
        if key not in optimizers:
            optimizers[key] = torch.optim.AdamW(arm.parameters, lr=1e-4)
        optimizer = optimizers[key]

        def step() -> None:
            optimizer.zero_grad()
            arm.forward_backward()
            optimizer.step()

        return step

    return {arm.name: step_of(arm) for arm in arms}


def conditions(seconds: float) -> dict:
    """What the numbers were measured on and how, without the name of the machine."""
    on_gpu = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "dtype": "float32 (cases with bf16: bfloat16)",
        "peers": peer_versions(on_gpu),
        "left_out": sorted(missing_peers(on_gpu)),
        "seconds_per_case": seconds,
        "auto": f"by {current_table().source}",
        "method": "process time, arms in turn, each after an untimed call, medians of paired ratios",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where to write the rows")
    parser.add_argument(
        "--cases", metavar="PATTERN", default="*", help="only cases whose name contains this; * stands for anything"
    )
    parser.add_argument("--seconds", type=float, default=6, help="for the timing of one case, more where arms are slow")
    parser.add_argument("--quick", action="store_true", help="tiny cases and few repeats: shows that all of it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    names = QUICK_CASES if args.quick else (*CASES, *(GPU_CASES if on_gpu else ()))
    cases = [Case(name) for name in names if fnmatch(name, f"*{args.cases}*")]
    if not cases:
        parser.error(f"no case's name contains '{args.cases}': they are {', '.join(names)}")
    for arm, command in missing_peers(on_gpu).items():
        print(f"left out: {arm}, install it with: {command}")
    seconds = 0.2 if args.quick else args.seconds
    rows = [row for case in tqdm(cases, unit="case") for row in measure(case, seconds)]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, {"conditions": conditions(seconds), "must_reach": must_reach(rows)}, rows)
    print(report(rows))
    if args.quick:
        print("\nquick: these numbers say nothing about speed")


def write_json(path: Path, head: dict, rows: Sequence[dict]) -> None:
    """The head, then one row on each line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(json.dumps(head, indent=1).removesuffix("\n}") + ',\n "rows": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    main()
