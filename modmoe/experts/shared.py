"""A shared expert with a gate of its own."""

import torch
from torch import Tensor, nn


class GatedSharedExpert(nn.Module):
    """sigmoid(x w) * f(x): what every token passes through beside the routed experts, as much as the token asks for.

    Use it as ``MoELayer(pool, router, shared_expert=GatedSharedExpert(f, D))``; an ``f`` without a gate (DeepSeek) is
    given to the layer as it is.

    Args:
        expert: f, any module (..., D) -> (..., D_out).
        in_features: D.
    Raises:
        ValueError: if in_features is below 1.
    Source:
        The shared expert of Qwen1.5-MoE and Qwen2-MoE, whose gate has no bias either.
    """

    def __init__(self, expert: nn.Module, in_features: int):
        super().__init__()
        if in_features < 1:
            raise ValueError(f"in_features must be at least 1, got {in_features}")
        self.expert = expert
        self.gate = nn.Linear(in_features, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D_out)."""
        return torch.sigmoid(self.gate(x)) * self.expert(x)
