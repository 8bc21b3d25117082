"""The two routers with a capacity that large models were first trained with: Switch (k = 1) and GShard (k = 2)."""

import torch
from torch import Tensor

from modmoe.gating.base import at_least_float32
from modmoe.gating.capacity import Capacity
from modmoe.gating.token_choice import TopKRouter
from modmoe.rows import Rows

SWITCH_CAPACITY = Capacity(1.25)
GSHARD_CAPACITY = Capacity(1.0)  # C = 2 T / E, as in the paper


class SwitchRouter(TopKRouter):
    """Each token goes to the expert i with the highest p = softmax(x W^T), weighted by p_i.

    In training the router, and not the experts, reads x * u with u uniform in [1 - jitter, 1 + jitter] for each
    element. An expert takes at most ceil(T factor / E) tokens; the others get the output 0.

    Args:
        in_features: D.
        jitter_eps: the jitter; 0 for none.
        capacity: None for no limit.
    Raises:
        ValueError: if the jitter is not in [0, 1).
    Source:
        Fedus et al. 2021. A call with top_k > 1 weighs each by its probability, too.
    """

    def __init__(self, in_features: int, jitter_eps: float = 0.01, capacity: Capacity | None = SWITCH_CAPACITY):
        super().__init__(in_features, 1, order="softmax_topk", renormalize=False, capacity=capacity)
        if not 0 <= jitter_eps < 1:
            raise ValueError(f"jitter_eps must be in [0, 1), got {jitter_eps}")
        self.jitter_eps = jitter_eps

    @property
    def stochastic(self) -> bool:
        return self.jitter_eps > 0

    def jitter(self, x: Tensor) -> Tensor:
        x = at_least_float32(x)
        return x * torch.empty_like(x).uniform_(1 - self.jitter_eps, 1 + self.jitter_eps)


class GShardRouter(TopKRouter):
    """Each token goes to the two experts with the highest p = softmax(x W^T), weighted by g_i = p_i / (p_1 + p_2).

    In training the second expert is kept with probability min(1, 2 g_2) only; where it is not, it takes no room of
    its expert's capacity, and g_1 stays as it is. An expert takes at most ceil(2 T factor / E) assignments, all first
    choices before all second ones.

    Args:
        in_features: D.
        capacity: None for no limit.
    Source:
        Lepikhin et al. 2020, algorithm 1. A call with another top_k treats every choice but the first so. The
        balancing loss of the paper counts first choices: ``load_balancing_loss(routing.probs,
        routing.requested_choices[:, 0], convention="gshard")``.
    """

    def __init__(self, in_features: int, capacity: Capacity | None = GSHARD_CAPACITY):
        super().__init__(in_features, 2, capacity=capacity)

    @property
    def stochastic(self) -> bool:
        return True

    @property
    def weight_sum(self) -> str:
        return "<= 1"  # what a dropped second expert would have weighed is missing

    def declined(self, weights: Tensor, allowed: Tensor | None, rows: Rows) -> Tensor | None:
        if not self.training:
            return None
        declined = torch.rand_like(weights) >= 2 * weights
        first = torch.arange(weights.shape[1], device=weights.device) == 0
        return declined & ~first
