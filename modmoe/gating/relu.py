"""A gate that is differentiable through and through: how many experts it opens is learned."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.gating.base import Router, adjustable_experts, at_least_float32, open_pairs
from modmoe.gating.token_choice import GATE_STD
from modmoe.growable import Init, RowSpec
from modmoe.pool import ExpertPool
from modmoe.routing import Routing
from modmoe.rows import Preserving, Rows

L1_START = 1e-8
L1_FACTOR = 1.2
L1_MAX_STEPS = 200


class ReLURouter(Router):
    """Expert i weighs ReLU(x w_i + b_i); those that weigh 0 do not compute, and a token without any gets the output 0.

    The routing holds E choices for each token, -1 for those of weight 0. That about k experts are active is the work
    of an L1 penalty, for each layer and step

        l1_coefficient * relu_l1_loss(routing.matrix(), k, routing.mask)

    and of ``layer.update_router()`` after it, which multiplies the coefficient by 1.2 if less than the share 1 - k/E
    of the weights is 0, and divides it by 1.2 otherwise. Both run over live experts that are open: give the loss
    these as ``open_experts``. An expert's weight is its own affair: growth with ``init="zero"`` is exact.

    Args:
        in_features: D.
        top_k: k, the mean number of active experts that is aimed at.
    Raises:
        ValueError: on k < 1.
    Source:
        ReMoE, Wang et al. 2024; the coefficient starts at 1e-8. There one serves all layers; here each router has its
        own, saved with the model as the number of steps up, which half precision keeps as well, and at most 200 of
        them either way: where the goal is out of reach it would grow until it overflows. The bias (0 at the start) is
        ours: of inputs that are symmetric around 0, x w_i is positive for half, whatever w_i is.
    """

    shared_parts: ClassVar[tuple[str, ...]] = ("l1_steps",)
    l1_steps: Tensor
    shared_frozen: Tensor

    def __init__(self, in_features: int, top_k: int = 2):
        super().__init__()
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.in_features = in_features
        self.top_k = top_k
        self.register_buffer("l1_steps", torch.tensor(0))
        self.register_buffer("shared_frozen", torch.tensor(False))

    @property
    def l1_coefficient(self) -> Tensor:
        """() float32: lambda."""
        return L1_START * torch.pow(L1_FACTOR, self.l1_steps.float())

    def row_specs(self) -> dict[str, RowSpec]:
        return {"weight": RowSpec((self.in_features,), Init("normal", std=GATE_STD)), "bias": RowSpec(())}

    @property
    def weight_sum(self) -> str:
        return "any"

    @property
    def preserving_growth(self) -> Preserving:
        return "zero"

    def num_active(self, num_experts: int) -> int:
        return min(self.top_k, num_experts)

    def check_pool(self, num_experts: int, top_k: int | None = None) -> None:
        if top_k is not None:
            raise ValueError("a ReLU router learns how many experts it opens: it takes no top_k")

    def score(self, x: Tensor, rows: Rows) -> Tensor:
        return F.linear(*(at_least_float32(t) for t in (x, rows["weight"], rows["bias"])))

    def select(
        self, logits: Tensor, allowed: Tensor | None, top_k: int | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, choices = logits.sort(dim=1, descending=True, stable=True)
        gates = logits.relu()
        total, is_open = gates.sum(1, keepdim=True), (logits > -torch.inf).to(gates.dtype)
        # a distribution in any case: where nothing is active, even
        probs = torch.where(total > 0, gates, is_open)
        return choices, values.relu(), probs / probs.sum(1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)

    def declined(self, weights: Tensor, allowed: Tensor | None, rows: Rows) -> Tensor:
        return weights <= 0

    @torch.no_grad()
    def update(self, pool: ExpertPool, namespace: str, routing: Routing) -> None:
        """Move the coefficient; nothing in evaluation, while it is frozen, or where no live expert was open.

        Raises:
            ValueError: if the pool has grown since the routing.
        """
        if not self.training or self.shared_frozen:
            return
        pairs = open_pairs(routing) & adjustable_experts(pool, routing)
        active = ((routing.matrix() > 0) & pairs).sum()
        num_real = routing.num_tokens if routing.mask is None else routing.mask.sum()
        # sparsity < 1 - k/E  <=>  active > T k, in whole numbers
        direction = torch.where(active > self.top_k * num_real, 1, -1)
        steps = self.l1_steps + torch.where(pairs.any(), direction, 0)
        self.l1_steps = steps.clamp(-L1_MAX_STEPS, L1_MAX_STEPS)

    def freeze_shared(self, frozen: bool = True) -> None:
        """Stop (or resume) adjusting the coefficient."""
        self.shared_frozen = torch.full_like(self.shared_frozen, frozen)
