"""Families that come one after the other: experts that grow and freeze, beside a model that goes on and a new one.

Axes: F families in the order in which they come; stages s = 0..F-1, one for each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from modmoe.analysis import Matrix, MethodRecord
from modmoe.experiments.meta.families_settings import check_distinct
from modmoe.experiments.meta.figures import draw_predictions
from modmoe.experiments.meta.scores import CHUNK
from modmoe.experiments.meta.training import CALIBRATION, EVALUATION, TRAINING, Schedule, fit, generator_of
from modmoe.growth import count_parameters
from modmoe.meta import TaskBatch
from modmoe.meta.evidence import BayesianExpertMixture, calibrate_novelty, prediction_loss
from modmoe.meta.families import FAMILIES, FamilyTasks, FiveFamilies

TRAINING_TARGETS = 20
TASKS = 32  # in a training step
HIDDEN_FEATURES = 40  # of an expert
NLL = "NLL after each family"

ABOUT = {
    "pool": "a new expert for each family, told when one begins; all older ones are frozen",
    "pool_novelty": "a new expert where the evidence of the others says that a family is new; told nothing",
    "naive": "as many experts from the start, trained on one family after the other",
    "joint": "a new mixture after each family, as large as the pool, trained on all families so far",
}


@dataclass
class GrowthConfig:
    """Variant (c) of the five families, by the NLL of target points in units of y / 3.

    Args:
        families: the order in which they come.
        iterations: for each family, on 32 tasks; the joint mixture has as many for each family that it knows.
        evaluation_tasks: of each family.
        calibration_tasks: of each family and context size, that the novelty test is calibrated on when it has been
            learned; they are kept.
        novelty_tasks: of each context size, of a family that begins, on which the test is made.
        quantile: the share of known tasks that the test may call novel.
        contexts: their sizes, in training in turn and in evaluation.
        targets: points of an evaluation task; 20 in training.
    """

    families: list[str] = field(default_factory=lambda: list(FAMILIES))
    iterations: int = 600
    evaluation_tasks: int = 500
    calibration_tasks: int = 200
    novelty_tasks: int = 20
    quantile: float = 0.05
    contexts: list[int] = field(default_factory=lambda: [3, 5, 10])
    targets: int = 30

    def __post_init__(self) -> None:
        FiveFamilies(self.families)  # names them all, or says which is unknown
        numbers = (self.iterations, self.evaluation_tasks, self.novelty_tasks, self.targets)
        if min(numbers) < 1 or len(self.families) < 2:
            raise ValueError("every number must be at least 1, and there are two families at least")
        if not 0 < self.quantile < 1 or self.calibration_tasks * self.quantile < 1:
            raise ValueError(
                f"calibration_tasks times quantile must be at least 1, got {self.calibration_tasks} and {self.quantile}"
            )
        check_distinct("contexts", self.contexts)

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        """Run every method with one seed; see `modmoe.experiments.registry.ExperimentConfig`."""
        stream = Stream(self, seed)
        progress("joint")
        joint = self.run_joint(stream)
        records = {}
        for method, told in (("pool", True), ("pool_novelty", False)):
            progress(method)
            records[method] = self.run_pool(stream, told)
        progress("naive")
        records["naive"] = self.run_naive(stream)
        records["joint"] = joint
        again = joint.matrices[NLL].values
        for method, record in records.items():
            own = record.matrices[NLL].values
            record.metrics |= summary(own)
            if method != "joint":
                # how much worse a family is, when it has been learned, than for a model made anew with all data
                gaps = np.diagonal(own - again)
                record.metrics["new_family_gap"] = float(gaps[1:].mean())
                record.metrics |= {f"new_family_gap/{self.families[s]}": float(gaps[s]) for s in range(1, len(gaps))}
            record.about = ABOUT[method]
        return records

    def run_pool(self, stream: "Stream", told: bool) -> MethodRecord:
        """Grow, train the new expert alone, freeze it.

        Where nobody tells the boundaries, a family on which the test keeps silent is left to the experts that are
        there: they are frozen and learn nothing.
        """
        torch.manual_seed(stream.seed)
        model = self.mixture(1)
        before: list[tuple[int, ...]] = []  # the experts that there were after each stage
        rows, masked, sizes, seconds, grown = [], [], [], 0.0, [1.0]
        for stage in range(len(self.families)):
            grow = stage > 0 and (told or self.is_new(model, stream, stage))
            if stage:
                grown.append(float(grow))
            new = model.grow(task=self.families[stage]) if grow else list(model.pool.ids) if stage == 0 else []
            if new:
                seconds += fit(model, self.schedule(1), stream.training_loss(model, [stage], new))
                model.freeze(new)
            before.append(model.pool.ids)
            sizes.append(float(len(model.pool.ids)))
            rows.append(stream.row(model))
            masked.append([stream.nll(model, family, before[family]) for family in range(stage + 1)])
        metrics = rises(rows, masked) | {"num_experts": sizes[-1], "seconds": seconds}
        metrics["parameters"] = float(count_parameters(model).total)
        record = MethodRecord(metrics, {NLL: self.matrix(rows)}, {"num_experts": sizes})
        if not told:
            record.metrics["grown"] = float(np.mean(grown[1:]))
            record.metrics |= {f"grown/{name}": grown[s] for s, name in enumerate(self.families) if s}
        self.draw(model, stream, record)
        return record

    def run_naive(self, stream: "Stream") -> MethodRecord:
        """One mixture with as many experts as families goes on training."""
        torch.manual_seed(stream.seed)
        model = self.mixture(len(self.families))
        rows, seconds = [], 0.0
        for stage in range(len(self.families)):
            seconds += fit(model, self.schedule(1), stream.training_loss(model, [stage]))
            rows.append(stream.row(model))
        metrics = {"parameters": float(count_parameters(model).total), "seconds": seconds}
        record = MethodRecord(metrics, {NLL: self.matrix(rows)})
        self.draw(model, stream, record)
        return record

    def run_joint(self, stream: "Stream") -> MethodRecord:
        """A new mixture at every stage, with as many experts as families so far, on all of these."""
        rows, seconds, model = [], 0.0, None
        for stage in range(len(self.families)):
            torch.manual_seed(stream.seed)
            model = self.mixture(stage + 1)
            seen = list(range(stage + 1))
            seconds += fit(model, self.schedule(stage + 1), stream.training_loss(model, seen))
            rows.append(stream.row(model))
        assert model is not None
        metrics = {"parameters": float(count_parameters(model).total), "seconds": seconds}
        record = MethodRecord(metrics, {NLL: self.matrix(rows)})
        self.draw(model, stream, record)
        return record

    def is_new(self, model: BayesianExpertMixture, stream: "Stream", stage: int) -> bool:
        """Whether the experts of earlier families explain too few tasks of this one."""
        known = [
            stream.tasks(CALIBRATION, family, size, self.calibration_tasks).batch
            for family in range(stage)
            for size in self.contexts
        ]
        test = calibrate_novelty(model, known, self.quantile)
        fresh = [stream.tasks(CALIBRATION, stage, size, self.novelty_tasks).batch for size in self.contexts]
        return test.nobody_explains(model, padded(fresh))

    def mixture(self, num_experts: int) -> BayesianExpertMixture:
        """With experts of one size."""
        return BayesianExpertMixture(1, num_experts=num_experts, hidden_features=HIDDEN_FEATURES)

    def schedule(self, num_families: int) -> Schedule:
        """As many iterations for each family."""
        return Schedule(self.iterations * num_families, TASKS, 3e-3, clip=1.0)

    def matrix(self, rows: Sequence[Sequence[float]]) -> Matrix:
        """NLL after each family (rows) of each family (columns)."""
        return Matrix(np.array(rows), "after", "family", self.families, self.families)

    @torch.no_grad()
    def draw(self, model: BayesianExpertMixture, stream: "Stream", record: MethodRecord) -> None:
        """One task of each family, at the end."""
        picked = [stream.tasks(EVALUATION, f, 5, 1, targets=200) for f in range(len(self.families))]
        batch = stacked([tasks.batch for tasks in picked])
        clean = torch.cat([tasks.clean_y for tasks in picked])
        caption = "A task of each family after the last one was learned; below, the experts' weights."
        record.pictures["predictions"] = draw_predictions(batch, clean, model(batch), self.families, caption)


class Stream(NamedTuple):
    """The tasks of a seed."""

    config: GrowthConfig
    seed: int

    def tasks(self, purpose: int, family: int, size: int, count: int, targets: int | None = None) -> FamilyTasks:
        """Always the same tasks for the same arguments."""
        # a context size has a stream of its own, so that its tasks are others
        stream = family + len(FAMILIES) * (self.config.contexts.index(size) if size in self.config.contexts else 10)
        generator = generator_of(purpose, self.seed, stream)
        families = FiveFamilies(self.config.families)
        return families.sample(count, size, targets or self.config.targets, generator, "c", family)

    def training_loss(
        self, model: BayesianExpertMixture, stages: Sequence[int], experts: Sequence[int] | None = None
    ) -> Callable[[int], Tensor]:
        """Number of the iteration -> loss on fresh tasks, of each stage as many.

        Args:
            model: what is trained.
            stages: families that there are tasks of.
            experts: that answer; None for all.
        """
        config, families = self.config, FiveFamilies(self.config.families)
        # the joint mixture draws all stages' tasks from one stream: it shares none with the others' stages
        generator = generator_of(TRAINING, self.seed, stages[0] if len(stages) == 1 else 10 + len(stages))

        def loss(iteration: int) -> Tensor:
            size = config.contexts[iteration % len(config.contexts)]
            # 32 tasks in all, the families with one more than the others in turn
            shares = [(TASKS + (index + iteration) % len(stages)) // len(stages) for index in range(len(stages))]
            parts = [
                families.sample(share, size, TRAINING_TARGETS, generator, "c", stage).batch
                for share, stage in zip(shares, stages, strict=True)
            ]
            batch = stacked(parts)
            return prediction_loss(model(batch, experts), batch)

        return loss

    @torch.no_grad()
    def nll(self, model: BayesianExpertMixture, family: int, experts: Sequence[int] | None = None) -> Tensor:
        """(contexts * tasks,): of each evaluation task of a family."""
        found = []
        for size in self.config.contexts:
            batch = self.tasks(EVALUATION, family, size, self.config.evaluation_tasks).batch
            for start in range(0, batch.num_tasks, CHUNK):
                rows = batch[start : start + CHUNK]
                assert rows.target_y is not None
                found.append(-model(rows, experts).log_marginal(rows.target_y).mean(1))
        return torch.cat(found)

    def row(self, model: BayesianExpertMixture) -> list[float]:
        """The mean NLL of every family, also of those to come."""
        return [float(self.nll(model, family).double().mean()) for family in range(len(self.config.families))]


def rises(rows: Sequence[Sequence[float]], masked: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """How much the old families' NLL rises when a new one has been learned.

    Args:
        rows: after each stage, of each family, through the gate.
        masked: after each stage, of each family so far, every task's, with the experts of that family's own stage.
    Returns:
        ``rise_masked``: the largest change of any task of an old family from its own stage to any later one, 0 where
        all numbers are the same to the last bit. ``rise_gated``: the mean over new families of the mean rise of those
        before it, through the gate; ``rise_gated_max`` its largest.
    """
    changes = [
        float((of_stage[family] - masked[family][family]).abs().max())
        for stage, of_stage in enumerate(masked)
        for family in range(stage)
    ]
    gated = [
        float(np.mean([rows[stage][family] - rows[stage - 1][family] for family in range(stage)]))
        for stage in range(1, len(rows))
    ]
    return {"rise_masked": max(changes), "rise_gated": float(np.mean(gated)), "rise_gated_max": max(gated)}


def summary(nll: np.ndarray) -> dict[str, float]:
    """Of a matrix (after, family): ``nll`` the mean over families in the end, ``rise`` of the mean family but the last
    from its own stage to the end."""
    last = len(nll) - 1
    rise = np.mean([nll[last, family] - nll[family, family] for family in range(last)])
    return {"nll": float(nll[last].mean()), "rise": float(rise)}


def stacked(batches: Sequence[TaskBatch]) -> TaskBatch:
    """Batches of equal sizes as one."""
    names = ("context_x", "context_y", "target_x", "target_y")
    return TaskBatch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in names))


def padded(batches: Sequence[TaskBatch]) -> TaskBatch:
    """The contexts of batches as one batch, masked where a context is shorter."""
    longest = max(batch.context_x.shape[1] for batch in batches)
    parts = []
    for batch in batches:
        missing = longest - batch.context_x.shape[1]
        x, y = (torch.nn.functional.pad(t, (0, 0, 0, missing)) for t in (batch.context_x, batch.context_y))
        parts.append((x, y, batch.target_x[:, :0], torch.nn.functional.pad(batch.present, (0, missing))))
    x, y, target_x, mask = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return TaskBatch(x, y, target_x, None, mask)
