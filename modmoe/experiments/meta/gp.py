"""Functions of Gaussian processes: neural processes beside the oracle, who knows the kernel of each task."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from modmoe.analysis import MethodRecord
from modmoe.experiments.meta.families_settings import check_distinct
from modmoe.experiments.meta.figures import draw_predictions
from modmoe.experiments.meta.processes import ABOUT, PROCESS_NAMES, Process, ProcessName, make_process
from modmoe.experiments.meta.scores import CHUNK, Scores, averages, score_in_chunks
from modmoe.experiments.meta.training import EVALUATION, TRAINING, Schedule, fit, generator_of
from modmoe.growth import count_parameters
from modmoe.meta import Predictive
from modmoe.meta.families import GaussianProcessFamily
from modmoe.meta.families.gaussian_processes import KERNELS, GaussianProcessTasks

TNP_CONTEXT = (3, 46)
NAMES = {"nll_marginal": "log_likelihood", "nll_joint": "log_likelihood_joint"}


@dataclass
class GaussianProcessConfig:
    """Trained on one kernel, tested on all; contexts of 3 to 46 points.

    Args:
        methods: which run; the oracle always does.
        kernel: of the tasks in training.
        iterations: of Adam.
        tasks: in each of them.
        learning_rate: its maximum.
        targets: points of a task besides its context.
        evaluation_tasks: of each kernel.
        num_samples: draws of a latent in evaluation.
    """

    methods: list[ProcessName] = field(default_factory=lambda: list(PROCESS_NAMES))
    kernel: Literal["rbf", "matern52", "periodic"] = "rbf"
    iterations: int = 3000
    tasks: int = 32
    learning_rate: float = 2e-3
    targets: int = 30
    evaluation_tasks: int = 500
    num_samples: int = 32

    def __post_init__(self) -> None:
        if min(self.iterations, self.tasks, self.targets, self.evaluation_tasks, self.num_samples) < 1:
            raise ValueError("every number of iterations, tasks, targets and samples must be at least 1")
        check_distinct("methods", self.methods)

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        """Run every method with one seed; see `modmoe.experiments.registry.ExperimentConfig`."""
        evaluation = {
            kernel: GaussianProcessFamily(kernel).sample(
                self.evaluation_tasks, TNP_CONTEXT, self.targets, generator_of(EVALUATION, seed, stream)
            )
            for stream, kernel in enumerate(KERNELS)
        }
        progress("oracle")
        oracle = log_likelihoods(score_oracle(evaluation))
        records = {}
        for method in self.methods:
            progress(method)
            process = make_process(method, 1, self.num_samples, seed)
            seconds = self.train(process, seed)
            found = log_likelihoods(score_process(process, evaluation))
            record = MethodRecord(found, about=ABOUT[method])
            gaps = {name: oracle[name] - found[name] for name in oracle if name.startswith("log_likelihood/")}
            record.metrics |= {name.replace("log_likelihood", "gap"): value for name, value in gaps.items()}
            numbers = {"parameters": float(count_parameters(process.model).total), "seconds": seconds}
            record.metrics |= numbers
            self.draw(process, method, seed, record)
            records[method] = record
        records["oracle"] = MethodRecord(oracle, about="the exact answer of one who knows the kernel and its numbers")
        return records

    def train(self, process: Process, seed: int) -> float:
        """Seconds of training on fresh tasks."""
        family, generator = GaussianProcessFamily(self.kernel), generator_of(TRAINING, seed)
        schedule = Schedule(self.iterations, self.tasks, self.learning_rate, clip=5.0)

        def loss(iteration: int) -> torch.Tensor:
            return process.loss(family.sample(self.tasks, TNP_CONTEXT, self.targets, generator).batch)

        return fit(process.model, schedule, loss)

    @torch.no_grad()
    def draw(self, process: Process, method: str, seed: int, record: MethodRecord) -> None:
        """A task of each kernel with ten points."""
        picked = [
            GaussianProcessFamily(kernel).sample(1, 10, 200, generator_of(EVALUATION, seed, 10 + stream)).batch
            for stream, kernel in enumerate(KERNELS)
        ]
        for kernel, batch in zip(KERNELS, picked, strict=True):
            assert batch.target_y is not None
            caption = f"{method} on a {kernel} task with ten context points"
            picture = draw_predictions(batch, batch.target_y, process.answer(batch), [kernel], caption)
            record.pictures[f"predictions, {kernel}"] = picture


def score_process(process: Process, evaluation: dict[str, GaussianProcessTasks]) -> Scores:
    """Of each kernel's tasks."""
    found: Scores = {}
    for kernel, tasks in evaluation.items():
        batch = tasks.batch

        def answer(rows: slice, batch=batch) -> Predictive:
            return process.answer(batch[rows])

        for metric, values in score_in_chunks(answer, batch).items():
            found.setdefault(metric, {})[(kernel,)] = values
    return found


def score_oracle(evaluation: dict[str, GaussianProcessTasks]) -> Scores:
    """Of the exact answer, in float64."""
    found: Scores = {}
    for kernel, tasks in evaluation.items():
        exact = tasks.oracle()  # of all tasks at once: its covariances are small
        batch = tasks.batch.to(torch.float64)

        def answer(rows: slice, exact=exact) -> Predictive:
            return type(exact)(exact.means[rows], exact.covariances[rows], exact.log_weights[rows])

        for metric, values in score_in_chunks(answer, batch, chunk=CHUNK).items():
            found.setdefault(metric, {})[(kernel,)] = values
    return found


def log_likelihoods(scores: Scores) -> dict[str, float]:
    """Averages as the field prints them: the log-likelihood of a point, not its negative."""
    found = {}
    for name, value in averages(scores).items():
        metric, *condition = name.split("/")
        sign = -1 if metric in NAMES else 1
        found["/".join((NAMES.get(metric, metric), *condition))] = sign * value
    return found
