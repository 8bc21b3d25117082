"""One block of a language model: attention and a feed-forward part, either of which may be a pool of experts."""

from typing import Literal

from torch import Tensor, nn

from modmoe.gating import Router
from modmoe.gating.merging import MergingRouter
from modmoe.language.attention import BlockCache, CausalAttention, HeadMixture, Step
from modmoe.language.merging import merge_step
from modmoe.layer import MoELayer

Norm = Literal["rms", "layer"]
UNLIMITED = 1e6  # a capacity factor with which no expert is ever full: pools are smaller


class Block(nn.Module):
    """x + attention(norm(x)), and of that y + feed_forward(norm(y)).

    Args:
        features: D.
        attention: (x, step, cache) -> (B, S, D).
        feed_forward: a module (..., D) -> (..., D), or a MoELayer.
        norm: "rms" or "layer".
        norm_eps: of both norms.
    Raises:
        ValueError: on a router that looks ahead, see :func:`check_causal`.
    """

    def __init__(
        self,
        features: int,
        attention: CausalAttention | HeadMixture,
        feed_forward: nn.Module,
        norm: Norm = "rms",
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        for part in (attention, feed_forward):
            if isinstance(part, MoELayer):
                check_causal(part.router)
        self.attention_norm = make_norm(norm, features, norm_eps)
        self.attention = attention
        self.feed_forward_norm = make_norm(norm, features, norm_eps)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, step: Step, cache: BlockCache | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = x + self.attention(self.attention_norm(x), step, cache)
        return x + self._feed(self.feed_forward_norm(x), step, cache)

    def _feed(self, x: Tensor, step: Step, cache: BlockCache | None) -> Tensor:
        layer = self.feed_forward
        if not isinstance(layer, MoELayer):
            return layer(x)
        if cache is not None and isinstance(layer.router, MergingRouter):
            return merge_step(layer, x, step, cache)
        return layer(x, step.mask, ids=step.domains if layer.router.needs_ids == "domain" else None)


def make_norm(norm: Norm, features: int, eps: float = 1e-5) -> nn.Module:
    """x / rms(x) * w ("rms"), or LayerNorm without a bias ("layer"); ValueError on another name."""
    if norm not in ("rms", "layer"):
        raise ValueError(f"norm is 'rms' or 'layer', got '{norm}'")
    return nn.RMSNorm(features, eps) if norm == "rms" else nn.LayerNorm(features, eps, bias=False)


def check_causal(router: Router) -> None:
    """Raise ValueError if a router lets a token's output depend on later tokens, or on other sequences.

    A capacity does, so it may hold in training only: its ``eval_factor`` has to be ``UNLIMITED``. In training a token
    may then be dropped for the sake of tokens that stand before it in the batch; with its own sequence alone, none
    that comes later has a say but by their number.
    """
    if router.needs_ids == "token":
        raise ValueError(f"{type(router).__name__} needs token ids, which blocks of a language model do not hand on")
    if router.causal:
        return
    capacity = router.capacity
    if capacity is None or router.form != "choices":
        raise ValueError(f"a language model predicts what comes next, and {type(router).__name__} looks ahead")
    if capacity.eval_factor is None or capacity.eval_factor < UNLIMITED or capacity.order != "token":
        raise ValueError(
            f"{type(router).__name__} has a capacity that looks ahead in evaluation too: give it "
            f"Capacity({capacity.factor}, eval_factor=UNLIMITED)"
        )
