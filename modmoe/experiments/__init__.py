"""The loops behind ``modmoe run``, one file a domain."""

from modmoe.experiments.registry import (
    EXPERIMENTS,
    ExperimentConfig,
    UnknownExperimentError,
    load_config_class,
)
from modmoe.experiments.runner import run_experiment

__all__ = ["EXPERIMENTS", "ExperimentConfig", "UnknownExperimentError", "load_config_class", "run_experiment"]
