"""Keep experts evenly used."""

from typing import Literal, get_args

import torch
from torch import Tensor

from modmoe.losses.z import counted_experts, real_tokens, require

Convention = Literal["switch", "gshard", "mixtral"]


def load_balancing_loss(
    probs: Tensor,
    expert_index: Tensor,
    mask: Tensor | None = None,
    open_experts: Tensor | None = None,
    convention: Convention = "switch",
) -> Tensor:
    """Penalise an uneven use of the open experts: 1 when uniform, up to E when one expert takes everything.

    L = E sum_i f_i P_i

    The other conventions differ by a factor: "gshard" is the mean of f_i P_i over experts, L / E^2; "mixtral" lets f
    sum to K, which gives K L. Of several layers, add up the losses: concatenated, layers that favour different experts
    hide each other's imbalance.

    Everything runs over the open experts only. E is their number; f_i is expert i's share of the assignments
    to open experts (T K of them where nothing is dropped or closed); P_i is the mean over tokens of the
    probability of i, renormalised for each token over the open experts. A token without any probability on
    an open expert counts neither in f nor in P. The gradient flows through P alone, and never towards or away
    from the closed experts as a whole.

    Args:
        probs: (T, E) float in [0, 1], a distribution over experts for each token.
        expert_index: (T, K) or (T,) int64 in [0, E), or -1 for no assignment. Take the choices before any
            capacity limit drops some: dropped assignments hide the imbalance that dropped them.
        mask: (T,) bool, True for real tokens; None means all.
        open_experts: (E,) bool, the experts that the loss runs over (leave out frozen and task-masked ones);
            None means all.
        convention: see above; GShard itself gives the first choices only, (T,).
    Returns:
        () float, at least float32; zero, with a zero gradient, if no assignment goes to an open expert.
    Raises:
        ValueError: if the shapes do not match, an index is E or more, no token is real, or on an unknown convention.
    Source:
        Switch Transformers, Fedus et al. 2021, equations 4 to 6, where k = 1; for k > 1 f sums to 1 here, so that
        uniform gives 1 for every k. Lepikhin et al. 2020 (GShard), algorithm 1; Jiang et al. 2024 (Mixtral).
    """
    if convention not in get_args(Convention):
        raise ValueError(f"convention is one of {get_args(Convention)}, got '{convention}'")
    real = real_tokens(probs, mask)
    num_tokens, num_experts = probs.shape
    if expert_index.dim() == 1:
        expert_index = expert_index[:, None]
    if expert_index.dim() != 2 or len(expert_index) != num_tokens:
        raise ValueError(f"expert_index must be ({num_tokens}, K), got {tuple(expert_index.shape)}")
    require((expert_index < num_experts).all(), f"expert_index must stay below E = {num_experts}")
    open_experts = counted_experts(probs, open_experts)

    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    # masked_fill and not a product, so that a nan in padding stays out of the sums and the gradients.
    probs = probs.masked_fill(~(real[:, None] & open_experts), 0.0)
    total = probs.sum(dim=-1, keepdim=True)
    nothing = total < torch.finfo(probs.dtype).tiny  # dividing by less would overflow
    counted = ~nothing.squeeze(-1)
    share = probs.masked_fill(nothing, 0.0) / total.masked_fill(nothing, 1.0)
    mean_probs = share.sum(dim=0) / counted.sum().clamp(min=1)

    # A spare column takes the assignments that do not count.
    slots = torch.where(counted[:, None] & (expert_index >= 0), expert_index, num_experts).flatten()
    load = probs.new_zeros(num_experts + 1).index_add(0, slots, probs.new_ones(slots.shape))[:-1] * open_experts
    fraction = load / load.sum().clamp(min=1)
    num_open = open_experts.sum()
    factor = {"switch": num_open, "gshard": 1 / num_open.clamp(min=1), "mixtral": num_open * expert_index.shape[1]}
    return factor[convention] * (fraction * mean_probs).sum()
