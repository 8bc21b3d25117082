"""What every router has in common: scores, closed experts, checks, and the declared properties."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from modmoe.errors import NonFiniteError
from modmoe.growable import RowSpec
from modmoe.pool import Preserving, Rows
from modmoe.routing import Routing


class Router(nn.Module, ABC):
    """(x, rows) -> Routing. It keeps neither the pool nor rows: the layer passes them.

    Attributes:
        scope: what it decides on at once: "token", "sequence" or "batch".
        causal: True if a token's routing does not depend on later tokens.
        shared_parts: names of its own parameters that all experts share; ``freeze()`` without ids freezes them too.
        in_features: size of the input.
    """

    scope: ClassVar[Literal["token", "sequence", "batch"]] = "token"
    causal: ClassVar[bool] = True
    shared_parts: ClassVar[tuple[str, ...]] = ()
    in_features: int

    @abstractmethod
    def row_specs(self) -> dict[str, RowSpec]:
        """The rows that it needs of each expert."""

    @property
    def preserving_growth(self) -> Preserving | None:
        """How a copied expert keeps the layer's function, see ``ExpertPool.declare``; None where nothing does."""
        return None

    @property
    @abstractmethod
    def weight_sum(self) -> str:
        """What each token's weights add up to: "1" or "<= 1"."""

    @abstractmethod
    def num_active(self, num_experts: int) -> int:
        """How many experts compute each token."""

    def check_pool(self, num_experts: int, top_k: int | None = None) -> None:
        """Raise ValueError if a pool of this size cannot be routed."""

    @abstractmethod
    def score(self, x: Tensor, rows: Rows) -> Tensor:
        """Raw scores (T, E) for x (T, D), at least in float32; an expert's column depends on its own rows only."""

    @abstractmethod
    def select(self, logits: Tensor, allowed: Tensor | None, top_k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts.

        Args:
            logits: (T, E), with -inf where an expert is closed.
            allowed: (T, E) bool or None for all.
            top_k: this call's k, or None.
        Returns:
            expert positions (T, K), weights (T, K), probs (T, E).
        """

    def forward(
        self,
        x: Tensor,
        rows: Rows,
        mask: Tensor | None = None,
        open_experts: Tensor | None = None,
        top_k: int | None = None,
    ) -> Routing:
        """Route tokens.

        Args:
            x: (T, D).
            rows: this router's rows of all experts.
            mask: (T,) bool, True for real tokens; the others are assigned to nobody.
            open_experts: (E,) or (T, E) bool, the experts that may be chosen; None for all.
            top_k: overrides the router's own k in this call.
        Returns:
            The triples, token by token.
        Raises:
            NonFiniteError: if a score of a real token is NaN or infinite.
            ValueError: if a real token has no open expert, or on a wrong k.
        """
        num_tokens, num_experts = x.shape[0], len(rows.ids)
        self.check_pool(num_experts, top_k)
        with torch.autocast(x.device.type, enabled=False):  # it would score in half precision
            logits = self.score(x, rows)
        scored = self.scored_experts(rows)
        allowed, masked = open_experts, logits
        if scored is not None:
            both = scored if open_experts is None else scored & open_experts
            unserved = ~both.any(-1, keepdim=True)
            allowed = both if open_experts is None else both | (open_experts & unserved)
            masked = logits.masked_fill(~scored, 0.0)
        comparable = masked
        if allowed is not None:
            allowed = allowed.expand(num_tokens, num_experts)
            masked = masked.masked_fill(~allowed, -torch.inf)
        check_scores(x, comparable, allowed, mask)
        if mask is not None:  # padding must not turn into NaN, whatever is open to it
            masked = torch.where(mask.unsqueeze(1), masked, torch.zeros_like(masked))
        choices, weights, probs = self.select(masked, allowed, top_k)
        has_drops = allowed is not None or mask is not None
        if has_drops:
            kept = torch.ones_like(choices, dtype=torch.bool)
            if allowed is not None:
                kept = kept & allowed.gather(1, choices)
            if mask is not None:
                kept = kept & mask.unsqueeze(1)
            choices = choices.masked_fill(~kept, -1)
            weights = torch.where(kept, weights, torch.zeros_like(weights))
        k = choices.shape[1]
        return Routing(
            token_index=torch.arange(num_tokens, device=x.device).repeat_interleave(k),
            expert_index=choices.reshape(-1),
            weight=weights.reshape(-1),
            num_tokens=num_tokens,
            num_experts=num_experts,
            logits=logits,
            probs=probs,
            top_k=k,
            has_drops=has_drops,
            mask=mask,
            open_experts=allowed,
        )

    def scored_experts(self, rows: Rows) -> Tensor | None:
        """(E,) bool: experts that have a score at all; None for all.

        Gates fitted to data leave out unfitted ones, unless a token has no other open expert.
        """
        return None

    def freeze_shared(self, frozen: bool = True) -> None:
        """Freeze (or unfreeze) the parts that all experts share."""
        for name in self.shared_parts:
            parameter = self.get_parameter(name)
            parameter.requires_grad_(not frozen)
            parameter.grad = None


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision moves routing decisions: scores are kept in float32 or better."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_scores(x: Tensor, logits: Tensor, allowed: Tensor | None, mask: Tensor | None) -> None:
    """Raise on non-finite scores or on a real token without an open expert; asynchronous where a sync would hurt.

    Raises:
        NonFiniteError: on NaN or infinite scores; it says whether the input was already so.
        ValueError: if every expert is closed for some real token.
    """
    finite = torch.isfinite(logits).all(1)
    served = torch.ones_like(finite) if allowed is None else allowed.any(1)
    if mask is not None:
        finite, served = finite | ~mask, served | ~mask
    if torch.compiler.is_compiling() or x.is_cuda:
        torch.ops.aten._assert_async.msg(finite.all(), "non-finite input or router logits")
        torch.ops.aten._assert_async.msg(served.all(), "every expert is masked for some token")
        return
    if not finite.all():
        token = int((~finite).nonzero()[0])
        where = "logits" if torch.isfinite(x[token]).all() else "input"
        raise NonFiniteError(f"non-finite {where} at token {token} of {x.shape[0]}")
    if not served.all():
        token = int((~served).nonzero()[0])
        raise ValueError(f"every expert is masked for token {token} of {x.shape[0]}")
