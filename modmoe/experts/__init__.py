"""Expert kinds."""

from modmoe.experts.attention import AttentionExpert
from modmoe.experts.base import Expert, ExpertOps
from modmoe.experts.conv import ConvExpert
from modmoe.experts.lora import LoRAExpert
from modmoe.experts.mlp import MLPExpert
from modmoe.experts.shared import GatedSharedExpert
from modmoe.experts.swiglu import SwiGLUExpert

__all__ = [
    "AttentionExpert",
    "ConvExpert",
    "Expert",
    "ExpertOps",
    "GatedSharedExpert",
    "LoRAExpert",
    "MLPExpert",
    "SwiGLUExpert",
]
