"""What the routers share that blend tokens or experts over whole sequences."""

import math

import torch
from torch import Tensor

from modmoe.gating.base import check_scores


def sequence_shape(num_tokens: int, shape: tuple[int, ...] | None) -> tuple[int, int]:
    """(B, S) of a call's shape: the last axis is the sequence; a single token and None are one sequence."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, num_tokens)


def check_tokens(x: Tensor, logits: Tensor, open_experts: Tensor | None, mask: Tensor | None) -> None:
    """Raise on a token of its own fault before a sequence spreads it; see :func:`modmoe.gating.base.check_scores`."""
    allowed = None if open_experts is None else open_experts.expand(len(x), open_experts.shape[-1])
    check_scores(x, x, allowed, mask)
    check_scores(x, logits, None, mask)


def dense_triples(weights: Tensor, kept: Tensor | None) -> dict:
    """The part of a Routing that holds every expert for each token.

    Args:
        weights: (T, E).
        kept: (T, E) bool, False where a token is padding or an expert closed; None for all.
    """
    num_tokens, num_experts = weights.shape
    experts = torch.arange(num_experts, device=weights.device).expand_as(weights)
    if kept is not None:
        experts = experts.masked_fill(~kept, -1)
        weights = torch.where(kept, weights, torch.zeros_like(weights))
    return {
        "token_index": torch.arange(num_tokens, device=weights.device).repeat_interleave(num_experts),
        "expert_index": experts.reshape(-1),
        "weight": weights.reshape(-1),
        "num_tokens": num_tokens,
        "num_experts": num_experts,
        "top_k": num_experts,
        "has_drops": kept is not None,
    }


def kept_pairs(num_experts: int, num_tokens: int, open_experts: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """(T, E) bool, False where a token is padding or an expert closed to it; None for all."""
    kept = None if open_experts is None else open_experts.expand(num_tokens, num_experts)
    if mask is None:
        return kept
    real = mask.unsqueeze(1).expand(num_tokens, num_experts)
    return real if kept is None else real & kept
