"""A multi-task run: every method on the same data, with one seed."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from modmoe.analysis import MethodRecord
from modmoe.experiments.multitask.methods import ABOUT, build
from modmoe.experiments.multitask.settings import Method, MultitaskSettings
from modmoe.growth import count_parameters
from modmoe.multitask import (
    MultiTaskData,
    UncertaintyWeighting,
    area_under_curve,
    fit,
    gate_usage,
    mean_squared_error,
    predict,
    synthetic_tasks,
)
from modmoe.multitask.census import load_census
from modmoe.multitask.movielens import load_movielens


@dataclass
class MultitaskConfig(MultitaskSettings):
    """Several tasks at once: test error (regression) or area under the ROC curve (binary) of each."""

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        """Run every method with one seed; see `modmoe.experiments.registry.ExperimentConfig`."""
        progress("data")
        train, test = self.load(seed)
        records = {}
        for method in self.methods:
            progress(method)
            records[method] = self.run_method(method, train, test, seed)
        return records

    def load(self, seed: int) -> tuple[MultiTaskData, MultiTaskData]:
        """Training and test data."""
        if self.data == "synthetic":
            train, test = synthetic_tasks(self.rho, [self.num_train or 20_000, self.num_test or 4_000], seed=seed)
            return train, test
        load = load_census if self.data == "census" else load_movielens
        train, test = load(self.root, seed)
        return train.first(self.num_train), test.first(self.num_test)

    def run_method(self, method: Method, train: MultiTaskData, test: MultiTaskData, seed: int) -> MethodRecord:
        """Train one method and test it."""
        model = build(method, self, train, seed)
        balance = UncertaintyWeighting(train.tasks) if self.balance == "uncertainty" else None
        start = time.perf_counter()
        fit(model, train, self.epochs, self.batch_size, self.learning_rate, balance, seed=seed)
        seconds = time.perf_counter() - start
        metrics = scores(predict(model, test), test)
        numbers = {"parameters": float(count_parameters(model).total), "seconds": seconds}
        about = ABOUT[method].format(size=self.single_task_size)
        return MethodRecord({**metrics, **numbers}, matrices=gate_usage(model, test), about=about)


def scores(outputs: dict[str, torch.Tensor], data: MultiTaskData) -> dict[str, float]:
    """The mean over the tasks of a kind, then each task's: ``test_mse`` of regressions, ``test_auc`` of binary ones."""
    metrics: dict[str, float] = {}
    for metric, kind, score in (
        ("test_mse", "regression", mean_squared_error),
        ("test_auc", "binary", area_under_curve),
    ):
        names = [name for name in data.tasks if data.tasks[name] == kind]
        if names:
            each = {name: score(outputs[name], data.targets[name]) for name in names}
            metrics[metric] = sum(each.values()) / len(each)
            metrics |= {f"{metric}/{name}": value for name, value in each.items()}
    return metrics
