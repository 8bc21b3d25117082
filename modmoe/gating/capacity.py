"""A limit to how many assignments an expert takes, and who is dropped beyond it."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

DropOrder = Literal["token", "priority"]


@dataclass(frozen=True)
class Capacity:
    """An expert takes at most C = ceil(T K factor / E) assignments; the others are dropped.

    All first choices stand before all second choices, and so on. Within one rank the order is that of the tokens, or
    with "priority" that of their best score, highest first (ties: the earlier token), so that what is dropped is what
    the router was least sure of. T counts real tokens, E all experts of the pool.

    Args:
        factor: of the even share, in training; 1.25 leaves a quarter of room.
        eval_factor: in evaluation; None for the same.
        order: see above.
    Raises:
        ValueError: on a factor that is not positive, or an unknown order.
    Source:
        Fedus et al. 2021 (capacity), Lepikhin et al. 2020 (first choices first), Riquelme et al. 2021 (batch
        prioritised routing: ``order="priority"``).
    """

    factor: float
    eval_factor: float | None = None
    order: DropOrder = "token"

    def __post_init__(self) -> None:
        if self.factor <= 0 or (self.eval_factor is not None and self.eval_factor <= 0):
            raise ValueError(f"capacity factors must be positive, got {self.factor} and {self.eval_factor}")
        if self.order not in get_args(DropOrder):
            raise ValueError(f"order is one of {get_args(DropOrder)}, got '{self.order}'")

    def limit(self, num_tokens: int | Tensor, top_k: int, num_experts: int, training: bool) -> int | Tensor:
        """C for a number of real tokens; a () tensor, which nobody waits for, gives a () int64 tensor."""
        factor = self.factor if training or self.eval_factor is None else self.eval_factor
        # rounded first: 10 * 1.1 is a little more than 11 in floating point
        if isinstance(num_tokens, Tensor):
            share = num_tokens.double() * top_k * factor / num_experts
            return share.round(decimals=9).ceil().to(torch.int64)
        return math.ceil(round(num_tokens * top_k * factor / num_experts, 9))

    def keep(self, choices: Tensor, score: Tensor, num_experts: int, limit: int | Tensor) -> Tensor:
        """Which assignments have room.

        Args:
            choices: (T, K) int64 in [0, E), the best first; -1 takes no room.
            score: (T,) each token's best score, which "priority" orders by.
            num_experts: E.
            limit: C, an int or () int64.
        Returns:
            (T, K) bool; False where the choice is -1.
        """
        num_tokens, top_k = choices.shape
        order = torch.arange(num_tokens, device=choices.device)
        if self.order == "priority":
            order = score.argsort(descending=True, stable=True)
        queue = choices[order].T.reshape(-1)  # rank by rank, within each the tokens in order
        one_hot = F.one_hot(torch.where(queue < 0, num_experts, queue), num_experts + 1)
        place = (one_hot.cumsum(0) - 1).gather(1, torch.where(queue < 0, num_experts, queue).unsqueeze(1)).squeeze(1)
        kept = (place < limit) & (queue >= 0)
        return torch.empty_like(choices, dtype=torch.bool).index_copy(0, order, kept.view(top_k, num_tokens).T)
