"""Continual learning: a pool that grows over a stream, its gates, and honest controls."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn

from modmoe.analysis import Matrix, MethodRecord, assignment_accuracy, joint_distribution, mutual_information
from modmoe.continual import ExpertPoolPlugin, PoolClassifier, task_positions
from modmoe.continual.streams import TaskData, split_digits, to_benchmark
from modmoe.experts import MLPExpert
from modmoe.gating import DensityRouter, GaussianRouter, PrototypeRouter
from modmoe.growth import count_parameters
from modmoe.routing import Routing

GATES: dict[str, Callable[["ContinualConfig", int], DensityRouter]] = {
    "gaussian": lambda config, d: GaussianRouter(d, regularization=config.regularization),
    "gaussian_per_expert": lambda config, d: GaussianRouter(d, False, regularization=config.regularization),
    "prototype": lambda config, d: PrototypeRouter(d),
}

ABOUT = {
    "pool": "a growing pool; each sample goes to the expert whose {gate} explains it best",
    "oracle": "the experts of 'pool', told the task of each test sample: what perfect routing would give",
    "router_only": "the gate of 'pool' as a classifier of its own, without any expert",
    "naive": "one MLP trained on the tasks in sequence",
    "replay": "the same MLP with stored samples of earlier tasks",
    "joint": "the same MLP trained on all tasks at once",
}
GATE_NAMES = {
    "gaussian": "Gaussian for each class",
    "gaussian_per_expert": "one Gaussian for each expert",
    "prototype": "nearest class mean",
}


@dataclass
class ContinualConfig:
    """A stream of tasks with new classes; no task id at test time, no stored samples except where a method says so.

    Args:
        stream: the data, cut into tasks.
        num_tasks: number of tasks; it divides the number of classes.
        test_share: share of each class that is kept for the test.
        gate: the gate of the method ``pool``, named before the run; the others run as ``pool_<gate>``.
        regularization: added to the Gaussian gates' variances, in squared units of the inputs.
        hidden_features: hidden size of an expert.
        expert_features: output size of an expert, which its head rows read.
        epochs: passes over each task.
        batch_size: samples in a training step.
        learning_rate: of Adam.
        replay_memory: samples that the control ``replay`` stores.
    """

    stream: Literal["split_digits"] = "split_digits"
    num_tasks: int = 5
    test_share: float = 0.25
    gate: Literal["gaussian", "gaussian_per_expert", "prototype"] = "gaussian"
    regularization: float = 0.01
    hidden_features: int = 32
    expert_features: int = 32
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 0.003
    replay_memory: int = 200

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        """Run every method with one seed; see `modmoe.experiments.registry.ExperimentConfig`."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="avalanche")  # its own deprecations, nothing a user can mend
            return self._run(seed, progress)

    def _run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        tasks = split_digits(seed, self.num_tasks, self.test_share)
        others = [gate for gate in GATES if gate != self.gate]
        progress("pool")
        pool = _run_pool(self, tasks, self.gate, seed)
        records = {"pool": pool["pool"]}
        for gate in others:
            progress(f"pool_{gate}")
            records[f"pool_{gate}"] = _run_pool(self, tasks, gate, seed)["pool"]
        records |= {name: record for name, record in pool.items() if name != "pool"}
        parameters = pool["pool"].metrics["parameters"]
        for name in ("naive", "replay", "joint"):
            progress(name)
            records[name] = _run_mlp(self, tasks, name, seed, parameters)
        for name, record in records.items():
            gate = name.removeprefix("pool_") if name.startswith("pool_") else self.gate
            record.about = ABOUT["pool" if name.startswith("pool") else name].format(gate=GATE_NAMES[gate])
        return records


class Ledger:
    """Accuracy after each task, collected while one method learns; times only what the method does itself."""

    def __init__(self, tasks: Sequence[TaskData]):
        self.tasks = tasks
        self.x = torch.cat([task.test_x for task in tasks])
        self.y = torch.cat([task.test_y for task in tasks])
        self.task = torch.cat([torch.full((len(task.test_y),), i) for i, task in enumerate(tasks)])
        self.rows: list[list[float]] = []
        self.correct = 0.0
        self.seconds = 0.0

    def add(self, predictions: Tensor) -> None:
        """Take the class predictions for all test data after one more task."""
        hit = (predictions == self.y).double()
        self.rows.append([float(hit[self.task == i].mean()) for i in range(len(self.tasks))])
        self.correct = float(hit.mean())

    def record(self, parameters: int, **metrics: float) -> MethodRecord:
        """The record of a method that learned the tasks in sequence, or all at once (one row)."""
        names = [f"task {i}" for i in range(len(self.tasks))]
        values = np.array(self.rows)
        # how far each earlier task has fallen from its best; one row has no earlier task
        forgetting = float((values[:-1].max(0) - values[-1])[:-1].mean()) if len(values) > 1 else 0.0
        after = [f"after {i}" for i in range(len(values))] if len(values) > 1 else ["all at once"]
        seen = [float(np.mean(row[: i + 1])) for i, row in enumerate(self.rows)]
        series = {f"accuracy/task_{j}": [row[j] for row in self.rows] for j in range(len(names))}
        return MethodRecord(
            metrics={
                "accuracy": self.correct,
                **metrics,
                "forgetting": forgetting,
                "parameters": float(parameters),
                "seconds": self.seconds,
            },
            matrices={"accuracy": Matrix(values, "trained", "tested on", after, names)},
            series={**series, "accuracy/seen": seen} if len(values) > 1 else series,
        )


