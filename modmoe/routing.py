"""The record of what a router decided.

Axis letters, everywhere in modmoe: B batch, T tokens, D model, H hidden, E experts (positions in ``pool.ids``),
K selected, C capacity, N triples.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Routing:
    """Flat (token, expert, weight) triples, and the scores they came from.

    Kernels, losses, metrics and TensorBoard read only this record.

    Args:
        token_index: (N,) int64 in [0, T).
        expert_index: (N,) int64 in [0, E), or -1 where the assignment was dropped (padding, no open expert).
        weight: (N,) float; 0 where dropped.
        num_tokens: T.
        num_experts: E.
        logits: (T, E) raw scores, before masking and before any softmax.
        probs: (T, E) the distribution over the experts open to each token.
        top_k: K where the triples stand token by token, best first, K for each; None for any other order.
        has_drops: False where it is known, without looking at values, that nothing was dropped.
        mask: (T,) bool, True for real tokens; None means all.
        open_experts: (E,) or (T, E) bool, the experts that were allowed; None means all.
        requested: (N,) int64, the experts before a capacity limit dropped some; None where there is no limit.
        noisy_logits: (T, E) what the selection was made by, where noise was added to the logits.
        noise_std: (T, E) the noise's standard deviation.
    """

    token_index: Tensor
    expert_index: Tensor
    weight: Tensor
    num_tokens: int
    num_experts: int
    logits: Tensor
    probs: Tensor
    top_k: int | None = None
    has_drops: bool = True
    mask: Tensor | None = None
    open_experts: Tensor | None = None
    requested: Tensor | None = None
    noisy_logits: Tensor | None = None
    noise_std: Tensor | None = None

    @classmethod
    def assigned(cls, experts: Tensor, num_experts: int, dtype: torch.dtype = torch.float32) -> "Routing":
        """Every token to a given expert with weight 1: oracle routing, or training one expert.

        Args:
            experts: (T,) int64 positions.
            num_experts: E.
            dtype: of the weights.
        """
        probs = torch.nn.functional.one_hot(experts, num_experts).to(dtype)
        return cls(
            token_index=torch.arange(len(experts), device=experts.device),
            expert_index=experts,
            weight=probs.new_ones(len(experts)),
            num_tokens=len(experts),
            num_experts=num_experts,
            logits=probs.log(),
            probs=probs,
            top_k=1,
            has_drops=False,
        )

    @property
    def choices(self) -> Tensor:
        """(T, K) expert positions, -1 where dropped.

        Raises:
            ValueError: if the router did not choose a fixed number of experts for each token.
        """
        return self._by_token(self.expert_index)

    @property
    def requested_choices(self) -> Tensor:
        """(T, K) expert positions before a capacity limit dropped some: what the balancing losses take."""
        return self._by_token(self.expert_index if self.requested is None else self.requested)

    def _by_token(self, index: Tensor) -> Tensor:
        if self.top_k is None:
            raise ValueError("this routing does not hold the same number of choices for each token")
        return index.view(self.num_tokens, self.top_k)

    @property
    def load(self) -> Tensor:
        """(E,) int64: assignments that each expert received."""
        slots = torch.where(self.expert_index < 0, self.num_experts, self.expert_index)
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=slots.device)
        return counts.scatter_add_(0, slots, torch.ones_like(slots))[:-1]

    def matrix(self) -> Tensor:
        """(T, E) the combine weights as a matrix, zero where an expert was not chosen."""
        valid = self.expert_index >= 0
        position = self.token_index * self.num_experts + self.expert_index.clamp(min=0)
        weight = torch.where(valid, self.weight, torch.zeros_like(self.weight))
        flat = weight.new_zeros(self.num_tokens * self.num_experts).index_add(0, position, weight)
        return flat.view(self.num_tokens, self.num_experts)

    @property
    def source(self) -> Tensor:
        """A tensor that every gradient from the layer's output to the router passes through."""
        return self.logits

    def detach(self) -> "Routing":
        """The same record without its autograd graph."""
        tensors = {
            field.name: value.detach()
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)


@dataclass(eq=False, kw_only=True)
class SlotRouting(Routing):
    """Experts compute mixtures of tokens, and tokens mix the results.

    slot_bep = sum_s dispatch_bsep x_bs and y_bs = sum_ep combine_bsep f_e(slot_bep), for T = B S tokens in B
    sequences and P slots of each expert. The triples hold the sum over an expert's slots of the combine weights.

    Args:
        dispatch: (B, S, E, P) float, adding up to 1 over S; 0 in padding and where an expert is closed.
        combine: (B, S, E, P) float, adding up to 1 over E and P; 0 in padding and where an expert is closed.
    """

    dispatch: Tensor
    combine: Tensor

    @property
    def source(self) -> Tensor:
        return self.dispatch


@dataclass(eq=False, kw_only=True)
class MergedRouting(Routing):
    """Tokens are computed by merged experts.

    y_t = f(x_t; theta) with theta = sum_e merge_weight_me theta_e for the merge m = merge_index_t. The triples repeat
    the merge's weights for each of its tokens.

    Args:
        merge_weight: (M, E) float, adding up to 1 over E.
        merge_index: (T,) int64 in [0, M), or -1 for padding.
    """

    merge_weight: Tensor
    merge_index: Tensor

    @property
    def source(self) -> Tensor:
        return self.merge_weight
