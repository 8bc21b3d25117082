"""Image classification: a dense ViT, V-MoE and Soft MoE of equal active operations, trained by one recipe."""

from modmoe.experiments.vision.config import VisionConfig

__all__ = ["VisionConfig"]
