"""Experts choose their tokens."""

import math
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.gating.base import Assignment, Router, Scope, at_least_float32
from modmoe.gating.token_choice import GATE_STD
from modmoe.growable import Init, RowSpec
from modmoe.rows import Rows


class ExpertChoiceRouter(Router):
    """Each expert takes the C tokens that it scores highest: C = ceil(T c / E), weight softmax(x W^T) over the experts.

    Every expert is equally loaded by construction, so that no balancing loss is needed. A token may be taken by
    several experts or by none (its output is then zero). What a token gets depends on the whole batch, later tokens
    included: this router is not for autoregressive models. T counts the real tokens, E all experts of the pool. An
    expert takes neither padding nor a token that it is closed to, and then may take fewer than C. Ties: the earlier
    token.

    Args:
        in_features: D.
        capacity_factor: c, the number of experts that a token gets on average.
    Raises:
        ValueError: if capacity_factor is not positive.
    Source:
        Zhou et al. 2022, equations 1 and 2. Theirs divides evenly; here C is rounded up.
    """

    form = "triples"

    def __init__(self, in_features: int, capacity_factor: float = 2.0):
        super().__init__()
        if capacity_factor <= 0:
            raise ValueError(f"capacity_factor must be positive, got {capacity_factor}")
        self.in_features = in_features
        self.capacity_factor = capacity_factor

    @property
    def scope(self) -> Scope:
        return "batch"

    @property
    def causal(self) -> bool:
        return False

    def row_specs(self) -> dict[str, RowSpec]:
        return {"weight": RowSpec((self.in_features,), Init("normal", std=GATE_STD))}

    @property
    def weight_sum(self) -> str:
        return "<= 1"

    def num_active(self, num_experts: int) -> int:
        """On average over the tokens, rounded up."""
        return min(math.ceil(self.capacity_factor), num_experts)

    def check_pool(self, num_experts: int, top_k: int | None = None) -> None:
        if top_k is not None:
            raise ValueError("the experts choose: there is no top_k for each token")

    def score(self, x: Tensor, rows: Rows) -> Tensor:
        return F.linear(at_least_float32(x), at_least_float32(rows["weight"]))

    def select(
        self, logits: Tensor, allowed: Tensor | None, top_k: int | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("experts choose tokens: see assign")

    def assign(
        self, logits: Tensor, allowed: Tensor | None, mask: Tensor | None, top_k: int | None, rows: Rows
    ) -> Assignment:
        num_tokens, num_experts = logits.shape
        probs = logits.softmax(1)
        eligible = torch.ones_like(logits, dtype=torch.bool) if allowed is None else allowed
        if mask is not None:
            eligible = eligible & mask.unsqueeze(1)
        # the size is that of a batch without padding, which nobody has to wait for; ranks past C are dropped
        size = min(self._limit(num_tokens, num_experts), num_tokens)
        order = probs.detach().masked_fill(~eligible, -1.0).argsort(dim=0, descending=True, stable=True)
        token_index = order[:size].T.reshape(-1)  # expert by expert, each one's best token first
        expert_index = torch.arange(num_experts, device=logits.device).repeat_interleave(size)
        weight = probs[token_index, expert_index]
        restricted = allowed is not None or mask is not None
        if restricted:
            kept = eligible[token_index, expert_index]
            if mask is not None:
                rank = torch.arange(size, device=logits.device).repeat(num_experts)
                kept = kept & (rank < self._limit(mask.sum(), num_experts))
            expert_index = expert_index.masked_fill(~kept, -1)
            weight = torch.where(kept, weight, torch.zeros_like(weight))
        return Assignment(token_index, expert_index, weight, probs, None, restricted)

    @overload
    def _limit(self, num_tokens: int, num_experts: int) -> int: ...
    @overload
    def _limit(self, num_tokens: Tensor, num_experts: int) -> Tensor: ...
    def _limit(self, num_tokens: int | Tensor, num_experts: int) -> int | Tensor:
        """C for a number of real tokens, an int or a () tensor; rounded first: 10 * 1.1 is a little more than 11."""
        if isinstance(num_tokens, Tensor):
            return (num_tokens.double() * self.capacity_factor / num_experts).round(decimals=9).ceil()
        return math.ceil(round(num_tokens * self.capacity_factor / num_experts, 9))
