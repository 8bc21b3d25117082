"""V-MoE models of the usual sizes."""

from typing import Any

from modmoe.vision.moe_vit import VMoE


def vmoe_tiny(num_classes: int = 1000, image_size: int = 224, **options: Any) -> VMoE:
    """V-MoE Ti/16, Last-2: D = 192, 12 blocks, 3 heads, 8 experts in blocks 9 and 11, k = 2; 9,862,312 parameters.

    Args:
        num_classes: width of the output; 0 for features.
        image_size: a multiple of 16.
        options: other arguments of VMoE, in place of the preset's.
    Raises:
        ValueError: as VMoE.
    """
    return _build(192, 3, 16, num_classes, image_size, options)


def vmoe_small(num_classes: int = 1000, image_size: int = 224, **options: Any) -> VMoE:
    """V-MoE S/32, Last-2: D = 384, 6 heads, image_size a multiple of 32, else as :func:`vmoe_tiny`."""
    return _build(384, 6, 32, num_classes, image_size, options)


def vmoe_base(num_classes: int = 1000, image_size: int = 224, **options: Any) -> VMoE:
    """V-MoE B/16, Last-2: D = 768, 12 heads, else as :func:`vmoe_tiny`."""
    return _build(768, 12, 16, num_classes, image_size, options)


def _build(
    features: int, num_heads: int, patch_size: int, num_classes: int, image_size: int, options: dict[str, Any]
) -> VMoE:
    preset = {
        "image_size": image_size,
        "patch_size": patch_size,
        "num_classes": num_classes,
        "features": features,
        "depth": 12,
        "num_heads": num_heads,
        "hidden_features": 4 * features,
    }
    return VMoE(**{**preset, **options})
