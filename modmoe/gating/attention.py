"""A gate in which experts attend to each other before they are scored."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.gating.base import at_least_float32
from modmoe.gating.token_choice import TopKRouter
from modmoe.growable import Init, RowSpec
from modmoe.rows import Rows


class AttentionRouter(TopKRouter):
    """Scores h = softmax(q k^T) v for each token, with q, k, v = x W_q^T, x W_k^T, x W_v^T in R^E; then as TopKRouter.

    The softmax runs over the experts that are open to the token, and tokens never see each other. An expert's score
    depends on the open ones beside it: growth moves the scores of frozen experts, unless the new ones are masked.
    ``layer.expert_score`` scores one expert as if it were alone: x . v_i.

    Args:
        in_features: D.
        top_k: k; a call may use another.
    Raises:
        ValueError: on k < 1.
    Source:
        Yuan 2.0-M32, Wu et al. 2024. That closed experts are left out of the softmax is ours, and so is k = 1 (see
        TopKRouter).
    """

    separate_scores: ClassVar[bool] = False

    def __init__(self, in_features: int, top_k: int = 2):
        super().__init__(in_features, top_k)

    def row_specs(self) -> dict[str, RowSpec]:
        # not as small as other gates' rows: with q k^T near 0 all experts would score the mean of v
        init = Init("uniform", fan_in=self.in_features)
        return {name: RowSpec((self.in_features,), init) for name in ("query", "key", "value")}

    def score(self, x: Tensor, rows: Rows) -> Tensor:
        return self.scores_among(x, rows, None, None)

    def scores_among(self, x: Tensor, rows: Rows, ids: Tensor | None, open_experts: Tensor | None) -> Tensor:
        x = at_least_float32(x)
        query, key, value = (F.linear(x, at_least_float32(rows[name])) for name in ("query", "key", "value"))
        attention = query.unsqueeze(2) * key.unsqueeze(1)  # (T, E, E)
        if open_experts is not None:
            # a token that nobody is open to is padding or an error of its own: no NaN here
            seen = open_experts | ~open_experts.any(-1, keepdim=True)
            attention = attention.masked_fill(~seen.unsqueeze(-2), -torch.inf)
        return (attention.softmax(2) @ value.unsqueeze(2)).squeeze(2)
