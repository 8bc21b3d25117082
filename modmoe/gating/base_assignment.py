"""BASE layers: tokens and experts matched in balance."""

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from modmoe.gating.base import Assignment, Router, Scope, at_least_float32
from modmoe.gating.token_choice import GATE_STD
from modmoe.growable import Init, RowSpec
from modmoe.rows import Rows


class BaseAssignmentRouter(Router):
    """One expert for each token: in training the balanced assignment with the highest sum of scores, at test argmax.

    The score is x w_e, the weight sigmoid(x w_e). In training every expert takes T/E tokens, and where T/E is no whole
    number the one above or the one below. Where closed experts make that impossible, it is the most even assignment
    that is left. Padding takes no part.

    The assignment is made on the CPU, and its cost grows with the third power of T: about a thousand tokens at once
    are practical. In training it depends on the whole batch; at test each token stands alone.

    Args:
        in_features: D.
    Source:
        Lewis et al. 2021, equations 1 to 3. Theirs solves by auction, and asks for E to divide T.
    """

    def __init__(self, in_features: int):
        super().__init__()
        self.in_features = in_features

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
        return 1

    def check_pool(self, num_experts: int, top_k: int | None = None) -> None:
        if top_k not in (None, 1):
            raise ValueError(f"the assignment gives each token one expert, got top_k={top_k}")

    def score(self, x: Tensor, rows: Rows) -> Tensor:
        return F.linear(at_least_float32(x), at_least_float32(rows["weight"]))

    def select(
        self, logits: Tensor, allowed: Tensor | None, top_k: int | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        choices = logits.argmax(1, keepdim=True)
        return choices, logits.gather(1, choices).sigmoid(), logits.softmax(1)

    def assign(
        self, logits: Tensor, allowed: Tensor | None, mask: Tensor | None, top_k: int | None, rows: Rows
    ) -> Assignment:
        if not self.training:
            return super().assign(logits, allowed, mask, top_k, rows)
        real = torch.ones_like(logits[:, 0], dtype=torch.bool) if mask is None else mask
        matched = _outside_graphs(logits.detach()[real])
        choices = torch.full_like(real, -1, dtype=torch.int64).masked_scatter(real, matched)
        weight = logits.gather(1, choices.clamp(min=0).unsqueeze(1)).squeeze(1).sigmoid()
        return Assignment(
            torch.arange(len(logits), device=logits.device),
            choices,
            torch.where(real, weight, torch.zeros_like(weight)),
            logits.softmax(1),
            1,
            mask is not None,
        )


def balanced_assignment(scores: Tensor) -> Tensor:
    """The most even assignment of tokens to experts, and of those the one with the highest sum of scores.

    Args:
        scores: (T, E) float; -inf where an expert is closed. Each token has an open expert.
    Returns:
        (T,) int64 expert positions.
    """
    num_tokens = len(scores)
    if num_tokens == 0:
        return torch.zeros(0, dtype=torch.int64, device=scores.device)
    values = scores.double().cpu().numpy()
    finite = values[np.isfinite(values)]
    # An expert's n-th place costs n steps, and one step is more than all scores together can win: the loads' sum of
    # squares comes first. It is smallest where no load exceeds the smallest possible maximum.
    step = num_tokens * (finite.max() - finite.min()) + 1.0
    open_anywhere = int(np.isfinite(values).any(0).sum())
    places = -(-num_tokens // open_anywhere)
    while True:
        offers = values[:, :, None] - step * np.arange(places)
        try:
            tokens, place = linear_sum_assignment(offers.reshape(num_tokens, -1), maximize=True)
            break
        except ValueError:  # scipy's answer where closed experts leave too few places
            if places >= num_tokens:
                raise
            places = min(2 * places, num_tokens)
    chosen = np.empty(num_tokens, dtype=np.int64)
    chosen[tokens] = place // places
    return torch.from_numpy(chosen).to(scores.device)


# torch.compile would try to trace scipy, and warn
_outside_graphs = cast(Callable[[Tensor], Tensor], torch.compiler.disable(balanced_assignment))
