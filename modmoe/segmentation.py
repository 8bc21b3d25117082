"""Fine-grained experts: the hidden size of each cut into parts that are experts of their own."""

import copy
from typing import TypeVar

import torch

from modmoe.experts import Expert, MLPExpert, SwiGLUExpert
from modmoe.pool import ExpertPool

FFN = TypeVar("FFN", bound=Expert)
HIDDEN = "hidden_features"


def segmented(expert: FFN, num_segments: int) -> FFN:
    """The expert kind with a hidden size of H / m: m E of these experts, m k of them chosen, for E experts and k.

    Parameters and active parameters stay what they were, but for the gate's rows and for an output bias, of which
    each segment has its own.

    Args:
        expert: an MLPExpert or a SwiGLUExpert.
        num_segments: m, a divisor of H.
    Raises:
        ValueError: on another kind of expert, or an m that does not divide H.
    Source:
        Dai et al. 2024 (DeepSeekMoE), section on fine-grained expert segmentation.
    """
    if not isinstance(expert, MLPExpert | SwiGLUExpert):
        raise ValueError(f"an MLPExpert or a SwiGLUExpert can be segmented, got {expert}")
    fine = copy.copy(expert)
    fine.hidden_features = _part(expert.hidden_features, num_segments)
    return fine


@torch.no_grad()
def segment_pool(pool: ExpertPool, num_segments: int, scale: float = 1.0) -> ExpertPool:
    """Cut each expert of a pool into m experts whose outputs add up to ``scale`` times its own.

    The segments of the expert at position p stand at positions m p to m p + m - 1 and keep its task, and whether it is
    frozen. An output bias is divided among them. Only the experts' own rows are taken over: a layer on the new pool
    starts with a new gate. Gate rows repeated m times with m k chosen give each segment its expert's share; where the
    weights add up to 1, that is w / m, and ``scale=m`` keeps the layer's function.

    Args:
        pool: of MLPExpert or SwiGLUExpert; it is left as it is.
        num_segments: m, a divisor of every expert's hidden size.
        scale: of the outputs.
    Returns:
        A pool of m E experts, on the same device with the same dtype.
    Raises:
        ValueError: as :func:`segmented`, for any expert of the pool.
    """
    kind = segmented(pool.expert, num_segments)
    records = [pool.record(expert_id) for expert_id in pool.ids]
    widths = [_part(record.sizes[HIDDEN], num_segments) for record in records]
    like = pool.growable("expert", "w_in").like
    fine = ExpertPool(kind).to(device=like.device, dtype=like.dtype)
    for record, width in zip(records, widths, strict=True):
        ids = fine.add_experts(num_segments, task=record.task, hidden_features=width)
        whole = pool.namespace("expert", [record.id])
        for name, spec in pool.specs("expert").items():
            row = whole[name][0] * scale if name in kind.output_rows else whole[name][0]
            parts = (row / num_segments,) * num_segments
            if HIDDEN in spec.shape:
                parts = row.chunk(num_segments, dim=spec.shape.index(HIDDEN))
            (cohort,) = (t for t, rows, _ in fine.growable("expert", name).banks() if rows[0].owner == ids[0])
            cohort.copy_(torch.stack(parts))
        if record.frozen:
            fine.freeze(ids)
    fine.remove(fine.ids[:1])  # what a pool has to start with, of the description's size
    return fine


def _part(hidden_features: int, num_segments: int) -> int:
    if num_segments < 1 or hidden_features % num_segments:
        raise ValueError(f"num_segments must divide the hidden size {hidden_features}, got {num_segments}")
    return hidden_features // num_segments
