"""Records, summaries and reports of runs; measures of how experts are used and what they specialise in."""

from modmoe.analysis.records import Matrix, MethodRecord, half_width, mean_matrices, summarise
from modmoe.analysis.report import result_table, write_report
from modmoe.analysis.specialization import assignment_accuracy, joint_distribution, mutual_information
from modmoe.analysis.tensorboard import write_events
from modmoe.analysis.usage import coefficient_of_variation, dead_experts, load, max_violation

__all__ = [
    "Matrix",
    "MethodRecord",
    "assignment_accuracy",
    "coefficient_of_variation",
    "dead_experts",
    "half_width",
    "joint_distribution",
    "load",
    "max_violation",
    "mean_matrices",
    "mutual_information",
    "result_table",
    "summarise",
    "write_events",
    "write_report",
]
