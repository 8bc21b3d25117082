"""Expert kinds."""

from modmoe.experts.base import Expert, ExpertOps
from modmoe.experts.mlp import MLPExpert

__all__ = ["Expert", "ExpertOps", "MLPExpert"]
