"""Routers that merge the experts' weights into one expert for many tokens: SMEAR and Lory."""

from abc import abstractmethod

import torch
from torch import Tensor

from modmoe.gating.base import Scope, at_least_float32, require_served
from modmoe.gating.blended import check_tokens, dense_triples, kept_pairs, sequence_shape
from modmoe.gating.token_choice import DenseRouter
from modmoe.routing import MergedRouting
from modmoe.rows import Rows


class MergingRouter(DenseRouter):
    """theta_m = sum_e p_me theta_e, with p_m = softmax(s_m W^T + b) of what a merge reads: its source s_m.

    A sequence is the last axis before the features; a call with x (T, D) has one. The experts need equal sizes. An
    expert is open to a merge if it is open to all of the merge's tokens. ``routing.logits`` are those of the token's
    merge. Merged weights give the mixture of the outputs only where the experts are linear. Growth with
    ``init="copy"`` is exact, as in a dense router.
    """

    form = "merges"

    @property
    def scope(self) -> Scope:
        return "sequence"

    @abstractmethod
    def sources(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """What each merge reads, and which merge of its sequence each token belongs to.

        Args:
            x: (B, S, D), zero in padding.
            real: (B, S) bool.
        Returns:
            (B, J, D) and (B, S) int64 in [0, J), anything in padding.
        """

    def forward(
        self,
        x: Tensor,
        rows: Rows,
        mask: Tensor | None = None,
        open_experts: Tensor | None = None,
        top_k: int | None = None,
        ids: Tensor | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> MergedRouting:
        num_tokens, num_experts = x.shape[0], len(rows.ids)
        self.check_pool(num_experts, top_k)
        self.check_ids(ids, num_tokens)
        num_sequences, length = sequence_shape(num_tokens, shape)
        real = torch.ones(num_tokens, dtype=torch.bool, device=x.device) if mask is None else mask
        with torch.autocast(x.device.type, enabled=False):  # it would score in half precision
            read = x if mask is None else torch.where(mask.unsqueeze(1), x, torch.zeros_like(x))
            wide = at_least_float32(read).reshape(num_sequences, length, x.shape[1])
            sources, segment = self.sources(wide, real.view(num_sequences, length))
            merge_logits = self.score(sources.flatten(0, 1), rows)
        first = torch.arange(num_sequences, device=x.device).unsqueeze(1) * sources.shape[1]
        merge_index = torch.where(real, (first + segment).view(-1), -1)
        logits = merge_logits.index_select(0, merge_index.clamp(min=0))
        check_tokens(x, logits, open_experts, mask)
        allowed, masked = None, merge_logits
        if open_experts is not None:
            allowed = self._open_to_merges(open_experts.expand(num_tokens, num_experts), merge_index, len(merge_logits))
            masked = masked.masked_fill(~allowed, -torch.inf)
            allowed = allowed.index_select(0, merge_index.clamp(min=0))
            served = allowed.any(1) if mask is None else allowed.any(1) | ~mask
            require_served(served, "no expert is open to all tokens that are merged together")
        merge_weight = masked.softmax(1)
        probs = merge_weight.index_select(0, merge_index.clamp(min=0))
        return MergedRouting(
            **dense_triples(probs, kept_pairs(num_experts, num_tokens, allowed, mask)),
            logits=logits,
            probs=probs,
            mask=mask,
            open_experts=allowed,
            merge_weight=merge_weight,
            merge_index=merge_index,
        )

    @staticmethod
    def _open_to_merges(allowed: Tensor, merge_index: Tensor, num_merges: int) -> Tensor:
        """(M, E) bool: the experts that are open to each token of the merge; all of them where it has none."""
        closed = (~allowed & (merge_index >= 0).unsqueeze(1)).float()
        counts = closed.new_zeros(num_merges, allowed.shape[1]).index_add(0, merge_index.clamp(min=0), closed)
        return counts == 0


class SmearRouter(MergingRouter):
    """One merged expert for each sequence, by the mean of its real tokens. Not causal.

    Args:
        in_features: D.
    Source:
        Muqeeth et al. 2023 (SMEAR). Their expert dropout and their layer norm before the router are left to the host.
    """

    @property
    def causal(self) -> bool:
        return False

    def sources(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        count = real.sum(1).clamp(min=1).unsqueeze(1)
        return (x.sum(1) / count).unsqueeze(1), torch.zeros_like(real, dtype=torch.int64)


class LoryRouter(MergingRouter):
    """One merged expert for each segment of L real tokens, by the mean of the segment before it. Causal.

    The first segment has none before it: it reads its own first token, behind a stop-gradient. Segments count real
    tokens, so that padding anywhere changes nothing. A sequence of one segment gives the gate no gradient.

    Args:
        in_features: D.
        segment_length: L.
    Raises:
        ValueError: if segment_length is below 1.
    Source:
        Zhong et al. 2024 (Lory), causal segment routing. There the first segment reads its own mean behind the
        stop-gradient: no gradient comes from later tokens, but their values do. Its first token keeps it causal.
    """

    def __init__(self, in_features: int, segment_length: int = 256):
        super().__init__(in_features)
        if segment_length < 1:
            raise ValueError(f"segment_length must be at least 1, got {segment_length}")
        self.segment_length = segment_length

    def sources(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        num_sequences, length, num_features = x.shape
        num_segments = -(-length // self.segment_length)
        rank = real.cumsum(1) - 1
        segment = rank.clamp(min=0) // self.segment_length
        place = segment.unsqueeze(2).expand_as(x)
        sums = x.new_zeros(num_sequences, num_segments, num_features).scatter_add(1, place, x)  # padding adds zeros
        first = torch.where((real & (rank == 0)).unsqueeze(2), x, torch.zeros_like(x)).sum(1, keepdim=True).detach()
        # a segment that another one follows is full
        return torch.cat([first, sums[:, :-1] / self.segment_length], 1)[:, :num_segments], segment
