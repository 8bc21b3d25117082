"""Top-k by logits that noise was added to, so that experts with close logits share the load."""

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.gating.base import Noisy, at_least_float32
from modmoe.gating.capacity import Capacity
from modmoe.gating.token_choice import TopKRouter
from modmoe.growable import RowSpec
from modmoe.rows import Rows


class NoisyTopKRouter(TopKRouter):
    """Each token goes to the k experts with the highest H = h + eps * softplus(x W_n^T), h = x W^T, eps normal.

    The weights are the softmax over the k selected H; k = 1 takes the probability before selection, as
    :class:`TopKRouter` does. There is noise in training only: in evaluation H = h. Both rows of an expert start at
    zero, so that a new pool routes by noise alone.

    ``routing.noisy_logits`` and ``routing.noise_std`` are what :func:`modmoe.losses.load_loss` needs besides the
    logits.

    Args:
        in_features: D.
        top_k: k; a call may use another.
        capacity: how many assignments an expert takes at most; None for no limit.
    Raises:
        ValueError: on k < 1.
    Source:
        Shazeer et al. 2017, section 2.1; there k = 1 gives the gate no gradient.
    """

    def __init__(self, in_features: int, top_k: int = 2, capacity: Capacity | None = None):
        super().__init__(in_features, top_k, capacity=capacity)

    @property
    def stochastic(self) -> bool:
        return True

    def row_specs(self) -> dict[str, RowSpec]:
        return {"weight": RowSpec((self.in_features,)), "noise": RowSpec((self.in_features,))}

    def add_noise(self, logits: Tensor, x: Tensor, rows: Rows) -> Noisy:
        std = F.softplus(F.linear(at_least_float32(x), at_least_float32(rows["noise"])))
        return Noisy(logits + torch.randn_like(logits) * std, std)
