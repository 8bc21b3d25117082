"""Top-k among the experts of a few groups only: DeepSeek-V2 by softmax, DeepSeek-V3 by sigmoid and a bias."""

from abc import abstractmethod

import torch
from torch import Tensor

from modmoe.gating.base import adjustable_experts
from modmoe.gating.token_choice import TopKRouter
from modmoe.growable import GrowableBuffer, Init, RowSpec
from modmoe.pool import ExpertPool
from modmoe.routing import Routing
from modmoe.rows import Preserving, Rows


class GroupLimitedRouter(TopKRouter):
    """Each token chooses k experts out of its ``top_groups`` best groups of ``num_groups``.

    An expert belongs to group id % num_groups, by its stable id: growth and removal never move an expert to another
    group, and new experts spread over the groups in turn. (The papers cut a fixed number of experts into blocks;
    where experts start alike, that is the same but for their order.) Groups may so be of unequal size, or empty; a
    group without an open expert is chosen last. Where the chosen groups hold fewer than k open experts, the token's
    other choices are dropped.

    Args:
        in_features: D.
        top_k: k; a call may use another.
        num_groups: G; 1 for no grouping.
        top_groups: of these, how many a token's experts may come from.
        routed_scaling: what the weights are multiplied by.
    Raises:
        ValueError: on k < 1, or unless 1 <= top_groups <= num_groups and routed_scaling > 0.
    """

    def __init__(
        self, in_features: int, top_k: int, num_groups: int = 1, top_groups: int = 1, routed_scaling: float = 1.0
    ):
        super().__init__(in_features, top_k)
        if not 1 <= top_groups <= num_groups:
            raise ValueError(f"1 <= top_groups <= num_groups is needed, got {top_groups} and {num_groups}")
        if routed_scaling <= 0:
            raise ValueError(f"routed_scaling must be positive, got {routed_scaling}")
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.routed_scaling = routed_scaling

    @property
    def preserving_growth(self) -> Preserving | None:
        # a copy has another id: it would raise the score of a group, and so move tokens of other experts
        return super().preserving_growth if self.top_groups == self.num_groups else None

    def groups(self, rows: Rows) -> Tensor:
        """(E,) int64: each expert's group, by position."""
        return torch.tensor(self._groups(rows), device=rows["weight"].device)

    def _groups(self, rows: Rows) -> list[int]:
        return [expert_id % self.num_groups for expert_id in rows.ids]

    @abstractmethod
    def group_scores(self, members: Tensor) -> Tensor:
        """Scores (T, G) of groups, from those of their members (T, G, E), -inf for all others."""

    def limit(self, scores: Tensor, rows: Rows) -> Tensor:
        """The scores (T, E), -inf outside each token's best groups: 0 would beat the negative ones inside."""
        if self.top_groups == self.num_groups:
            return scores
        one_hot = torch.nn.functional.one_hot(self.groups(rows), self.num_groups).T.bool()  # (G, E)
        best = self.group_scores(scores.unsqueeze(1).masked_fill(~one_hot, -torch.inf)).topk(self.top_groups, dim=1)
        inside = one_hot[best.indices].any(1)
        return scores.masked_fill(~inside, -torch.inf)

    def declined(self, weights: Tensor, allowed: Tensor | None, rows: Rows) -> Tensor | None:
        sizes = sorted(self._groups(rows).count(group) for group in range(self.num_groups))
        if allowed is None and sum(sizes[: self.top_groups]) >= weights.shape[1]:
            return None  # whatever groups are chosen, they hold k experts
        return weights <= 0


