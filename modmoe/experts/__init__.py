"""Expert kinds."""

from modmoe.experts.base import Expert, ExpertOps
from modmoe.experts.conv import ConvExpert
from modmoe.experts.mlp import MLPExpert

__all__ = ["ConvExpert", "Expert", "ExpertOps", "MLPExpert"]
