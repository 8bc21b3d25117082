"""Multi-task learning: gates for each task on one pool, beside one gate, one bottom and single-task models."""

from modmoe.experiments.multitask.config import MultitaskConfig

__all__ = ["MultitaskConfig"]
