"""Image backbones on the pool: V-MoE, Soft MoE, convolutional experts, and conversions of torchvision's and timm's."""

from modmoe.vision.backbones import load_backbone
from modmoe.vision.balance import balancing_loss, carry_balancing_losses
from modmoe.vision.conv import ConvMoELayer, ConvMoENet
from modmoe.vision.flops import active_flops, matched_features, matched_slot_features
from modmoe.vision.moe_vit import SoftMoEViT, VMoE
from modmoe.vision.placement import dense_parts, moe_layers, select_blocks
from modmoe.vision.presets import vmoe_base, vmoe_small, vmoe_tiny
from modmoe.vision.to_moe import to_moe, transformer_blocks
from modmoe.vision.vit import ViT

__all__ = [
    "ConvMoELayer",
    "ConvMoENet",
    "SoftMoEViT",
    "VMoE",
    "ViT",
    "active_flops",
    "balancing_loss",
    "carry_balancing_losses",
    "dense_parts",
    "load_backbone",
    "matched_features",
    "matched_slot_features",
    "moe_layers",
    "select_blocks",
    "to_moe",
    "transformer_blocks",
    "vmoe_base",
    "vmoe_small",
    "vmoe_tiny",
]