class DeepSeekV2Router(GroupLimitedRouter):
    """Weights s = softmax(x W^T) of the k best experts, not normalised; a group is as good as its best expert.

    Args:
        in_features: D.
        top_k: k.
        num_groups: G (one group a device in the paper).
        top_groups: M.
        routed_scaling: 16 in the paper's large model.
    Raises:
        ValueError: see GroupLimitedRouter.
    Source:
        DeepSeek-V2, 2024, section on device-limited routing; see GroupLimitedRouter for the groups.
    """

    @property
    def weight_sum(self) -> str:
        return "<= 1" if self.routed_scaling <= 1 else "any"

    def group_scores(self, members: Tensor) -> Tensor:
        return members.amax(2)

    def select(
        self, logits: Tensor, allowed: Tensor | None, top_k: int | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        k = self.top_k if top_k is None else top_k
        probs = logits.softmax(1)
        # by logits, whose order is that of the probabilities: far behind the best one, these are all 0
        values, choices = self.limit(logits, rows).topk(k, dim=1)
        weights = probs.gather(1, choices) * self.routed_scaling
        return choices, weights.masked_fill(values == -torch.inf, 0.0), probs


class DeepSeekV3Router(GroupLimitedRouter):
    """Selects by s + b with s = sigmoid(x W^T), weighs by s alone: routed_scaling * s_i / sum of the selected s.

    b is a statistic of each expert that balances the load without a loss: ``layer.update_router()``, after each
    optimizer step, moves it by ``update_rate`` towards the mean load,

        b += u * sign(mean load - load),

    of the experts that are live and were open to some real token: frozen ones neither move nor count. A group is as
    good as the sum of its two best s + b. With k = 1 a normalised weight would be constant and give the gate no
    gradient: unless ``renormalize=True`` is asked for, it is routed_scaling * s_i then. If it is asked for, the weight
    is exactly routed_scaling and its gradient that of routed_scaling * log s_i (straight-through).

    In bfloat16 steps of 1e-3 are lost on a bias above .25: keep the gate in float32.

    Args:
        in_features: D.
        top_k: k.
        num_groups: G.
        top_groups: M.
        routed_scaling: 2.5 in the paper.
        update_rate: u.
        renormalize: whether to divide by the sum of the selected s; None for True with k > 1 and False with k = 1.
    Raises:
        ValueError: see GroupLimitedRouter; or on a negative update_rate.
    Source:
        DeepSeek-V3, 2024, section 2.1.2; see GroupLimitedRouter for the groups. There k > 1, and no expert is frozen.
    """

    def __init__(
        self,
        in_features: int,
        top_k: int,
        num_groups: int = 1,
        top_groups: int = 1,
        routed_scaling: float = 1.0,
        update_rate: float = 1e-3,
        renormalize: bool | None = None,
    ):
        super().__init__(in_features, top_k, num_groups, top_groups, routed_scaling)
        if update_rate < 0:
            raise ValueError(f"update_rate must be at least 0, got {update_rate}")
        self.update_rate = update_rate
        self.renormalize = renormalize

    def row_specs(self) -> dict[str, RowSpec]:
        return {**super().row_specs(), "selection_bias": RowSpec((), Init("constant"), trainable=False)}

    @property
    def weight_sum(self) -> str:
        normalized = self._renormalizes(self.top_k)
        if self.routed_scaling == 1 and normalized:
            return "1"
        return "<= 1" if self.routed_scaling <= 1 and (normalized or self.top_k == 1) else "any"

    def group_scores(self, members: Tensor) -> Tensor:
        best = members.topk(min(2, members.shape[2]), dim=2).values
        second = best[:, :, 1:].masked_fill(best[:, :, 1:] == -torch.inf, 0.0)  # a group may have one expert only
        return best[:, :, 0] + second.sum(2)

    def select(
        self, logits: Tensor, allowed: Tensor | None, top_k: int | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        k = self.top_k if top_k is None else top_k
        scores = logits.sigmoid()
        tiny = torch.finfo(scores.dtype).tiny
        biased = (scores + rows["selection_bias"].to(scores.dtype)).masked_fill(logits == -torch.inf, -torch.inf)
        values, choices = self.limit(biased.detach(), rows).topk(k, dim=1)
        weights = scores.gather(1, choices).masked_fill(values == -torch.inf, 0.0)
        if self._renormalizes(k):
            total = weights.detach() if k == 1 else weights.sum(1, keepdim=True)
            weights = weights / total.clamp(min=tiny)
        return choices, weights * self.routed_scaling, scores / scores.sum(1, keepdim=True).clamp(min=tiny)

    @torch.no_grad()
    def update(self, pool: ExpertPool, namespace: str, routing: Routing) -> None:
        """Move the biases; nothing in evaluation.

        Raises:
            ValueError: if the pool has grown since the routing.
        """
        if not self.training:
            return
        counted = adjustable_experts(pool, routing)
        load = routing.load.double()
        mean = (load * counted).sum() / counted.sum().clamp(min=1)
        step = self.update_rate * torch.sign(mean - load) * counted
        growable = pool.growable(namespace, "selection_bias")
        assert isinstance(growable, GrowableBuffer)
        for position, expert_id in enumerate(pool.ids):
            if not pool.record(expert_id).frozen:
                bias = growable.stack([expert_id])
                growable.write(expert_id, bias + step[position].to(bias.dtype))
