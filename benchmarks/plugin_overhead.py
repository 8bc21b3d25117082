"""What ExpertPoolPlugin adds to a training step: the same model and strategy with the plugin, over without.

    python benchmarks/plugin_overhead.py --json FILE [--repeats N]

One thread; the two arms in turn; one experience of random data for each timing. Rows: {"case", "arm", "metric",
"value"}; ``step_ms`` is the median of an epoch divided by its steps, ``ratio`` the median of paired ratios. Growing and
freezing at the boundaries are outside an epoch and are not counted; they happen once for a task.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modmoe import GaussianRouter, MLPExpert
from modmoe.continual import ExpertPoolPlugin, PoolClassifier
from modmoe.continual.strategies import make_strategy
from modmoe.continual.streams import TaskData, to_benchmark

# features, hidden, batch size
CASES = [(64, 32, 32), (784, 128, 128)]
STEPS = 50


class Stopwatch(ExpertPoolPlugin):
    """The plugin with a stopwatch around each epoch; with ``active`` off, only the stopwatch."""

    def __init__(self, active: bool):
        super().__init__()
        self.active = active
        self.epochs: list[float] = []

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        if self.active:
            super().before_forward(strategy)

    def after_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        if self.active:
            super().after_forward(strategy)

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        super().before_training_epoch(strategy)
        self.start = time.perf_counter()

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.epochs.append(time.perf_counter() - self.start)


def epoch_seconds(active: bool, x: Tensor, y: Tensor, hidden: int, batch_size: int) -> float:
    """Seconds of the second of two epochs."""
    torch.manual_seed(0)
    model = PoolClassifier(MLPExpert(x.shape[1], hidden), GaussianRouter(x.shape[1]), 10)
    watch = Stopwatch(active)
    strategy = make_strategy(model, [watch], batch_size=batch_size, epochs=2)
    strategy.train(to_benchmark([TaskData(x, y, x[:1], y[:1])]).train_stream[0])
    return watch.epochs[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where to write the rows")
    parser.add_argument("--repeats", type=int, default=20, help="timed epochs of each arm")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for features, hidden, batch_size in CASES:
        case = f"d{features},h{hidden},B{batch_size}"
        x, y = torch.rand(STEPS * batch_size, features), torch.randint(0, 2, (STEPS * batch_size,))
        pairs = [
            tuple(epoch_seconds(active, x, y, hidden, batch_size) for active in (True, False))
            for _ in range(args.repeats)
        ]
        for index, arm in enumerate(("plugin", "bare")):
            step = statistics.median(pair[index] for pair in pairs) / STEPS
            rows.append({"case": case, "arm": arm, "metric": "step_ms", "value": 1e3 * step})
        ratio = statistics.median(with_plugin / bare for with_plugin, bare in pairs)
        rows.append({"case": case, "arm": "plugin", "metric": "ratio", "value": ratio})
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"conditions": {"torch": torch.__version__, "threads": 1}, "rows": rows}, indent=1))
    for row in rows:
        print(f"{row['case']:16} {row['arm']:8} {row['metric']:8} {row['value']:.3f}")


if __name__ == "__main__":
    main()
