"""V-MoE and Soft MoE: vision transformers with experts in some blocks."""

from typing import Any

from modmoe.experts import MLPExpert
from modmoe.gating import SoftRouter, VMoERouter
from modmoe.layer import MoELayer
from modmoe.pool import ExpertPool
from modmoe.vision.balance import carry_balancing_losses
from modmoe.vision.placement import Blocks
from modmoe.vision.vit import ViT


class VMoE(ViT):
    """A ViT whose ``blocks`` hold experts under V-MoE's router, with balancing losses that it carries in training.

    Args:
        blocks: which blocks hold experts, see :func:`modmoe.vision.select_blocks`.
        num_experts: E.
        top_k: k.
        expert_features: hidden size of an expert; None for hidden_features.
        capacity_factor: in training, see VMoERouter.
        eval_capacity_factor: in evaluation.
        balance_weight: of importance and load loss each; 0 for none.
        vit: the other arguments of ViT, by name: image_size, patch_size, num_classes, features, depth, num_heads,
            hidden_features, and in_channels if it is not 3.
    Raises:
        ValueError: as ViT, VMoERouter, ExpertPool and MoELayer.
    Source:
        Riquelme et al. 2021, Scaling Vision with Sparse Mixture of Experts; the defaults are those of its S/32.
    """

    def __init__(
        self,
        *,
        blocks: Blocks = "last-2",
        num_experts: int = 8,
        top_k: int = 2,
        expert_features: int | None = None,
        capacity_factor: float = 1.05,
        eval_capacity_factor: float = 4.0,
        balance_weight: float = 0.005,
        **vit: Any,
    ):
        def make_layer(D: int, H: int, S: int) -> MoELayer:
            expert = MLPExpert(D, H if expert_features is None else expert_features)
            return MoELayer(
                ExpertPool(expert, num_experts), VMoERouter(D, top_k, capacity_factor, eval_capacity_factor)
            )

        super().__init__(**vit, make_layer=make_layer, blocks=blocks)
        if balance_weight:
            carry_balancing_losses(self, balance_weight)


class SoftMoEViT(ViT):
    """A ViT whose ``blocks`` hold experts that compute slots: mixtures of an image's tokens.

    Args:
        blocks: which blocks hold experts; None for the second half of them.
        num_experts: E.
        slots: of each expert; None for as many in all as there are tokens, rounded down, at least 1 each.
        expert_features: hidden size of an expert; None for hidden_features.
        vit: as of :class:`VMoE`.
    Raises:
        ValueError: as ViT, SoftRouter, ExpertPool and MoELayer.
    Source:
        Puigcerver et al. 2023, From Sparse to Soft Mixtures of Experts: the second half of the blocks, as many slots
        as tokens.
    """

    def __init__(
        self,
        *,
        blocks: Blocks | None = None,
        num_experts: int = 8,
        slots: int | None = None,
        expert_features: int | None = None,
        **vit: Any,
    ):
        def make_layer(D: int, H: int, S: int) -> MoELayer:
            expert = MLPExpert(D, H if expert_features is None else expert_features)
            num_slots = max(1, S // num_experts) if slots is None else slots
            return MoELayer(ExpertPool(expert, num_experts), SoftRouter(D, num_slots))

        depth = vit["depth"]
        second_half = range(depth // 2, depth)
        super().__init__(**vit, make_layer=make_layer, blocks=second_half if blocks is None else blocks)
