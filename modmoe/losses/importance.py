"""Keep experts equally important, by their weights and by their expected load (noisy top-k)."""

import torch
from torch import Tensor

from modmoe.losses.z import counted_experts, real_tokens, require


def importance_loss(gates: Tensor, mask: Tensor | None = None, open_experts: Tensor | None = None) -> Tensor:
    """Penalise an uneven sum of weights: the squared coefficient of variation of the experts' importance.

    I_i = sum_t g_ti,  L = Var(I) / Mean(I)^2, with the population variance (divided by E, not by E - 1)

    Args:
        gates: (T, E) float, at least 0: each token's weights, 0 for experts that it does not use
            (``routing.matrix()``).
        mask: (T,) bool, True for real tokens; None means all.
        open_experts: (E,) bool, the experts that the loss runs over; None means all.
    Returns:
        () float, at least float32; zero where every weight is.
    Raises:
        ValueError: if the shapes do not match or no token is real.
    Source:
        Shazeer et al. 2017, equations 6 and 7. V-MoE takes the population variance, too.
    """
    real = real_tokens(gates, mask)
    counted = counted_experts(gates, open_experts)
    gates = gates.to(torch.promote_types(gates.dtype, torch.float32))
    return squared_variation(gates.masked_fill(~real[:, None], 0.0).sum(0), counted)


def load_loss(
    logits: Tensor,
    noisy_logits: Tensor,
    noise_std: Tensor,
    top_k: int,
    mask: Tensor | None = None,
    open_experts: Tensor | None = None,
) -> Tensor:
    """Penalise an uneven expected load: the squared coefficient of variation of :func:`expected_load`.

    The variance is the population's, as in :func:`importance_loss`.

    Args:
        logits: see expected_load, and so for the next three.
        noisy_logits: (T, E).
        noise_std: (T, E).
        top_k: k.
        mask: (T,) bool, True for real tokens; None means all.
        open_experts: (E,) bool, the experts that the loss runs over (all compete for the tokens); None means all.
    Returns:
        () float, at least float32.
    Raises:
        ValueError: see expected_load.
    Source:
        Shazeer et al. 2017, appendix A, equation 11.
    """
    load = expected_load(logits, noisy_logits, noise_std, top_k, mask)
    return squared_variation(load, counted_experts(logits, open_experts))


def expected_load(
    logits: Tensor, noisy_logits: Tensor, noise_std: Tensor, top_k: int, mask: Tensor | None = None
) -> Tensor:
    """Estimate how many tokens each expert takes, such that gradients flow.

    Load_i = sum_t Phi((h_ti - kth_excluding_i(H_t, k)) / sigma_ti)

    Each summand is the probability that i is among the k best if its own noise is drawn anew and the others' stays.
    Its mean over the noise is the expected load, which adds up to T k.

    Args:
        logits: (T, E) float h, before noise and before any softmax; -inf for experts that are closed to a token.
        noisy_logits: (T, E) float H, what was selected by; -inf at the same places.
        noise_std: (T, E) float sigma >= 0; values below the float's epsilon count as that.
        top_k: k >= 1; where no more than k experts are open to a token, each takes it for certain.
        mask: (T,) bool, True for real tokens; None means all.
    Returns:
        (E,) float, at least float32.
    Raises:
        ValueError: if the shapes do not match, no token is real, k < 1, or a standard deviation is negative.
    Source:
        Shazeer et al. 2017, appendix A, equations 8 to 10.
    """
    real = real_tokens(logits, mask)
    if noisy_logits.shape != logits.shape or noise_std.shape != logits.shape:
        raise ValueError(
            f"noisy_logits and noise_std must be {tuple(logits.shape)}, "
            f"got {tuple(noisy_logits.shape)} and {tuple(noise_std.shape)}"
        )
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    require(((noise_std >= 0) | ~real[:, None]).all(), "noise_std must not be negative")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Zeros instead of what padding holds: 0 * nan would reach the sum and the gradient.
    h, noisy, std = (t.to(dtype).masked_fill(~real[:, None], 0.0) for t in (logits, noisy_logits, noise_std))
    is_open = noisy > -torch.inf
    chance = is_open.to(dtype)
    if top_k < h.shape[1]:
        best = noisy.topk(top_k + 1, dim=1).values
        kth, next_best = best[:, top_k - 1 : top_k], best[:, top_k:]
        # without i itself the k-th is one place further down, if i is in front of that
        threshold = torch.where(noisy > next_best, next_best, kth)
        contested = is_open & (threshold > -torch.inf)
        # masked before the division, whose gradient at infinity is nan
        distance = torch.where(contested, h, 0.0) - torch.where(contested, threshold, 0.0)
        won = torch.special.ndtr(distance / std.clamp(min=torch.finfo(dtype).eps))
        chance = torch.where(contested, won, chance)
    return (chance * real[:, None]).sum(0)


def squared_variation(values: Tensor, counted: Tensor) -> Tensor:
    """() population variance over squared mean of the counted ones of values (E,); zero where their mean is 0."""
    num = counted.sum().clamp(min=1)
    mean = values.masked_fill(~counted, 0.0).sum() / num
    variance = (values - mean).masked_fill(~counted, 0.0).square().sum() / num
    square = mean.square()
    nothing = square < torch.finfo(square.dtype).tiny
    return variance.masked_fill(nothing, 0.0) / square.masked_fill(nothing, 1.0)
