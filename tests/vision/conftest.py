"""Tiny backbones for images of 1x8x8, cut into 4 patches."""

import pytest
import torch

from modmoe.vision import ConvMoENet, SoftMoEViT, ViT, VMoE

SHAPE = {
    "image_size": 8,
    "patch_size": 4,
    "num_classes": 3,
    "features": 8,
    "depth": 4,
    "num_heads": 2,
    "hidden_features": 12,
    "in_channels": 1,
}


@pytest.fixture
def build():
    """A tiny model by kind ("vit", "vmoe", "soft", "conv"), with other arguments in place of its own."""

    def make(kind: str, seed: int = 0, **options):
        torch.manual_seed(seed)
        if kind == "conv":
            own = {"image_size": 8, "num_classes": 3, "in_channels": 1, "channels": (8, 16), "num_experts": 3}
            return ConvMoENet(**{**own, **options})
        experts = {"vit": {}, "vmoe": {"num_experts": 3}, "soft": {"num_experts": 2}}[kind]
        return {"vit": ViT, "vmoe": VMoE, "soft": SoftMoEViT}[kind](**{**SHAPE, **experts, **options})

    return make


@pytest.fixture
def images():
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
