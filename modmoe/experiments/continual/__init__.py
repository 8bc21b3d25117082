"""Continual learning: a pool that grows over a stream, its gates, and honest controls."""

from modmoe.experiments.continual.config import ContinualConfig
from modmoe.experiments.continual.gates import GATES

__all__ = ["GATES", "ContinualConfig"]
