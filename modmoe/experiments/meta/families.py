"""The five families: neural processes, evidence-gated experts and MAML on the same fresh tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from modmoe.analysis import Matrix, MethodRecord, Picture
from modmoe.experiments.meta.families_settings import ABOUT, FamiliesSettings, Learner, Method, make_learner
from modmoe.experiments.meta.figures import draw_predictions, expert_curves
from modmoe.experiments.meta.scores import CHUNK, Scores, averages, paired_difference, score_in_chunks
from modmoe.experiments.meta.training import CALIBRATION, EVALUATION, TRAINING, fit, generator_of
from modmoe.growth import count_parameters
from modmoe.meta.families import FAMILIES, FamilyTasks, FiveFamilies

TRAINING_TARGETS = 20
CALIBRATION_TASKS = 300
VARIANTS = ("a", "b")
DRAWN = ("mdn_cnp", "moe_np", "bem_k1", "bem_k3", "bem_k3_switch", "maml", "maml_routed")  # methods with a figure
SINGLE = ("bem_k1", "maml")  # of these, with one expert
NUM_PANELS, PANEL_POINTS, PANEL_CONTEXT = 2, 200, 5  # of each variant


class Claim(NamedTuple):
    """A difference that the study is about: first - second."""

    first: Method
    second: Method
    metric: str
    variant: str | None = None

    @property
    def name(self) -> str:
        """As in ``bem_k3-bem_k1/nll_marginal``, with the variant behind it if it is of one alone."""
        return f"{self.first}-{self.second}/{self.metric}" + (f"/{self.variant}" if self.variant else "")


CLAIMS = [
    Claim("bem_k3", "bem_k1", "nll_marginal"),
    Claim("bem_k3", "bem_k1", "nll_joint"),
    Claim("bem_k3", "mdn_cnp", "nll_marginal"),
    Claim("bem_k3_switch", "bem_k3", "nll_marginal", "b"),
    Claim("moe_np", "np", "nll_joint", "b"),
    Claim("moe_np", "np", "nll_marginal"),
    Claim("maml_routed", "maml", "mse"),
    Claim("maml_routed", "maml_wide", "mse"),
]


@dataclass
class FamiliesConfig(FamiliesSettings):
    """One family a task (a), or two that meet at a breakpoint (b)."""

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        """Run every method with one seed; see `modmoe.experiments.registry.ExperimentConfig`."""
        evaluation = self.evaluation_sets(seed)
        records, scores = {}, {}
        for method in self.methods:
            progress(method)
            learner = make_learner(self, method, seed)
            seconds = fit(learner.model, learner.schedule, self.training_loss(learner, seed))
            if method.startswith("maml"):
                self.calibrate(learner, seed)
            progress(f"{method}, evaluation")
            scores[method] = evaluate(learner, evaluation)
            records[method] = MethodRecord(averages(scores[method]), about=ABOUT[method])
            numbers = {"parameters": float(count_parameters(learner.model).total), "seconds": seconds}
            records[method].metrics |= numbers
            routed = method == "maml_routed"
            if method in DRAWN:
                records[method].pictures["predictions"] = self.draw(learner, method, seed, routed)
            if method in DRAWN and method not in SINGLE:
                records[method].matrices["assignment"] = assignment(learner, evaluation, routed)
        add_differences(records, scores)
        return records

    def evaluation_sets(self, seed: int) -> dict[tuple[str, ...], FamilyTasks]:
        """(variant, context size) -> tasks, the same tasks and targets for all sizes of a variant."""
        sets: dict[tuple[str, ...], FamilyTasks] = {}
        for stream, variant in enumerate(VARIANTS):
            number = generator_of(EVALUATION, seed, stream).initial_seed()
            of_variant = FiveFamilies().evaluation_sets(
                number, self.evaluation_tasks, self.contexts, self.targets, variant
            )
            sets |= {(variant, str(size)): tasks for size, tasks in of_variant.items()}
        return sets

    def training_loss(self, learner: Learner, seed: int) -> Callable[[int], Tensor]:
        """Number of the iteration -> loss on fresh tasks of both variants; all methods with a batch size see the
        same."""
        families, generator = FiveFamilies(), generator_of(TRAINING, seed)

        def loss(iteration: int) -> Tensor:
            size = self.contexts[iteration % len(self.contexts)]
            return learner.loss(families.sample(learner.schedule.tasks, size, TRAINING_TARGETS, generator))

        return loss

    @torch.no_grad()
    def calibrate(self, learner: Learner, seed: int) -> None:
        """Set MAML's noise, which its training leaves alone, to the root of its mean squared error on other tasks."""
        families, generator = FiveFamilies(), generator_of(CALIBRATION, seed)
        squares = []
        for size in self.contexts:
            tasks = families.sample(CALIBRATION_TASKS, size, TRAINING_TARGETS, generator)
            assert tasks.batch.target_y is not None
            mean = learner.answer(tasks, slice(None)).mean
            squares.append((mean - tasks.batch.target_y).square().mean())
        learner.model.noise_std = float(torch.stack(squares).mean().sqrt())  # type: ignore[assignment]

    @torch.no_grad()
    def draw(self, learner: Learner, method: Method, seed: int, latents_are_experts: bool) -> Picture:
        """Some tasks of both variants that are the same for all methods."""
        generator = generator_of(EVALUATION, seed, len(VARIANTS))
        tasks = FiveFamilies().sample(2 * NUM_PANELS, PANEL_CONTEXT, PANEL_POINTS, generator, "mix")
        predictive = learner.answer(tasks, slice(None))
        caption = (
            f"{method} on fresh tasks with {PANEL_CONTEXT} context points. Above: each expert's curve, drawn the "
            "stronger the more weight it has on average. Below: the experts' weights at each point."
        )
        titles = [title(tasks, task) for task in range(2 * NUM_PANELS)]
        return draw_predictions(tasks.batch, tasks.clean_y, predictive, titles, caption, latents_are_experts)


