"""Keep a ReLU gate sparse, and its load even."""

import torch
from torch import Tensor

from modmoe.losses.z import counted_experts, real_tokens


def relu_l1_loss(gates: Tensor, top_k: int, mask: Tensor | None = None, open_experts: Tensor | None = None) -> Tensor:
    """Penalise the weights of a ReLU gate, those of busy experts the most.

    L = sum_e f_e Rbar_e,  f_e = E/(k T) sum_t 1[R_te > 0],  Rbar_e = 1/T sum_t R_te

    f is 1 for every expert where each is active for the share k/E of the tokens; no gradient flows through it. E is
    the number of open experts.

    Args:
        gates: (T, E) float R >= 0, the weights (``routing.matrix()``).
        top_k: k, the mean number of active experts that is aimed at.
        mask: (T,) bool, True for real tokens; None means all.
        open_experts: (E,) bool, the experts that the loss runs over; None means all.
    Returns:
        () float, at least float32; multiply it by the router's ``l1_coefficient``.
    Raises:
        ValueError: if the shapes do not match, no token is real, or k < 1.
    Source:
        ReMoE, Wang et al. 2024, the refined L1 regularisation, of one layer (there the mean over layers).
    """
    real = real_tokens(gates, mask)
    counted = counted_experts(gates, open_experts)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    gates = gates.to(torch.promote_types(gates.dtype, torch.float32))
    gates = gates.masked_fill(~(real[:, None] & counted), 0.0)
    num_tokens = real.sum()
    fraction = (gates > 0).to(gates.dtype).sum(0) * counted.sum() / (top_k * num_tokens)
    return (fraction * gates.sum(0) / num_tokens).sum()
