"""A continual-learning run: every method on one stream, with one seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from modmoe.analysis import MethodRecord
from modmoe.continual.features import ConcatFeatures, PatchFeatures, RandomFeatures
from modmoe.continual.strategies import without_avalanche_s_warnings
from modmoe.continual.streams import StreamSettings, TaskData, load_stream, shares_classes
from modmoe.experiments.continual.baselines import run_network, run_pnn
from modmoe.experiments.continual.gates import GATE_NAMES
from modmoe.experiments.continual.pool import run_pool
from modmoe.experiments.continual.settings import ContinualSettings

ABOUT = {
    "pool": "a growing pool; each sample goes to the expert whose {gate} explains it best",
    "oracle": "the experts of 'pool', told the task of each test sample: what perfect routing would give",
    "router_only": "the gate of 'pool' as a classifier of its own, without any expert",
    "streaming_ridge": "one ridge regression over all classes from the moments that the gate shares",
    "naive": "one {network} with as many numbers as 'pool' keeps, trained on the tasks in sequence",
    "replay": "the same {network} with {memory} stored samples of earlier tasks",
    "gdumb": "the same {network} trained anew after each task, on {memory} stored samples alone",
    "ewc": "the same {network} with elastic weight consolidation (online)",
    "lwf": "the same {network} with learning without forgetting",
    "pnn": "progressive networks of the same size in all, told the task of each test sample",
    "joint": "the same {network} trained on all tasks at once",
}


@dataclass
class ContinualConfig(ContinualSettings):
    """A stream of tasks; no task id at test time, no stored samples except where a method says so."""

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        """Run every method with one seed; see `modmoe.experiments.registry.ExperimentConfig`."""
        with without_avalanche_s_warnings():
            return self._run(seed, progress)

    def _run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        settings = StreamSettings(self.num_tasks, self.test_share, self.root, self.limit)
        tasks = load_stream(self.stream, seed, settings)
        if self.experience_size and shares_classes(tasks):
            raise ValueError(f"a single pass without boundaries needs tasks of different classes, not {self.stream}")
        num_pixels = tasks[0].train_x.shape[1]
        if self.features == "random":
            tasks = with_features(tasks, RandomFeatures(num_pixels, self.num_filters, seed))
        if self.features == "patches":
            progress("features")
            images = tasks[0].train_x
            if self.filter_images is not None:
                order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
                images = images[order[: self.filter_images]]
            extractor = PatchFeatures(num_filters=self.num_filters, seed=seed)
            extractor.fit(images)
            tasks = with_features(tasks, extractor)
        progress("pool")
        pool = run_pool(self, tasks, self.gate, seed, num_pixels)
        records = {"pool": pool["pool"]}
        for gate in self.other_gates:
            progress(f"pool_{gate}")
            records[f"pool_{gate}"] = run_pool(self, tasks, gate, seed, num_pixels)["pool"]
        records |= {name: record for name, record in pool.items() if name != "pool"}
        for name in self.baselines:
            progress(name)
            parameters = pool["pool"].metrics["parameters"]
            if name == "pnn":
                records[name] = run_pnn(self, tasks, seed, parameters)
            else:
                records[name] = run_network(self, tasks, name, seed, parameters, num_pixels)
        for name, record in records.items():
            gate = name.removeprefix("pool_") if name.startswith("pool_") else self.gate
            text = ABOUT["pool" if name.startswith("pool") else name]
            network = "MLP" if self.expert == "mlp" else "CNN"
            record.about = text.format(gate=GATE_NAMES[gate], memory=self.memory, network=network)
        return records


def with_features(tasks: Sequence[TaskData], extractor: nn.Module) -> list[TaskData]:
    """The tasks with a frozen extractor's features before the pixels.

    Computed once for all methods, which makes no difference to computing them in each step.
    """
    both = ConcatFeatures(extractor, nn.Identity())
    with torch.no_grad():
        return [TaskData(both(t.train_x), t.train_y, both(t.test_x), t.test_y) for t in tasks]
