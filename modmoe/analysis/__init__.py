"""Records, summaries and reports of runs; measures of how experts are used and what they specialise in."""

from modmoe.analysis.records import Matrix, MethodRecord, Picture, half_width, mean_matrices, summarise
from modmoe.analysis.report import result_table, write_report
from modmoe.analysis.specialization import (
    assignment_accuracy,
    joint_distribution,
    mean_entropy,
    mutual_information,
    token_entropy,
    token_expert_information,
)
from modmoe.analysis.tensorboard import write_events, write_usage
from modmoe.analysis.usage import (
    coefficient_of_variation,
    dead_experts,
    dropped_fraction,
    load,
    max_violation,
    usage_metrics,
)

__all__ = [
    "Matrix",
    "MethodRecord",
    "Picture",
    "assignment_accuracy",
    "coefficient_of_variation",
    "dead_experts",
    "dropped_fraction",
    "half_width",
    "joint_distribution",
    "load",
    "max_violation",
    "mean_entropy",
    "mean_matrices",
    "mutual_information",
    "result_table",
    "summarise",
    "token_entropy",
    "token_expert_information",
    "usage_metrics",
    "write_events",
    "write_report",
    "write_usage",
]
