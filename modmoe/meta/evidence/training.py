"""The loss that trains evidence-gated experts."""

from typing import Literal

from torch import Tensor

from modmoe.meta.evidence.predictives import EvidencePredictive
from modmoe.meta.task_batch import TaskBatch

Objective = Literal["marginal", "joint"]


def prediction_loss(
    predictive: EvidencePredictive,
    tasks: TaskBatch,
    objective: Objective = "marginal",
    evidence_weight: float = 0.0,
) -> Tensor:
    """Mean over tasks of -ln p(targets | context) / N, plus the weight times -ln p(context) / C.

    The figures of configs were calibrated with the defaults: the marginal objective alone.

    Args:
        predictive: of the tasks.
        tasks: with target_y.
        objective: "marginal" takes the points of a task by themselves, "joint" together.
        evidence_weight: >= 0; with objective "joint" and equal weights per point the two add up to the likelihood of
            the whole task.
    Returns:
        () float.
    Raises:
        ValueError: without target_y, or on an unknown objective.
    """
    if tasks.target_y is None:
        raise ValueError("the loss needs target_y")
    if objective == "marginal":
        loss = -predictive.log_marginal(tasks.target_y).mean()
    elif objective == "joint":
        loss = -predictive.log_joint(tasks.target_y).mean() / max(tasks.target_y.shape[1], 1)
    else:
        raise ValueError(f"objective is 'marginal' or 'joint', got {objective!r}")
    if evidence_weight:
        num_context = tasks.present.sum(1).clamp_min(1)
        loss = loss - evidence_weight * (predictive.log_evidence / num_context).mean()
    return loss
