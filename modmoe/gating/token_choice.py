"""Linear gates with which each token chooses: dense softmax and top-k."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.gating.base import Router, at_least_float32
from modmoe.gating.capacity import Capacity
from modmoe.growable import Init, RowSpec
from modmoe.rows import Preserving, Rows

GATE_STD = 0.02


class DenseRouter(Router):
    """Every expert computes every token, weighted by softmax(x W^T + b) over the open experts.

    Growth with ``init="copy"`` is exact: the source's bias and the copy's are lowered so that together they weigh
    what the source did.

    Args:
        in_features: D.
    Source:
        Jacobs et al. 1991, adaptive mixtures of local experts.
    """

    def __init__(self, in_features: int):
        super().__init__()
        self.in_features = in_features

    def row_specs(self) -> dict[str, RowSpec]:
        return {"weight": RowSpec((self.in_features,), Init("normal", std=GATE_STD)), "bias": RowSpec(())}

    @property
    def preserving_growth(self) -> Preserving:
        return "split"

    @property
    def weight_sum(self) -> str:
        return "1"

    def num_active(self, num_experts: int) -> int:
        return num_experts

    def check_pool(self, num_experts: int, top_k: int | None = None) -> None:
        if top_k is not None:
            raise ValueError(f"a dense router uses all {num_experts} experts: it takes no top_k")

    def score(self, x: Tensor, rows: Rows) -> Tensor:
        return F.linear(*(at_least_float32(t) for t in (x, rows["weight"], rows["bias"])))

    def select(
        self, logits: Tensor, allowed: Tensor | None, top_k: int | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        probs = logits.softmax(1)
        return torch.arange(logits.shape[1], device=logits.device).expand_as(logits), probs, probs


class TopKRouter(Router):
    """Each token goes to the k experts with the highest logits x W^T.

    Weights, for the selected set S:

    - ``order="topk_softmax"`` (Mixtral): softmax over the logits of S; they add up to 1.
    - ``order="softmax_topk"``: the probabilities of the softmax over all open experts, restricted to S; divided by
      their sum if ``renormalize``.

    With one selected expert a renormalised weight is the constant 1 and would give the gate no gradient. Unless
    ``renormalize=True`` is asked for, k = 1 therefore takes the probability before selection (as Switch does); if
    it is asked for, the weight is exactly 1 and its gradient that of log p (straight-through).

    Args:
        in_features: D.
        top_k: k; a call may use another.
        order: see above.
        renormalize: None for True with k > 1 and False with k = 1.
        capacity: how many assignments an expert takes at most; None for no limit.
    Raises:
        ValueError: on k < 1, an unknown order, or "topk_softmax" with renormalize=False.
    Source:
        Shazeer et al. 2017 (softmax after selection); Fedus et al. 2021 (k = 1); Jiang et al. 2024 (Mixtral).
    """

    def __init__(
        self,
        in_features: int,
        top_k: int = 2,
        order: Literal["topk_softmax", "softmax_topk"] = "topk_softmax",
        renormalize: bool | None = None,
        capacity: Capacity | None = None,
    ):
        super().__init__()
        if order not in ("topk_softmax", "softmax_topk"):
            raise ValueError(f"order is 'topk_softmax' or 'softmax_topk', got '{order}'")
        if order == "topk_softmax" and renormalize is False:
            raise ValueError("a softmax over the selected logits adds up to 1: use order='softmax_topk' for less")
        _check_k(top_k)
        self.in_features = in_features
        self.top_k = top_k
        self.order = order
        self.renormalize = renormalize
        self.capacity = capacity

    def row_specs(self) -> dict[str, RowSpec]:
        return {"weight": RowSpec((self.in_features,), Init("normal", std=GATE_STD))}

    @property
    def preserving_growth(self) -> Preserving | None:
        return "tie" if self.top_k == 1 and self.renormalize else None

    def _renormalizes(self, k: int) -> bool:
        return self.renormalize if self.renormalize is not None else k > 1

    @property
    def weight_sum(self) -> str:
        return "1" if self._renormalizes(self.top_k) and self.capacity is None else "<= 1"

    def num_active(self, num_experts: int) -> int:
        return min(self.top_k, num_experts)

    def check_pool(self, num_experts: int, top_k: int | None = None) -> None:
        k = self.top_k if top_k is None else top_k
        _check_k(k)
        if k > num_experts:
            raise ValueError(f"top_k={k} experts cannot be chosen out of {num_experts}")

    def score(self, x: Tensor, rows: Rows) -> Tensor:
        return F.linear(at_least_float32(x), at_least_float32(rows["weight"]))

    def select(
        self, logits: Tensor, allowed: Tensor | None, top_k: int | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        k = self.top_k if top_k is None else top_k
        probs = logits.softmax(1)
        values, choices = logits.topk(k, dim=1)
        if self.order == "topk_softmax" and k > 1:
            return choices, values.softmax(1), probs
        weights = probs.gather(1, choices)
        if self._renormalizes(k):
            weights = weights / (weights.detach() if k == 1 else weights.sum(1, keepdim=True))
        return choices, weights, probs


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"top_k must be at least 1, got {k}")
