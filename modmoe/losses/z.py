"""Keep router logits small."""

import torch
from torch import Tensor


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Penalise large router logits: mean over real tokens of the squared log-sum-exp.

    L = 1/T sum_t (log sum_i exp h_ti)^2

    Args:
        logits: (T, E) float, before any softmax; -inf for experts that are closed to a token.
        mask: (T,) bool, True for real tokens; None means all. What masked rows hold does not matter.
    Returns:
        () float, at least float32.
    Raises:
        ValueError: if the shapes do not match, no token is real, or a real token has every expert at -inf.
    Source:
        ST-MoE, Zoph et al. 2022, the router z-loss.
    """
    real = real_tokens(logits, mask)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Zeros instead of what padding holds: 0 * nan would reach the sum and the gradient.
    log_sum = logits.masked_fill(~real[:, None], 0.0).logsumexp(dim=-1)
    require((log_sum != -torch.inf).all(), "a real token has every logit at -inf: no expert is open to it")
    return (log_sum.square() * real).sum() / real.sum()


def real_tokens(scores: Tensor, mask: Tensor | None) -> Tensor:
    """(T,) bool, True for the real tokens of scores (T, E); ValueError if there are none or shapes differ."""
    if scores.dim() != 2:
        raise ValueError(f"expected scores of shape (T, E), got {tuple(scores.shape)}")
    if len(scores) == 0:
        raise ValueError("no token is real: T is 0")
    if mask is None:
        return scores.new_ones(len(scores), dtype=torch.bool)
    if mask.shape != scores.shape[:1] or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool of shape ({len(scores)},), got {mask.dtype} {tuple(mask.shape)}")
    require(mask.any(), "no token is real: the mask is all False")
    return mask


def counted_experts(scores: Tensor, open_experts: Tensor | None) -> Tensor:
    """(E,) bool, True for the experts that a loss over scores (T, E) runs over; ValueError if shapes differ."""
    num_experts = scores.shape[1]
    if open_experts is None:
        return scores.new_ones(num_experts, dtype=torch.bool)
    if open_experts.shape != (num_experts,) or open_experts.dtype != torch.bool:
        raise ValueError(
            f"open_experts must be bool of shape ({num_experts},), got {open_experts.dtype} {tuple(open_experts.shape)}"
        )
    return open_experts


def require(condition: Tensor, message: str) -> None:
    """Raise ValueError unless the () bool holds; on CUDA and when compiled, assert unread."""
    if condition.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(condition, message)  # pyright: ignore[reportPrivateImportUsage]
    elif not condition:
        raise ValueError(message)
