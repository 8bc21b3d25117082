"""V-MoE's gate."""

import torch
from torch import Tensor

from modmoe.gating.base import Noisy
from modmoe.gating.capacity import Capacity
from modmoe.gating.token_choice import TopKRouter
from modmoe.rows import Rows


class VMoERouter(TopKRouter):
    """g = TOP_k(softmax(x W^T + eps)), eps normal with the standard deviation 1/E in training and 0 in evaluation.

    The weights are not renormalised. An expert takes at most C = ceil(T k factor / E) tokens, those with the highest
    g first, whatever their place in the batch (batch prioritised routing); all the images of a call compete.

    Args:
        in_features: D.
        top_k: k; a call may use another.
        capacity_factor: in training.
        eval_capacity_factor: in evaluation.
    Raises:
        ValueError: on k < 1 or a factor that is not positive.
    Source:
        Riquelme et al. 2021, Scaling Vision with Sparse Mixture of Experts: the routing function with noise before the
        softmax, and batch prioritised routing. Theirs rounds the capacity to the nearest; here it is rounded up.
    """

    def __init__(
        self, in_features: int, top_k: int = 2, capacity_factor: float = 1.05, eval_capacity_factor: float = 4.0
    ):
        capacity = Capacity(capacity_factor, eval_capacity_factor, order="priority")
        super().__init__(in_features, top_k, order="softmax_topk", renormalize=False, capacity=capacity)

    @property
    def stochastic(self) -> bool:
        return True

    def add_noise(self, logits: Tensor, x: Tensor, rows: Rows) -> Noisy:
        std = torch.full_like(logits, 1 / logits.shape[1])
        return Noisy(logits + torch.randn_like(logits) * std, std)
