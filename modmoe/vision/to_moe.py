"""Turn a trained ViT or Swin transformer into a mixture of experts."""

from torch import nn

from modmoe.catalog import make_router
from modmoe.conversion import upcycle
from modmoe.conversion.upcycle import MakeRouter
from modmoe.layer import MoELayer
from modmoe.vision.placement import Blocks, select_blocks

ATTENTION = ("attn", "self_attention")  # what stands beside ``mlp`` in a block of timm or ours, and of torchvision


def to_moe(
    model: nn.Module,
    blocks: Blocks = "last-2",
    num_experts: int = 8,
    router: str | MakeRouter | None = None,
    top_k: int = 2,
    noise: float = 0.0,
    omit_inner_dropout: bool = False,
) -> list[tuple[str, MoELayer]]:
    """Replace the feed-forward of chosen transformer blocks in place by experts that are copies of it (upcycling).

    It takes the ViT and Swin models of torchvision and of timm, and any other model whose transformer blocks hold an
    ``mlp`` beside an ``attn`` or ``self_attention``. Blocks are counted through all stages. By default weights add up
    to 1 and nothing is dropped, so that the model computes what it did. Balancing losses are not added: see
    :func:`modmoe.vision.carry_balancing_losses`.

    For real weights, load them before (``load_backbone(..., weights=path)``). A checkpoint of a converted model is
    loaded into one that was converted in the same way; pools that have grown since rebuild themselves.

    Args:
        model: changed in place.
        blocks: which of them, see :func:`modmoe.vision.select_blocks`.
        num_experts: E.
        router: a name of ``modmoe.make_router``, built with its defaults, or D -> a new router; None for a TopKRouter
            whose weights add up to 1. With others the model may not compute what it did.
        top_k: k of that TopKRouter.
        noise: of the copies, see :func:`modmoe.conversion.upcycle`.
        omit_inner_dropout: see there; needed where a model was built with dropout.
    Returns:
        (name, layer) for each, so that ``model.get_submodule(name)`` is the layer.
    Raises:
        ValueError: on an unknown pattern or router, a model without such blocks, or as upcycle; nothing is changed
            then.
    Source:
        Komatsuzaki et al. 2022 (sparse upcycling); for Swin, Hwang et al. 2023 (Tutel's Swin-MoE).
    """
    names = transformer_blocks(model)
    chosen = {names[position] for position in select_blocks(blocks, len(names))}
    make: MakeRouter | None = (lambda features: make_router(router, features)) if isinstance(router, str) else router
    return upcycle(model, lambda name, _: name in chosen, num_experts, top_k, make, noise, omit_inner_dropout)


def transformer_blocks(model: nn.Module) -> list[str]:
    """The qualified name of each transformer block's feed-forward module, in order.

    Raises:
        ValueError: if there is none.
    """
    found = [
        f"{name}.mlp" if name else "mlp"
        for name, module in model.named_modules()
        if isinstance(getattr(module, "mlp", None), nn.Module) and any(hasattr(module, part) for part in ATTENTION)
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no transformer blocks: modules that hold 'mlp' beside 'attn' or "
            "'self_attention', as the ViT and Swin models of torchvision and timm do"
        )
    return found
