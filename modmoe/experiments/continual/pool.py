"""The growing pool on a stream; with it oracle routing, and its gate as a classifier without experts."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modmoe.analysis import Matrix, MethodRecord, joint_distribution
from modmoe.continual import ExpertPoolPlugin, Novelty, PoolClassifier
from modmoe.continual.strategies import make_strategy
from modmoe.continual.streams import TaskData, num_classes, shares_classes, to_benchmark, to_online
from modmoe.experiments.continual.gates import GATES, GateInput
from modmoe.experiments.continual.settings import ContinualSettings
from modmoe.experiments.ledger import Ledger
from modmoe.experts import ConvExpert, Expert, MLPExpert
from modmoe.gating import FittedRouter, StickRouter
from modmoe.growth import count_parameters
from modmoe.routing import Routing


def run_pool(
    config: ContinualSettings, tasks: Sequence[TaskData], gate: str, seed: int, num_pixels: int
) -> dict[str, MethodRecord]:
    """A growing pool, and from the same training what its parts are worth.

    Args:
        config: the settings.
        tasks: the stream.
        gate: a key of ``GATES``.
        seed: of the experts' first weights and the order of samples.
        num_pixels: the last of the features.
    Returns:
        ``pool``; ``oracle``: its experts with perfect routing; ``router_only``: its gate alone, where that can tell
        classes apart; ``streaming_ridge``, where the gate is a stick: one ridge regression from the same moments.
    """
    torch.manual_seed(seed)
    num_features, width = tasks[0].train_x.shape[1], num_classes(tasks)
    settings = (config.regularization, config.em_iterations, config.noise_floor)
    router = GATES[gate](GateInput(num_features, num_pixels, width, *settings))
    model = PoolClassifier(make_expert(config, num_features, num_pixels), router, width)
    plugin = ExpertPoolPlugin(growth=Novelty(seed=seed) if config.experience_size else None)
    strategy = make_strategy(model, [plugin], config.learning_rate, config.batch_size, config.epochs)
    tested, oracle, alone, ridge = (Ledger(tasks) for _ in range(4))
    by_class = not shares_classes(tasks)
    num_experts, loads = [], []
    chosen = gate_chosen = right = torch.empty(0)

    for experiences in learned_at_once(config, tasks, seed):
        start = time.perf_counter()
        strategy.train(experiences)
        model.eval()
        with torch.no_grad():
            features = model.features(tested.x)
            routing = model.layer.route(features)
            tested.add(model.classify(features, routing).argmax(1))
            tested.seconds += time.perf_counter() - start
            right = right_experts(model, tested, by_class)
            # the oracle sends tasks that have not come yet to the newest expert, which is wrong for sure
            told = torch.where(right.any(1), right.int().argmax(1), right.shape[1] - 1)
            oracle.add(model.classify(features, Routing.assigned(told, right.shape[1])).argmax(1))
            start = time.perf_counter()
            classes, gate_chosen = gate_alone(model, router, features)
            alone.seconds += time.perf_counter() - start
            if isinstance(router, StickRouter):
                scores, labels = router.ridge_scores(features)
                ridge.add(labels[scores.argmax(1)])
        alone.add(classes)
        chosen = routing.choices[:, 0]
        num_experts.append(float(model.pool.num_experts))
        loads.append((routing.load.double() / routing.load.sum()).tolist())

    oracle.seconds = tested.seconds
    count = count_parameters(model)
    statistics = count.statistics + sum(buffer.numel() for buffer in router.buffers())  # with what gates share
    record = tested.record(
        count.total + statistics,
        oracle_gap=oracle.accuracy - tested.accuracy,
        **tested.routing_metrics(chosen, right),
        experts=num_experts[-1],
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
    if getattr(router, "per_class", True):  # a single density for each expert cannot tell classes apart
        records["router_only"] = alone.record(statistics, **alone.routing_metrics(gate_chosen, right))
    if isinstance(router, StickRouter):
        records["streaming_ridge"] = ridge.record(router.gram.numel() + router.moments.numel())
    return records


def make_expert(config: ContinualSettings, num_features: int, num_pixels: int) -> Expert:
    """The expert kind that the config asks for."""
    if config.expert == "mlp":
        return MLPExpert(num_features, config.hidden_features, config.expert_features)
    side = math.isqrt(num_pixels)
    return ConvExpert(
        (1, side, side), config.channels, config.expert_features, kernel_size=5, stride=2, in_features=num_features
    )


def learned_at_once(config: ContinualSettings, tasks: Sequence[TaskData], seed: int) -> list[list[Any]]:
    """For each task the experiences that are learned before the next test: one, or many small ones."""
    if config.experience_size is None:
        return [[experience] for experience in to_benchmark(tasks).train_stream]
    parts = iter(to_online(tasks, config.experience_size, seed))
    counts = [math.ceil(len(task.train_y) / config.experience_size) for task in tasks]
    return [[next(parts) for _ in range(count)] for count in counts]


def right_experts(model: PoolClassifier, ledger: Ledger, by_class: bool) -> Tensor:
    """(n, E) bool: the experts that know a test sample's class, or where tasks share classes, that learned its task."""
    right = torch.zeros(len(ledger.y), model.pool.num_experts, dtype=torch.bool)
    known = model.classes_of()
    for position, (expert_id, task) in enumerate(zip(model.pool.ids, model.pool.tasks(), strict=True)):
        mine = torch.isin(ledger.y, torch.tensor(known.get(expert_id, []))) if by_class else ledger.task == task
        right[:, position] = mine
    return right


def gate_alone(model: PoolClassifier, router: FittedRouter, features: Tensor) -> tuple[Tensor, Tensor]:
    """The class that the gate by itself finds most likely, (n,), and the position of its expert, (n,)."""
    rows = model.pool.namespace(model.layer.namespace)
    joint, labels = router.class_log_joint(features, rows)
    best = joint.argmax(1)
    return labels[best], router.class_owner(rows)[best]
