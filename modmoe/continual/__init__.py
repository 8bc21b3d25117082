"""Continual learning on Avalanche."""

from modmoe.hosts import import_host

import_host("avalanche.training")

from modmoe.continual.classifier import UNKNOWN, PoolClassifier, task_positions  # noqa: E402
from modmoe.continual.consolidation import (  # noqa: E402
    ConsolidationPlugin,
    RedundantPair,
    measure_usage,
    merge_experts,
    prune_experts,
    redundant_experts,
)
from modmoe.continual.novelty import GrowthRule, NewClasses, Novelty  # noqa: E402
from modmoe.continual.plugin import ExpertPoolPlugin  # noqa: E402
from modmoe.continual.resume import resume_stream, save_stream  # noqa: E402
from modmoe.continual.task_incremental import TaskPool  # noqa: E402

__all__ = [
    "UNKNOWN",
    "ConsolidationPlugin",
    "ExpertPoolPlugin",
    "GrowthRule",
    "NewClasses",
    "Novelty",
    "PoolClassifier",
    "RedundantPair",
    "TaskPool",
    "measure_usage",
    "merge_experts",
    "prune_experts",
    "redundant_experts",
    "resume_stream",
    "save_stream",
    "task_positions",
]
