"""What more experts cost: 100 tasks a batch, K = 8 experts beside K = 1 of the same kind and size, as a ratio.

    python benchmarks/meta_throughput.py --json benchmarks/results/meta_throughput.json

A training step (loss and gradients) and an evaluation (the targets' log-likelihood) of evidence-gated experts, of
MoE-NP and of RoutedMAML. CPU time of one process with one thread, so that other programs disturb it little; both arms
in turn, the figure is the median of the rounds' ratios with its quartiles. Also the peak memory of the process after
each of some evaluation batches: it should not grow.

Cost: about 3 minutes on one core. Gate: a ratio of 2 at most (issue 8).
"""

import argparse
import json
import platform
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import process_seconds, time_in_turn
from torch import nn

from modmoe import ExpertPool
from modmoe.meta import Predictive, TaskBatch
from modmoe.meta.evidence import BayesianExpertMixture, prediction_loss
from modmoe.meta.families import FiveFamilies
from modmoe.meta.l2l import RegressionNetwork, RoutedMAML
from modmoe.meta.processes import MoENeuralProcess

NUM_TASKS, CONTEXT, TARGETS = 100, 10, 30
FEW, MANY = 1, 8
WARM = 3  # evaluation batches before memory counts

Loss = Callable[[Any, TaskBatch], torch.Tensor]


def build(kind: str, num_experts: int) -> nn.Module:
    torch.manual_seed(0)
    if kind == "evidence":
        return BayesianExpertMixture(1, num_experts=num_experts)
    if kind == "moe_np":
        return MoENeuralProcess(1, num_experts=num_experts)
    return RoutedMAML(ExpertPool(RegressionNetwork(1, (40, 40)), num_experts))


LOSSES: dict[str, Loss] = {
    "evidence": lambda model, batch: prediction_loss(model(batch), batch),
    "moe_np": lambda model, batch: model.loss(batch, num_samples=2),
    "routed_maml": lambda model, batch: model.loss(batch),
}


def train(kind: str, model: nn.Module, batch: TaskBatch) -> None:
    model.zero_grad()
    LOSSES[kind](model, batch).backward()


@torch.no_grad()
def evaluate(model: nn.Module, batch: TaskBatch) -> None:
    predictive: Predictive = model(batch)
    assert batch.target_y is not None
    predictive.log_marginal(batch.target_y)


def compare(kind: str, batch: TaskBatch, budget: float) -> dict[str, Any]:
    models = {number: build(kind, number) for number in (FEW, MANY)}
    row: dict[str, Any] = {"kind": kind}
    for name, work in (("train", lambda m: train(kind, m, batch)), ("evaluate", lambda m: evaluate(m, batch))):
        calls = {str(n): lambda m=model, work=work: work(m) for n, model in models.items()}
        timings = time_in_turn(calls, lambda _: None, budget, process_seconds)
        spread = timings.ratio(str(MANY), str(FEW))
        row[name] = {
            "ratio": round(spread.median, 3),
            "quartiles": [round(spread.low, 3), round(spread.high, 3)],
            "milliseconds": {n: round(1e3 * timings.spread(n).median, 2) for n in calls},
        }
    row["parameters"] = {str(n): sum(p.numel() for p in m.parameters()) for n, m in models.items()}
    row["memory"] = memory(models[MANY])
    return row


def memory(model: nn.Module, batches: int = 12) -> dict[str, float]:
    """MiB that the process has held at most: after some evaluation batches, and after all of them."""
    peaks = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(batches):
        evaluate(model, FiveFamilies().sample(NUM_TASKS, CONTEXT, TARGETS, generator).batch)
        # Linux gives KiB, macOS bytes
        scale = 2**20 if platform.system() == "Darwin" else 2**10
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale)
    return {"warm_mib": round(peaks[WARM], 1), "end_mib": round(peaks[-1], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--kinds", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each pair of arms")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batch = FiveFamilies().sample(NUM_TASKS, CONTEXT, TARGETS, torch.Generator().manual_seed(0)).batch
    rows = []
    for kind in arguments.kinds:
        row = compare(kind, batch, arguments.budget)
        rows.append(row)
        for name in ("train", "evaluate"):
            part = row[name]
            low, high = part["quartiles"]
            times = ", ".join(f"K = {n}: {ms} ms" for n, ms in part["milliseconds"].items())
            print(f"{kind:12s} {name:9s} {part['ratio']:.2f} ({low:.2f} to {high:.2f}); {times}", flush=True)
        print(f"{kind:12s} memory    {row['memory']['warm_mib']} MiB warm, {row['memory']['end_mib']} MiB at the end")
    if arguments.json:
        conditions = {
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "tasks": NUM_TASKS,
            "context": CONTEXT,
            "targets": TARGETS,
            "experts": [FEW, MANY],
            "budget": arguments.budget,
        }
        arguments.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
