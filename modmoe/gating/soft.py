"""Soft MoE: slots that mix tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modmoe.gating.base import Router, Scope, at_least_float32
from modmoe.gating.blended import check_tokens, dense_triples, kept_pairs, sequence_shape
from modmoe.growable import Init, RowSpec
from modmoe.routing import SlotRouting
from modmoe.rows import Rows

EPS = 1e-6


class SoftRouter(Router):
    """Every expert computes P mixtures of a sequence's tokens, and every token mixes all their outputs.

    logits = l2norm(X) . (scale * l2norm(Phi)), with a row phi_ep for each slot p of each expert e
    dispatch = softmax of the logits over the sequence's tokens, combine = softmax over all slots

    The raw X is mixed, not the normalised. Nothing is dropped and nothing is discrete, but each output depends on the
    whole sequence: the last axis before the features, of which a call with x (T, D) has one. Padding has no part in
    any mixture. The cost is that of B E P tokens, however long the sequences are.

    ``routing.logits`` are each expert's logsumexp over its slots, so that their softmax is a token's weight on it.

    Args:
        in_features: D.
        slots: P, of each expert.
    Raises:
        ValueError: if slots is below 1.
    Source:
        Puigcerver et al. 2023, algorithms 1 and 2.
    """

    form = "slots"
    shared_parts = ("scale",)

    def __init__(self, in_features: int, slots: int = 1):
        super().__init__()
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self.in_features = in_features
        self.slots = slots
        self.scale = nn.Parameter(torch.ones(()))

    @property
    def scope(self) -> Scope:
        return "sequence"

    @property
    def causal(self) -> bool:
        return False

    def row_specs(self) -> dict[str, RowSpec]:
        # only a row's direction counts
        return {"phi": RowSpec((self.slots, self.in_features), Init("normal", std=self.in_features**-0.5))}

    @property
    def weight_sum(self) -> str:
        return "1"

    def num_active(self, num_experts: int) -> int:
        return num_experts

    def check_pool(self, num_experts: int, top_k: int | None = None) -> None:
        if top_k is not None:
            raise ValueError(f"a soft router mixes all {num_experts} experts: it takes no top_k")

    def slot_logits(self, x: Tensor, rows: Rows) -> Tensor:
        """(T, E, P) for x (T, D)."""
        phi = F.normalize(at_least_float32(rows["phi"]), dim=-1, eps=EPS) * self.scale
        return torch.einsum("td,epd->tep", F.normalize(at_least_float32(x), dim=-1, eps=EPS), phi)

    def score(self, x: Tensor, rows: Rows) -> Tensor:
        return self.slot_logits(x, rows).logsumexp(2)

    def select(
        self, logits: Tensor, allowed: Tensor | None, top_k: int | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("slots mix tokens: see forward")

    def forward(
        self,
        x: Tensor,
        rows: Rows,
        mask: Tensor | None = None,
        open_experts: Tensor | None = None,
        top_k: int | None = None,
        ids: Tensor | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> SlotRouting:
        num_tokens, num_experts = x.shape[0], len(rows.ids)
        self.check_pool(num_experts, top_k)
        self.check_ids(ids, num_tokens)
        size = (*sequence_shape(num_tokens, shape), num_experts, self.slots)
        with torch.autocast(x.device.type, enabled=False):  # it would score in half precision
            read = x if mask is None else torch.where(mask.unsqueeze(1), x, torch.zeros_like(x))
            slot_logits = self.slot_logits(read, rows)
            logits = slot_logits.logsumexp(2)
        check_tokens(x, logits, open_experts, mask)
        kept = kept_pairs(num_experts, num_tokens, open_experts, mask)
        if kept is None:
            by_slot = slot_logits.view(size)
            dispatch, combine = by_slot.softmax(1), by_slot.flatten(2).softmax(2).view(size)
        else:
            pairs = kept.unsqueeze(2).expand_as(slot_logits)
            dispatch = masked_softmax(slot_logits.view(size), pairs.view(size), 1)
            combine = masked_softmax(slot_logits.flatten(1), pairs.flatten(1), 1).view(size)
        allowed = None if open_experts is None else open_experts.expand(num_tokens, num_experts)
        probs = (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).softmax(1)
        return SlotRouting(
            **dense_triples(combine.sum(3).view(num_tokens, num_experts), kept),
            logits=logits,
            probs=probs,
            mask=mask,
            open_experts=allowed,
            dispatch=dispatch,
            combine=combine,
        )


def masked_softmax(logits: Tensor, kept: Tensor, dim: int) -> Tensor:
    """Softmax over the entries that are kept; 0 elsewhere, also where nothing is kept at all."""
    masked = logits.masked_fill(~kept, -torch.inf).masked_fill(~kept.any(dim, keepdim=True), 0.0)
    return torch.where(kept, masked.softmax(dim), torch.zeros_like(masked))
