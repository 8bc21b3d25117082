"""A gate that compares directions, so that no expert wins by the length of its row."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modmoe.gating.base import at_least_float32
from modmoe.gating.capacity import Capacity
from modmoe.gating.token_choice import TopKRouter
from modmoe.growable import Init, RowSpec
from modmoe.rows import Rows

INITIAL_TEMPERATURE = 0.5
MIN_TEMPERATURE = 0.01


class CosineRouter(TopKRouter):
    """Each token goes to the k experts with the highest p = softmax(cos(P x, e_i) / tau), weighted by p.

    P and tau are shared by all experts and trained: while they are, they move the scores of frozen experts, too.
    ``freeze()`` without ids freezes them.

    Args:
        in_features: D.
        proj_features: R, the size of P x and of each expert's row e_i; None for the smaller of D // 2 and 256, or 1.
        top_k: k; a call may use another.
        capacity: how many assignments an expert takes at most; None for no limit.
    Raises:
        ValueError: on k < 1 or proj_features < 1.
    Source:
        X-MoE, Chi et al. 2022, there with k = 1. tau starts at 0.5 and is kept at 0.01 or above, learned as log(1/tau).
    """

    shared_parts: ClassVar[tuple[str, ...]] = ("projection", "log_scale")

    def __init__(
        self, in_features: int, proj_features: int | None = None, top_k: int = 1, capacity: Capacity | None = None
    ):
        super().__init__(in_features, top_k, order="softmax_topk", renormalize=False, capacity=capacity)
        if proj_features is None:
            proj_features = max(1, min(in_features // 2, 256))
        if proj_features < 1:
            raise ValueError(f"proj_features must be at least 1, got {proj_features}")
        self.proj_features = proj_features
        bound = 1 / math.sqrt(in_features)
        self.projection = nn.Parameter(torch.empty(proj_features, in_features).uniform_(-bound, bound))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(INITIAL_TEMPERATURE)))

    def row_specs(self) -> dict[str, RowSpec]:
        return {"embedding": RowSpec((self.proj_features,), Init("normal", std=self.proj_features**-0.5))}

    def score(self, x: Tensor, rows: Rows) -> Tensor:
        projection, embedding = at_least_float32(self.projection), at_least_float32(rows["embedding"])
        projected = F.linear(at_least_float32(x), projection)
        cosine = F.linear(F.normalize(projected, dim=1), F.normalize(embedding, dim=1))
        return cosine * at_least_float32(self.log_scale).clamp(max=-math.log(MIN_TEMPERATURE)).exp()
