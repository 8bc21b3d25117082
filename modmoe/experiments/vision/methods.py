"""The methods of an image-classification run: transformers whose matrix products for one image cost the same."""

from typing import Any

from modmoe.experiments.vision.data import ImageData
from modmoe.experiments.vision.settings import Method, VisionSettings
from modmoe.vision import SoftMoEViT, ViT, VMoE, matched_features, matched_slot_features
from modmoe.vision.vit import num_tokens

ABOUT: dict[Method, str] = {
    "dense": "a ViT without experts",
    "vmoe": "the same with {num_experts} experts in {blocks}, {top_k} for each token, as narrow as equal cost asks for",
    "soft_moe": "the same with {num_experts} experts of {slots} slots in {blocks}, as narrow as equal cost asks for",
}


def build(method: Method, settings: VisionSettings, data: ImageData) -> ViT:
    """A fresh model.

    Raises:
        ValueError: on patches that do not divide the image, an unknown pattern of blocks, or routing that alone costs
            more than a dense block.
    """
    tokens = num_tokens(data.image_size, settings.patch_size)
    shape: dict[str, Any] = {
        "image_size": data.image_size,
        "patch_size": settings.patch_size,
        "num_classes": data.num_classes,
        "features": settings.features,
        "depth": settings.depth,
        "num_heads": settings.num_heads,
        "hidden_features": settings.hidden_features,
        "in_channels": data.in_channels,
    }
    if method == "dense":
        return ViT(**shape)
    E, H = settings.num_experts, settings.hidden_features
    if method == "vmoe":
        return VMoE(
            **shape,
            blocks=settings.blocks,
            num_experts=E,
            top_k=settings.top_k,
            expert_features=matched_features(H, E, settings.top_k),
            capacity_factor=settings.capacity_factor,
            eval_capacity_factor=settings.eval_capacity_factor,
            balance_weight=settings.balance_weight,
        )
    size = matched_slot_features(H, tokens, E * settings.slots)
    return SoftMoEViT(**shape, blocks=settings.blocks, num_experts=E, slots=settings.slots, expert_features=size)
