"""One network trained by one of Avalanche's methods, as large as the pool it stands beside."""

import math
import time
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from modmoe.analysis import MethodRecord
from modmoe.continual.baselines import ProgressiveNetworks
from modmoe.continual.strategies import Baseline, baseline_plugins, make_strategy
from modmoe.continual.streams import TaskData, num_classes, to_benchmark
from modmoe.experiments.continual.pool import learned_at_once
from modmoe.experiments.continual.settings import ContinualSettings
from modmoe.experiments.ledger import Ledger
from modmoe.growth import count_parameters


def run_network(
    config: ContinualSettings,
    tasks: Sequence[TaskData],
    method: Baseline,
    seed: int,
    parameters: float,
    num_pixels: int,
) -> MethodRecord:
    """One network of the experts' kind with as many numbers as the pool keeps, statistics included.

    Args:
        config: the settings.
        tasks: the stream.
        method: one of Avalanche's.
        seed: of the first weights and the order of samples.
        parameters: the pool's.
        num_pixels: the last of the features.
    """
    torch.manual_seed(seed)
    model = make_network(config, tasks[0].train_x.shape[1], num_pixels, num_classes(tasks), parameters)
    plugins = baseline_plugins(method, config.memory)
    strategy = make_strategy(model, plugins, config.learning_rate, config.batch_size, config.epochs)
    ledger = Ledger(tasks)
    if method == "joint":
        stream = [[experience] for experience in to_benchmark([join(tasks)]).train_stream]
    elif method == "lwf":
        stream = [[experience] for experience in to_benchmark(tasks, task_labels=True).train_stream]
    else:
        stream = learned_at_once(config, tasks, seed)
    for experiences in stream:
        start = time.perf_counter()
        strategy.train(experiences)
        trained = strategy.model.eval()  # GDumb puts a new model in the old one's place
        with torch.no_grad():
            ledger.add(trained(ledger.x).argmax(1))
        ledger.seconds += time.perf_counter() - start
    return ledger.record(count_parameters(model).total)


def run_pnn(config: ContinualSettings, tasks: Sequence[TaskData], seed: int, parameters: float) -> MethodRecord:
    """Progressive networks, which need the task of each test sample; arguments as in :func:`run_network`."""
    torch.manual_seed(seed)
    networks = ProgressiveNetworks(tasks, parameters, config.learning_rate, config.batch_size, config.epochs)
    ledger = Ledger(tasks)
    for experience in to_benchmark(tasks, task_labels=True).train_stream:
        start = time.perf_counter()
        networks.train_task(experience)
        ledger.add(networks.predict(ledger.x, ledger.task))
        ledger.seconds += time.perf_counter() - start
    return ledger.record(networks.num_parameters)


def make_network(
    config: ContinualSettings, num_features: int, num_pixels: int, width: int, parameters: float
) -> nn.Sequential:
    """An MLP, or a CNN with the experts' convolutions, whose hidden layer is as wide as ``parameters`` allow."""
    body: list[nn.Module] = []
    num_inputs = num_features
    if config.expert == "conv":
        side = math.isqrt(num_pixels)
        body = [LastColumns(num_pixels), nn.Unflatten(1, (1, side, side))]
        channels = [1, *config.channels]
        for c_in, c_out in pairwise(channels):
            body += [nn.Conv2d(c_in, c_out, 5, stride=2, padding=2), nn.GELU()]
            side = (side - 1) // 2 + 1
        body += [nn.Flatten()]
        num_inputs = channels[-1] * side**2
    fixed = sum(p.numel() for module in body for p in module.parameters())
    hidden = max(1, round((parameters - fixed - width) / (num_inputs + 1 + width)))
    return nn.Sequential(*body, nn.Linear(num_inputs, hidden), nn.GELU(), nn.Linear(hidden, width))


class LastColumns(nn.Module):
    """The last n columns: the pixels among the features."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, -self.n :]


def join(tasks: Sequence[TaskData]) -> TaskData:
    """All tasks as one."""
    parts = zip(*((t.train_x, t.train_y, t.test_x, t.test_y) for t in tasks), strict=True)
    return TaskData(*(torch.cat(part) for part in parts))