def _run_pool(config: ContinualConfig, tasks: Sequence[TaskData], gate: str, seed: int) -> dict[str, MethodRecord]:
    """A growing pool; with it, from the same training, oracle routing and the gate as a classifier of its own."""
    torch.manual_seed(seed)
    num_features = tasks[0].train_x.shape[1]
    num_classes = sum(len(task.classes) for task in tasks)
    expert = MLPExpert(num_features, config.hidden_features, config.expert_features)
    router = GATES[gate](config, num_features)
    model = PoolClassifier(expert, router, num_classes)
    strategy = _strategy(config, model, [ExpertPoolPlugin()])
    ledgers = {name: Ledger(tasks) for name in ("pool", "oracle", "router_only")}
    tested = ledgers["pool"]
    task_of_class = torch.zeros(num_classes, dtype=torch.int64)
    for i, task in enumerate(tasks):
        task_of_class[task.classes] = i
    num_experts, loads = [], []
    chosen, gate_classes = torch.empty(0), torch.empty(0)

    for experience in to_benchmark(tasks).train_stream:
        start = time.perf_counter()
        strategy.train(experience)
        model.eval()
        with torch.no_grad():
            features = model.features(tested.x)
            routing = model.layer.route(features)
            tested.add(model.classify(features, routing).argmax(1))
            tested.seconds += time.perf_counter() - start
            chosen = routing.choices[:, 0]
            # the oracle sends tasks that have not come yet to the newest expert, which is wrong for sure
            reached = tested.task.clamp(max=model.pool.num_experts - 1)
            positions = task_positions(model.pool, reached.tolist())
            oracle = Routing.assigned(positions, model.pool.num_experts)
            ledgers["oracle"].add(model.classify(features, oracle).argmax(1))
            start = time.perf_counter()
            joint, labels = router.class_log_joint(features, model.pool.namespace(model.layer.namespace))
            ledgers["router_only"].seconds += time.perf_counter() - start
        gate_classes = labels[joint.argmax(1)]
        ledgers["router_only"].add(gate_classes)
        num_experts.append(float(model.pool.num_experts))
        loads.append((routing.load.double() / routing.load.sum()).tolist())

    ledgers["oracle"].seconds = tested.seconds
    count = count_parameters(model)
    statistics = count.statistics
    owner = torch.tensor([int(task) for task in model.pool.tasks() if task is not None])
    records = {
        "pool": tested.record(
            count.total + statistics,
            oracle_gap=ledgers["oracle"].correct - tested.correct,
            **_routing_metrics(tested.task, chosen, owner),
        ),
        "oracle": ledgers["oracle"].record(count.total),
    }
    if router.per_class:  # a single density for each expert cannot tell classes apart
        routed = task_of_class[gate_classes]
        records["router_only"] = ledgers["router_only"].record(
            statistics, **_routing_metrics(tested.task, routed, torch.arange(len(tasks)))
        )
    heat = joint_distribution(tested.task, chosen, len(tasks), model.pool.num_experts)
    share = (heat / heat.sum(1, keepdim=True)).numpy()
    experts = [f"expert {expert_id}" for expert_id in model.pool.ids]
    records["pool"].matrices["routing"] = Matrix(
        share, "task", "expert", [f"task {i}" for i in range(len(tasks))], experts
    )
    records["pool"].series["num_experts"] = num_experts
    for position, expert_id in enumerate(model.pool.ids):
        load = [row[position] if position < len(row) else 0.0 for row in loads]
        records["pool"].series[f"load/expert_{expert_id}"] = load
    return records


def _run_mlp(
    config: ContinualConfig, tasks: Sequence[TaskData], method: str, seed: int, parameters: float
) -> MethodRecord:
    """One MLP with as many parameters as the pool has with its statistics: in sequence, with replay, or jointly."""
    torch.manual_seed(seed)
    num_features = tasks[0].train_x.shape[1]
    num_classes = sum(len(task.classes) for task in tasks)
    hidden = max(1, round((parameters - num_classes) / (num_features + 1 + num_classes)))
    model = nn.Sequential(nn.Linear(num_features, hidden), nn.GELU(), nn.Linear(hidden, num_classes))
    plugins = [ReplayPlugin(mem_size=config.replay_memory)] if method == "replay" else []
    strategy = _strategy(config, model, plugins)
    ledger = Ledger(tasks)
    stream = [_joined(tasks)] if method == "joint" else list(tasks)
    for experience in to_benchmark(stream).train_stream:
        start = time.perf_counter()
        strategy.train(experience)
        model.eval()
        with torch.no_grad():
            ledger.add(model(ledger.x).argmax(1))
        ledger.seconds += time.perf_counter() - start
    return ledger.record(count_parameters(model).total)


def _strategy(config: ContinualConfig, model: nn.Module, plugins: list[Any]) -> Naive:
    return Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=config.learning_rate),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=config.batch_size,
        train_epochs=config.epochs,
        plugins=plugins,
        evaluator=EvaluationPlugin(),  # measured here, on all tasks at once
    )


def _routing_metrics(task: Tensor, chosen: Tensor, owner: Tensor) -> dict[str, float]:
    joint = joint_distribution(task, chosen, int(task.max()) + 1, len(owner))
    return {
        "routing_accuracy": assignment_accuracy(task, chosen, owner),
        "mutual_information": mutual_information(joint, normalize=True),
    }


def _joined(tasks: Sequence[TaskData]) -> TaskData:
    parts = zip(*((t.train_x, t.train_y, t.test_x, t.test_y) for t in tasks), strict=True)
    return TaskData(*(torch.cat(part) for part in parts))
