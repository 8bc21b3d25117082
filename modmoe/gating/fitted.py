"""The common base of gates that are fitted to data, not trained by gradient."""

from abc import abstractmethod

import torch
from torch import Tensor

from modmoe.gating.base import Router, at_least_float32
from modmoe.growable import GrowableBuffer
from modmoe.pool import ExpertPool
from modmoe.rows import Rows


class FittedRouter(Router):
    """A gate whose rows are written by :meth:`observe` from an expert's own data.

    The best k experts by score are chosen; their weights are the softmax of their scores, so that k = 1 has weight 1.
    An expert that has observed nothing is chosen only where no expert that has is open.

    Args:
        in_features: D.
        top_k: experts for each token, fewer while the pool is smaller; a call's own top_k has to fit the pool.
    Attributes:
        streaming: True where an expert's data may be observed in parts, and the parts do not matter (up to rounding);
            False where one call has to bring all of it.
        mergeable: True where the rows of two experts that observed the same classes can be combined exactly.
    Raises:
        ValueError: on in_features < 1 or top_k < 1.
    """

    streaming: bool = True
    mergeable: bool = False

    def __init__(self, in_features: int, top_k: int = 1):
        super().__init__()
        if in_features < 1 or top_k < 1:
            raise ValueError(f"in_features and top_k must be at least 1, got {in_features} and {top_k}")
        self.in_features = in_features
        self.top_k = top_k

    @property
    def weight_sum(self) -> str:
        return "1"

    def num_active(self, num_experts: int) -> int:
        return min(self.top_k, num_experts)

    def check_pool(self, num_experts: int, top_k: int | None = None) -> None:
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_k is not None and top_k > num_experts:
            raise ValueError(f"top_k={top_k} experts cannot be chosen out of {num_experts}")

    @abstractmethod
    def class_log_joint(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Scores of single classes: the gate as a classifier of its own, which needs no expert.

        Args:
            x: (T, D).
            rows: this router's rows.
        Returns:
            scores (T, R), of which the highest wins, and the class of each, (R,) int64.
        """

    def class_owner(self, rows: Rows) -> Tensor:
        """(R,) int64: the position of the expert that each class of :meth:`class_log_joint` belongs to."""
        return rows.owner("label")

    @abstractmethod
    def updated_rows(self, old: dict[str, Tensor], x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What one expert's rows become.

        Where a router keeps running state that experts share, this updates it, as the last thing that it does.

        Args:
            old: the expert's rows, (R, ...) by name; copies, R = 0 at first.
            x: (n, D) float, finite, n > 0.
            labels: (n,) int64.
        Returns:
            All of its rows, the old ones first and in their order.
        Raises:
            ValueError: on data that this gate cannot take.
        """

    def rows_among(self, others: Rows, old: dict[str, Tensor], x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """As :meth:`updated_rows`, for a gate that also reads what the other experts' rows hold."""
        return self.updated_rows(old, x, labels)

    def observed_labels(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """The label of each row of x, as the gate tells them apart.

        Raises:
            ValueError: unless there is one integer label for each row.
        """
        if labels is None or labels.shape != x.shape[:1] or labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"one integer label for each of the {len(x)} rows is needed")
        return labels.to(device=x.device, dtype=torch.int64)

    @torch.no_grad()
    def observe(
        self,
        pool: ExpertPool,
        namespace: str,
        expert_id: int,
        x: Tensor,
        labels: Tensor | None = None,
        settle: bool = True,
    ) -> None:
        """Take data into a live expert's rows; see ``streaming``.

        Args:
            pool: the owner of the rows.
            namespace: this router's namespace on it.
            expert_id: a live expert.
            x: (n, D); nothing happens where n = 0.
            labels: (n,) integers.
            settle: False puts off what :meth:`settle` does, for gates that solve a large system then. Until it is
                called the expert's scores may miss what was observed.
        Raises:
            ValueError: on a frozen expert, missing labels, a wrong shape, a non-finite input, or a second call where
                the gate is not ``streaming``; nothing is changed then.
        """
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"features of shape (n, {self.in_features}) are needed, got {tuple(x.shape)}")
        if not torch.isfinite(x).all():
            raise ValueError("the features to observe hold NaN or infinity")
        if pool.record(expert_id).frozen:
            raise ValueError(f"expert {expert_id} is frozen: its statistics are never written")
        labels = self.observed_labels(x, labels)
        if len(x) == 0:
            return
        growables = {name: pool.growable(namespace, name) for name in self.row_specs()}
        counts = {name: growable.row_counts().get(expert_id, 0) for name, growable in growables.items()}
        if not self.streaming and any(counts.values()):
            raise ValueError(
                f"expert {expert_id} has been fitted: {type(self).__name__} needs all of its data in one call"
            )
        old = {name: growable.stack([expert_id]).clone() for name, growable in growables.items()}
        others = pool.namespace(namespace, [other for other in pool.ids if other != expert_id])
        new = self.rows_among(others, old, at_least_float32(x), labels)
        for name, growable in growables.items():
            assert isinstance(growable, GrowableBuffer)
            growable.add([expert_id] * (len(new[name]) - counts[name]), new[name][counts[name] :])
            growable.write(expert_id, new[name])
        if settle:
            self.settle(pool, namespace, expert_id)

    def settle(self, pool: ExpertPool, namespace: str, expert_id: int) -> None:
        """Bring an expert's rows up to date with all that was observed; nothing where they are.

        Gates whose rows are up to date after every observation have nothing to do here.

        Raises:
            ValueError: if the expert was frozen before it was settled.
        """

    def merged_rows(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows of one expert that has observed what two have: those that it would have, but for rounding.

        Args:
            first: one expert's rows, (R, ...) by name.
            second: the other's.
        Returns:
            The first's rows in their order, combined with the second's of the same classes, then the second's others.
        Raises:
            ValueError: where the rows do not hold what that takes.
        """
        raise ValueError(
            f"{type(self).__name__} cannot merge experts: an expert's rows depend on what other experts observed"
        )

    def scored_experts(self, rows: Rows) -> Tensor | None:
        owner = rows.owner("label")
        if len(owner) == 0:
            return None
        scored = torch.zeros(len(rows.ids), dtype=torch.bool, device=owner.device)
        return scored.index_fill(0, owner, True)

    def select(
        self, logits: Tensor, allowed: Tensor | None, top_k: int | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        k = min(self.top_k if top_k is None else top_k, logits.shape[1])
        values, choices = logits.topk(k, dim=1)
        return choices, values.softmax(1), logits.softmax(1)


def sum_by_owner(joint: Tensor, owner: Tensor, num_experts: int, x: Tensor) -> Tensor:
    """log-sum-exp of each expert's classes, one after the other: not a bit depends on who else is in the pool.

    Args:
        joint: (T, R) class scores.
        owner: (R,) int64, the position of each class's expert.
        num_experts: E.
        x: (T, D), whose NaN stay visible where there is no class at all.
    Returns:
        (T, E); -inf for an expert without classes.
    """
    if len(owner) == 0:
        return x.new_zeros(len(x), num_experts) + 0 * x.sum(1, keepdim=True)
    top = joint.new_full((len(joint), num_experts), -torch.inf)
    top = top.scatter_reduce(1, owner.expand_as(joint), joint.detach(), "amax")
    mass = (joint - top[:, owner]).exp()
    return mass.new_zeros(top.shape).index_add(1, owner, mass).log() + top


def class_generator(seed: int, label: int) -> torch.Generator:
    """A CPU generator of a class's own: what is drawn depends on seed and label, not on what was fitted before."""
    return torch.Generator().manual_seed((seed * 1_000_003 + label) % 2**63)
