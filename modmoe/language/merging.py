"""Merged experts in a causal model: SMEAR by what has been read so far, and one step of it with a cache."""

from dataclasses import replace

import torch
from torch import Tensor

from modmoe.gating.merging import MergingRouter
from modmoe.language.attention import BlockCache, Step
from modmoe.layer import MoELayer
from modmoe.routing import MergedRouting


class PrefixSmearRouter(MergingRouter):
    """One merged expert for each segment of L real tokens, by the mean of all segments before it. Causal.

    The first segment reads its own first token, behind a stop-gradient. Segments count real tokens, so that padding
    changes nothing. Where LoryRouter reads the segment before alone, this one reads everything before.

    Args:
        in_features: D.
        segment_length: L; 1 merges anew for every token.
    Raises:
        ValueError: if segment_length is below 1.
    Source:
        Muqeeth et al. 2023 (SMEAR), who read the mean of the whole sequence: that looks ahead, and a model that
        predicts the next token would see it. The segments, and the start, are those of Zhong et al. 2024 (Lory).
    """

    def __init__(self, in_features: int, segment_length: int = 32):
        super().__init__(in_features)
        if segment_length < 1:
            raise ValueError(f"segment_length must be at least 1, got {segment_length}")
        self.segment_length = segment_length

    def sources(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        num_segments = -(-x.shape[1] // self.segment_length)
        rank = real.cumsum(1) - 1
        segment = rank.clamp(min=0) // self.segment_length
        sums = x.new_zeros(len(x), num_segments, x.shape[2])
        sums = sums.scatter_add(1, segment.unsqueeze(2).expand_as(x), x)  # padding adds zeros
        first = torch.where((real & (rank == 0)).unsqueeze(2), x, torch.zeros_like(x)).sum(1, keepdim=True).detach()
        # a segment that another one follows is full
        counts = self.segment_length * torch.arange(1, num_segments, device=x.device, dtype=x.dtype)
        return torch.cat([first, sums[:, :-1].cumsum(1) / counts.view(1, -1, 1)], 1), segment


def merge_step(layer: MoELayer, x: Tensor, step: Step, cache: BlockCache) -> Tensor:
    """What a layer of merged experts gives for the tokens after those in a cache, which takes their inputs in.

    Which experts are merged depends on earlier tokens, so all are routed, which is cheap; the new ones alone are
    computed.

    Args:
        layer: with a MergingRouter.
        x: (B, S, D).
        step: of this call.
        cache: of this block.
    Returns:
        (B, S, D).
    """
    whole = x if cache.inputs is None else torch.cat([cache.inputs, x], 1)
    cache.inputs = whole
    routing = layer.route(whole, step.whole_mask)
    assert isinstance(routing, MergedRouting)
    return layer.mix(x, newest(routing, len(x), x.shape[1]))


def newest(routing: MergedRouting, num_sequences: int, length: int) -> MergedRouting:
    """The part of a routing of (B, P + S) tokens that is about the last S of each sequence."""
    places = torch.arange(routing.num_tokens, device=routing.merge_index.device)
    places = places.view(num_sequences, -1)[:, -length:].flatten()
    # -1 stands for padding; in front of the others, it makes place 0 the first merge
    index = torch.cat([routing.merge_index.new_tensor([-1]), routing.merge_index[places]])
    merges, local = index.unique(return_inverse=True)
    num_experts = routing.num_experts

    def rows(tensor: Tensor) -> Tensor:
        return tensor.view(-1, num_experts)[places].flatten()

    return replace(
        routing,
        token_index=torch.arange(len(places), device=places.device).repeat_interleave(num_experts),
        expert_index=rows(routing.expert_index),
        weight=rows(routing.weight),
        num_tokens=len(places),
        logits=routing.logits[places],
        probs=routing.probs[places],
        mask=None if routing.mask is None else routing.mask[places],
        open_experts=None if routing.open_experts is None else routing.open_experts[places],
        merge_weight=routing.merge_weight[merges[1:]],
        merge_index=local[1:] - 1,
    )
