"""What a vision transformer computes for one image, and experts that cost no more than what they replace."""

from modmoe.experts import MLPExpert
from modmoe.gating import SoftRouter
from modmoe.layer import MoELayer
from modmoe.vision.vit import Block, FeedForward, ViT


def active_flops(model: ViT) -> int:
    """Operations of all matrix products for one image: 2 for each multiplication with its addition.

    Patches 2 S C p^2 D; a block's attention 8 S D^2 + 4 S^2 D; its dense feed-forward 4 S D H; k of E experts
    4 k S D H' with their gate 2 S D E; P slots of each of E experts 4 E P D H' with their logits, dispatch and combine
    6 S E P D; the head 2 D classes. Biases, norms and activations are left out, and so is what a capacity drops.

    Args:
        model: with the feed-forward blocks and layers of ViT, VMoE or SoftMoEViT.
    Raises:
        ValueError: on a feed-forward block of another kind.
    """
    D, S = model.num_features, model.patch_embed.num_tokens
    total = 2 * S * model.patch_embed.proj.weight.numel() + 2 * D * model.num_classes
    for block in model.blocks:
        assert isinstance(block, Block)
        total += 8 * S * D * D + 4 * S * S * D + _feed_forward_flops(block.mlp, S)
    return total


def _feed_forward_flops(module: object, S: int) -> int:
    if isinstance(module, FeedForward):
        return 2 * S * sum(weight.numel() for weight in module.parameters() if weight.dim() == 2)
    if not (isinstance(module, MoELayer) and isinstance(module.pool.expert, MLPExpert)):
        raise ValueError(f"the operations of {type(module).__name__} are not known")
    D, H = module.pool.expert.in_features, module.pool.expert.hidden_features
    E = module.pool.num_experts
    if isinstance(module.router, SoftRouter):
        slots = E * module.router.slots
        return 4 * slots * D * H + 6 * S * slots * D
    return 4 * module.router.num_active(E) * S * D * H + 2 * S * D * E


def matched_features(hidden_features: int, num_experts: int, top_k: int) -> int:
    """H' = (H - E / 2) / k: the hidden size with which k experts and their gate cost what a block of H costs.

    It is rounded to the nearest integer; the costs are equal where E / 2 and the quotient are integers.

    Raises:
        ValueError: if nothing is left for the experts.
    """
    return _rounded((hidden_features - num_experts / 2) / top_k, "the gate")


def matched_slot_features(hidden_features: int, num_tokens: int, num_slots: int) -> int:
    """H' = S H / n - 3 S / 2: the hidden size with which n slots, mixing included, cost what a block of H costs.

    Args:
        hidden_features: H.
        num_tokens: S, of an image.
        num_slots: n = E P, of all experts.
    Raises:
        ValueError: if nothing is left for the experts.
    """
    return _rounded(num_tokens * hidden_features / num_slots - 1.5 * num_tokens, "mixing tokens")


def _rounded(size: float, what: str) -> int:
    if size < 1:
        raise ValueError(f"{what} alone costs more than the dense block: make hidden_features larger")
    return round(size)