def evaluate(learner: Learner, evaluation: dict[tuple[str, ...], FamilyTasks]) -> Scores:
    """Scores of every task: NLL in units of y / 3, MSE in those of y."""
    found: Scores = {}
    for condition, tasks in evaluation.items():

        def answer(rows: slice, tasks: FamilyTasks = tasks):
            return learner.answer(tasks, rows)

        for metric, values in score_in_chunks(answer, tasks.batch, FiveFamilies().y_scale).items():
            found.setdefault(metric, {})[condition] = values
    return found


@torch.no_grad()
def assignment(learner: Learner, evaluation: dict[tuple[str, ...], FamilyTasks], latents_are_experts: bool) -> Matrix:
    """The mean weight of each expert at target points of each family, over all evaluation tasks."""
    found = []
    for tasks in evaluation.values():
        for start in range(0, tasks.batch.num_tasks, CHUNK):
            rows = slice(start, start + CHUNK)
            weights = expert_curves(learner.answer(tasks, rows), latents_are_experts)[1].flatten(0, 1)
            family = torch.nn.functional.one_hot(tasks.target_family[rows].flatten(), len(FAMILIES)).to(weights)
            found.append((family.T @ weights, family.sum(0)))
    sums, counts = (torch.stack(parts).sum(0) for parts in zip(*found, strict=True))
    names = [f"expert {number}" for number in range(sums.shape[1])]
    return Matrix((sums / counts.unsqueeze(1)).numpy(), "family of the point", "expert", list(FAMILIES), names)


def add_differences(records: dict[str, MethodRecord], scores: dict[Method, Scores]) -> None:
    """Write the claims' paired differences, and half of their 95% intervals over tasks, into the first's record."""
    for claim in CLAIMS:
        if claim.first in scores and claim.second in scores:
            pair = scores[claim.first], scores[claim.second]
            found = paired_difference(*pair, claim.metric, claim.variant)
            metrics = records[claim.first].metrics
            metrics[f"difference/{claim.name}"] = found.mean
            metrics[f"half_width/{claim.name}"] = found.half_width


def title(tasks: FamilyTasks, task: int) -> str:
    """A task's families from left to right."""
    order = tasks.batch.target_x[task, :, 0].argsort()
    numbers = dict.fromkeys(tasks.target_family[task, order].tolist())
    return ", then ".join(FAMILIES[number] for number in numbers)
