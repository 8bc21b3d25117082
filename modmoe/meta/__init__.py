"""Meta-learning: few-shot tasks, neural processes, evidence-gated experts, and pools inside learn2learn."""

from modmoe.meta.predictive import FunctionMixture, PointMixture, Predictive
from modmoe.meta.task_batch import TaskBatch

__all__ = ["FunctionMixture", "PointMixture", "Predictive", "TaskBatch"]
