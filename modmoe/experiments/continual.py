"""Continual learning: a pool that grows over a stream, its gates, and honest controls."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from modmoe.analysis import Matrix, MethodRecord, joint_distribution
from modmoe.continual import ExpertPoolPlugin, PoolClassifier, task_positions
from modmoe.continual.features import ConcatFeatures, PatchFeatures
from modmoe.continual.strategies import Baseline, baseline_plugins, make_strategy, without_avalanche_s_warnings
from modmoe.continual.streams import StreamSettings, TaskData, load_stream, num_classes, to_benchmark
from modmoe.experiments.ledger import Ledger
from modmoe.experts import MLPExpert
from modmoe.gating import (
    AutoencoderRouter,
    FittedRouter,
    GaussianRouter,
    PPCARouter,
    PrototypeRouter,
    StickRouter,
)
from modmoe.growth import count_parameters
from modmoe.routing import Routing

Gate = Literal["gaussian", "gaussian_per_expert", "prototype", "ppca", "autoencoder", "stick", "stick_density"]
StreamName = Literal[
    "split_digits",
    "permuted_digits",
    "split_mnist5k",
    "split_mnist",
    "split_fashion",
    "rotated_mnist",
    "mnist_fashion_animals",
]
# config, features that gate and experts read, classes, pixels among the features (they stand last)
GATES: dict[str, Callable[["ContinualConfig", int, int, int], FittedRouter]] = {
    "gaussian": lambda config, d, *_: GaussianRouter(d, regularization=config.regularization),
    "gaussian_per_expert": lambda config, d, *_: GaussianRouter(d, False, regularization=config.regularization),
    "prototype": lambda config, d, *_: PrototypeRouter(d),
    "ppca": lambda config, d, *_: PPCARouter(d),
    "autoencoder": lambda config, d, *_: AutoencoderRouter(d),
    "stick": lambda config, d, width, _: StickRouter(d, width),
    "stick_density": lambda config, d, width, pixels: StickRouter(
        d, width, density=PPCARouter(pixels), density_slice=None if pixels == d else (d - pixels, d)
    ),
}
GATE_NAMES = {
    "gaussian": "Gaussian for each class",
    "gaussian_per_expert": "one Gaussian for each expert",
    "prototype": "nearest class mean",
    "ppca": "mixture of probabilistic PCA for each class",
    "autoencoder": "autoencoder for each class",
    "stick": "frozen heads, newest first",
    "stick_density": "frozen heads, newest first, with a mixture of probabilistic PCA for each class",
}
ABOUT = {
    "pool": "a growing pool; each sample goes to the expert whose {gate} explains it best",
    "oracle": "the experts of 'pool', told the task of each test sample: what perfect routing would give",
    "router_only": "the gate of 'pool' as a classifier of its own, without any expert",
    "naive": "one MLP with as many numbers as 'pool' keeps, trained on the tasks in sequence",
    "replay": "the same MLP with {memory} stored samples of earlier tasks",
    "gdumb": "the same MLP trained anew after each task, on {memory} stored samples alone",
    "ewc": "the same MLP with elastic weight consolidation (online)",
    "lwf": "the same MLP with learning without forgetting",
    "joint": "the same MLP trained on all tasks at once",
}


@dataclass
class ContinualConfig:
    """A stream of tasks; no task id at test time, no stored samples except where a method says so.

    Args:
        stream: the data, cut into tasks.
        num_tasks: number of tasks; null for the stream's own.
        test_share: share of each class kept for the test, where the data come without a split.
        root: folder of the images that scripts/fetch_data.py gets.
        limit: at most so many images of each class; null for all.
        features: what gates, experts and baselines read: the pixels, or besides them the responses of filters that
            are learned from the first task's images and frozen (28x28 images only).
        num_filters: of these.
        gate: the gate of the method ``pool``, named before the run.
        other_gates: gates that run besides, as ``pool_<gate>``.
        baselines: Avalanche's methods that run besides.
        regularization: added to the Gaussian gates' variances, in squared units of the inputs.
        hidden_features: hidden size of an expert.
        expert_features: output size of an expert, which its head rows read.
        epochs: passes over each task.
        batch_size: samples in a training step.
        learning_rate: of Adam.
        memory: samples that ``replay`` and ``gdumb`` store.
    """

    stream: StreamName = "split_digits"
    num_tasks: int | None = None
    test_share: float = 0.25
    root: str = "data"
    limit: int | None = None
    features: Literal["pixels", "patches"] = "pixels"
    num_filters: int = 100
    gate: Gate = "gaussian"
    other_gates: list[Gate] = field(default_factory=lambda: ["gaussian_per_expert", "prototype"])
    baselines: list[Baseline] = field(default_factory=lambda: ["naive", "replay", "joint"])
    regularization: float = 0.01
    hidden_features: int = 32
    expert_features: int = 32
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 0.003
    memory: int = 200

    def __post_init__(self) -> None:
        if self.gate in self.other_gates:
            raise ValueError(f"the gate '{self.gate}' is the main one already: take it out of other_gates")

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        """Run every method with one seed; see `modmoe.experiments.registry.ExperimentConfig`."""
        with without_avalanche_s_warnings():
            return self._run(seed, progress)

    def _run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        settings = StreamSettings(self.num_tasks, self.test_share, self.root, self.limit)
        tasks = load_stream(self.stream, seed, settings)
        num_pixels = tasks[0].train_x.shape[1]
        if self.features == "patches":
            progress("features")
            tasks = with_patch_features(tasks, self.num_filters, seed)
        progress("pool")
        pool = run_pool(self, tasks, self.gate, seed, num_pixels)
        records = {"pool": pool["pool"]}
        for gate in self.other_gates:
            progress(f"pool_{gate}")
            records[f"pool_{gate}"] = run_pool(self, tasks, gate, seed, num_pixels)["pool"]
        records |= {name: record for name, record in pool.items() if name != "pool"}
        for name in self.baselines:
            progress(name)
            records[name] = run_mlp(self, tasks, name, seed, pool["pool"].metrics["parameters"])
        for name, record in records.items():
            gate = name.removeprefix("pool_") if name.startswith("pool_") else self.gate
            text = ABOUT["pool" if name.startswith("pool") else name]
            record.about = text.format(gate=GATE_NAMES[gate], memory=self.memory)
        return records


def with_patch_features(tasks: Sequence[TaskData], num_filters: int, seed: int) -> list[TaskData]:
    """The tasks with filter responses before the pixels; only the first task's training images are looked at.

    Computed once for all methods, which makes no difference to computing them in each step: they are frozen.
    """
    extractor = ConcatFeatures(PatchFeatures(num_filters=num_filters, seed=seed), nn.Identity())
    extractor.fit(tasks[0].train_x)
    with torch.no_grad():
        return [TaskData(extractor(t.train_x), t.train_y, extractor(t.test_x), t.test_y) for t in tasks]


def run_pool(
    config: ContinualConfig, tasks: Sequence[TaskData], gate: str, seed: int, num_pixels: int
) -> dict[str, MethodRecord]:
    """A growing pool; with it, from the same training, oracle routing and the gate as a classifier of its own."""
    torch.manual_seed(seed)
    num_features, width = tasks[0].train_x.shape[1], num_classes(tasks)
    expert = MLPExpert(num_features, config.hidden_features, config.expert_features)
    router = GATES[gate](config, num_features, width, num_pixels)
    model = PoolClassifier(expert, router, width)
    strategy = make_strategy(model, [ExpertPoolPlugin()], config.learning_rate, config.batch_size, config.epochs)
    tested, oracle, alone = (Ledger(tasks) for _ in range(3))
    num_experts, loads = [], []
    chosen = gate_chosen = torch.empty(0)

    for experience in to_benchmark(tasks).train_stream:
        start = time.perf_counter()
        strategy.train(experience)
        model.eval()
        with torch.no_grad():
            features = model.features(tested.x)
            routing = model.layer.route(features)
            tested.add(model.classify(features, routing).argmax(1))
            tested.seconds += time.perf_counter() - start
            # the oracle sends tasks that have not come yet to the newest expert, which is wrong for sure
            reached = tested.task.clamp(max=model.pool.num_experts - 1)
            told = Routing.assigned(task_positions(model.pool, reached.tolist()), model.pool.num_experts)
            oracle.add(model.classify(features, told).argmax(1))
            start = time.perf_counter()
            classes, gate_chosen = gate_alone(model, router, features)
            alone.seconds += time.perf_counter() - start
        alone.add(classes)
        chosen = routing.choices[:, 0]
        num_experts.append(float(model.pool.num_experts))
        loads.append((routing.load.double() / routing.load.sum()).tolist())

    oracle.seconds = tested.seconds
    count = count_parameters(model)
    statistics = count.statistics + sum(buffer.numel() for buffer in router.buffers())  # with what gates share
    owner = torch.tensor([int(task) for task in model.pool.tasks() if task is not None])
    record = tested.record(
        count.total + statistics,
        oracle_gap=oracle.accuracy - tested.accuracy,
        **tested.routing_metrics(chosen, owner),
    )
    heat = joint_distribution(tested.task, chosen, len(tasks), model.pool.num_experts)
    share = (heat / heat.sum(1, keepdim=True)).numpy()
    names = [f"task {i}" for i in range(len(tasks))], [f"expert {expert_id}" for expert_id in model.pool.ids]
    record.matrices["routing"] = Matrix(share, "task", "expert", *names)
    record.series["num_experts"] = num_experts
    for position, expert_id in enumerate(model.pool.ids):
        load = [row[position] if position < len(row) else 0.0 for row in loads]
        record.series[f"load/expert_{expert_id}"] = load
    records = {"pool": record, "oracle": oracle.record(count.total)}
    if gate != "gaussian_per_expert":  # a single density for each expert cannot tell classes apart
        records["router_only"] = alone.record(statistics, **alone.routing_metrics(gate_chosen, owner))
    return records


def gate_alone(model: PoolClassifier, router: FittedRouter, features: Tensor) -> tuple[Tensor, Tensor]:
    """The class that the gate by itself finds most likely, (n,), and the position of its expert, (n,)."""
    rows = model.pool.namespace(model.layer.namespace)
    joint, labels = router.class_log_joint(features, rows)
    best = joint.argmax(1)
    return labels[best], router.class_owner(rows)[best]


def run_mlp(
    config: ContinualConfig, tasks: Sequence[TaskData], method: Baseline, seed: int, parameters: float
) -> MethodRecord:
    """One MLP with as many parameters as the pool has with its statistics, trained by one of Avalanche's methods."""
    torch.manual_seed(seed)
    num_features, width = tasks[0].train_x.shape[1], num_classes(tasks)
    hidden = max(1, round((parameters - width) / (num_features + 1 + width)))
    model = nn.Sequential(nn.Linear(num_features, hidden), nn.GELU(), nn.Linear(hidden, width))
    plugins = baseline_plugins(method, config.memory)
    strategy = make_strategy(model, plugins, config.learning_rate, config.batch_size, config.epochs)
    ledger = Ledger(tasks)
    stream = [join(tasks)] if method == "joint" else list(tasks)
    for experience in to_benchmark(stream, task_labels=method == "lwf").train_stream:
        start = time.perf_counter()
        strategy.train(experience)
        trained = strategy.model.eval()  # GDumb puts a new model in the old one's place
        with torch.no_grad():
            ledger.add(trained(ledger.x).argmax(1))
        ledger.seconds += time.perf_counter() - start
    return ledger.record(count_parameters(model).total)


def join(tasks: Sequence[TaskData]) -> TaskData:
    """All tasks as one."""
    parts = zip(*((t.train_x, t.train_y, t.test_x, t.test_y) for t in tasks), strict=True)
    return TaskData(*(torch.cat(part) for part in parts))
