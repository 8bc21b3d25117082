"""What a prediction is worth, task by task, and paired differences between methods.

Axes: B evaluation tasks, N target points, K experts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from modmoe.analysis import half_width
from modmoe.meta import Predictive, TaskBatch

METRICS = ("nll_marginal", "nll_joint", "mse")
CHUNK = 50  # tasks that are answered at once

Condition = tuple[str, ...]
Scores = dict[str, dict[Condition, Tensor]]
"""Metric -> condition, such as ("b", "5") -> (B,). Conditions of one first name hold the same tasks."""


def score(predictive: Predictive, target_y: Tensor, y_scale: float = 1.0) -> dict[str, Tensor]:
    """Each task's scores.

    Args:
        predictive: of B tasks.
        target_y: (B, N, M).
        y_scale: what y was divided by.
    Returns:
        (B,) each: ``nll_marginal`` is -ln p of a target by itself, averaged over them; ``nll_joint`` -ln p of all of
        them together, divided by N; both in the units of target_y. ``mse`` of the mean, in the units of y itself.
    """
    error = (predictive.mean - target_y).square().mean((1, 2))
    joint = -predictive.log_joint(target_y) / target_y.shape[1]
    return {
        "nll_marginal": -predictive.log_marginal(target_y).mean(1),
        "nll_joint": joint,
        "mse": y_scale**2 * error,
    }


@torch.no_grad()
def score_in_chunks(
    answer: Callable[[slice], Predictive], batch: TaskBatch, y_scale: float = 1.0, chunk: int = CHUNK
) -> dict[str, Tensor]:
    """`score`, some tasks at a time.

    Args:
        answer: rows of the batch -> their prediction.
        batch: with target_y.
        y_scale: as in `score`.
        chunk: so many tasks.
    """
    assert batch.target_y is not None
    parts = []
    for start in range(0, batch.num_tasks, chunk):
        rows = slice(start, start + chunk)
        parts.append(score(answer(rows), batch.target_y[rows], y_scale))
    return {metric: torch.cat([part[metric] for part in parts]) for metric in parts[0]}


def averages(scores: Scores) -> dict[str, float]:
    """``metric`` over everything, ``metric/first`` for each first name, ``metric/first/second`` for each condition.

    Conditions count equally in what is averaged over them.
    """
    found: dict[str, float] = {}
    for metric, of_condition in scores.items():
        found[metric] = float(per_task(scores, metric).mean())
        if any(len(condition) > 1 for condition in of_condition):
            for first in first_names(of_condition):
                found[f"{metric}/{first}"] = float(per_task(scores, metric, first).mean())
        for condition, values in of_condition.items():
            found["/".join((metric, *condition))] = float(values.double().mean())
    return found


class Difference(NamedTuple):
    """The mean of paired differences over tasks, and half of its 95% interval."""

    mean: float
    half_width: float


def paired_difference(first: Scores, second: Scores, metric: str, of: str | None = None) -> Difference:
    """first - second on the same tasks: a task's value is its mean over the conditions that it stands in.

    Args:
        first, second: of two methods.
        metric: which.
        of: one first name of conditions; None for all.
    """
    differences = (per_task(first, metric, of) - per_task(second, metric, of)).tolist()
    return Difference(float(np.mean(differences)), half_width(differences) or 0.0)


def per_task(scores: Scores, metric: str, of: str | None = None) -> Tensor:
    """Each task's mean over its conditions, in float64: the tasks of one first name after those of another."""
    chosen = scores[metric]
    names = first_names(chosen) if of is None else [of]
    means = [torch.stack([v for c, v in chosen.items() if c[0] == name]).double().mean(0) for name in names]
    return torch.cat(means)


def first_names(conditions: Sequence[Condition] | dict[Condition, Tensor]) -> list[str]:
    """The first names, once each."""
    return list(dict.fromkeys(condition[0] for condition in conditions))
