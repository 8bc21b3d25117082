"""Multi-task learning: several tasks' gates and towers on one pool of experts."""

from modmoe.multitask.bottoms import SharedBottom, SingleTask
from modmoe.multitask.data import MultiTaskData
from modmoe.multitask.experts import LayerExpert
from modmoe.multitask.features import FeatureFront
from modmoe.multitask.gates import GatedLevel, TaskRouter
from modmoe.multitask.losses import UncertaintyWeighting, multitask_loss, task_losses
from modmoe.multitask.mixtures import MMoE, OneGateMoE
from modmoe.multitask.model import MultiTaskModel
from modmoe.multitask.ple import PLE
from modmoe.multitask.synthetic import synthetic_tasks
from modmoe.multitask.training import area_under_curve, fit, mean_squared_error, predict
from modmoe.multitask.usage import gate_usage

__all__ = [
    "PLE",
    "FeatureFront",
    "GatedLevel",
    "LayerExpert",
    "MMoE",
    "MultiTaskData",
    "MultiTaskModel",
    "OneGateMoE",
    "SharedBottom",
    "SingleTask",
    "TaskRouter",
    "UncertaintyWeighting",
    "area_under_curve",
    "fit",
    "gate_usage",
    "mean_squared_error",
    "multitask_loss",
    "predict",
    "synthetic_tasks",
    "task_losses",
]
