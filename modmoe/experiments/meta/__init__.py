"""Meta-learning: neural processes, evidence-gated experts and routed MAML on families of small tasks."""

from modmoe.experiments.meta.families import FamiliesConfig
from modmoe.experiments.meta.fewshot import FewShotConfig
from modmoe.experiments.meta.gp import GaussianProcessConfig
from modmoe.experiments.meta.growth import GrowthConfig
from modmoe.experiments.meta.images import ImageCompletionConfig

__all__ = ["FamiliesConfig", "FewShotConfig", "GaussianProcessConfig", "GrowthConfig", "ImageCompletionConfig"]
