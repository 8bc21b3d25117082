"""Gates that are fitted to data, not trained by gradient: a density, or prototypes, for each expert.

Their scores do not compete through a trained normaliser: what an expert says of an input depends on its own rows
only, so a pool keeps its behaviour while it grows.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from modmoe.gating.base import Router, at_least_float32
from modmoe.growable import GrowableBuffer, RowSpec
from modmoe.pool import ExpertPool, Rows

SINGLE_CLASS = -1  # the label of an expert's only row where classes are not told apart


class DensityRouter(Router):
    """The shared part of the gates below: one row for each class that an expert has observed.

    score(expert e) = log sum_c (n_c / n_e) exp(s_c(x)) over the classes c of e, where s_c is the class's own score
    (a raw log-likelihood, or minus a squared distance). The best k experts are chosen; their weights are the softmax
    of their scores, so that k = 1 has weight 1. An expert that has observed nothing is chosen only where no expert
    that has is open.

    Args:
        in_features: D.
        per_class: one row for each class; False for one row for each expert.
        top_k: experts for each token, fewer while the pool is smaller; a call's own top_k has to fit the pool.
    """

    def __init__(self, in_features: int, per_class: bool = True, top_k: int = 1):
        super().__init__()
        if in_features < 1 or top_k < 1:
            raise ValueError(f"in_features and top_k must be at least 1, got {in_features} and {top_k}")
        self.in_features = in_features
        self.per_class = per_class
        self.top_k = top_k

    def row_specs(self) -> dict[str, RowSpec]:
        return {
            "label": RowSpec((), trainable=False, count=0, dtype=torch.int64),
            "count": RowSpec((), trainable=False, count=0),
            "mean": RowSpec((self.in_features,), trainable=False, count=0),
        }

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
    def class_score(self, x: Tensor, rows: Rows) -> Tensor:
        """(T, R) raw score of each row's class."""

    @abstractmethod
    def merge(self, old: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        """One class's rows (each without a leading axis) after more inputs x (n, D), except its label."""

    def class_log_joint(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Scores of single classes with their frequency: the gate used as a classifier of its own.

        Args:
            x: (T, D).
            rows: this router's rows.
        Returns:
            log n_c + s_c(x) of shape (T, R), and the labels (R,).
        """
        return self.class_score(at_least_float32(x), rows) + at_least_float32(rows["count"]).log(), rows["label"]

    def score(self, x: Tensor, rows: Rows) -> Tensor:
        x = at_least_float32(x)
        num_experts = len(rows.ids)
        owner = rows.owner("label")
        if len(owner) == 0:
            return x.new_zeros(x.shape[0], num_experts) + 0 * x.sum(1, keepdim=True)  # keeps NaN visible
        count = at_least_float32(rows["count"])
        total = count.new_zeros(num_experts).index_add(0, owner, count)
        joint = self.class_score(x, rows) + (count / total[owner]).log()
        # log-sum-exp over each expert's own rows, one after the other: not a bit depends on who else is in the pool
        top = joint.new_full((len(x), num_experts), -torch.inf)
        top = top.scatter_reduce(1, owner.expand_as(joint), joint.detach(), "amax")
        mass = (joint - top[:, owner]).exp()
        return mass.new_zeros(top.shape).index_add(1, owner, mass).log() + top

    def scored_experts(self, rows: Rows) -> Tensor | None:
        owner = rows.owner("label")
        if len(owner) == 0:
            return None
        scored = torch.zeros(len(rows.ids), dtype=torch.bool, device=owner.device)
        return scored.index_fill(0, owner, True)

    def select(self, logits: Tensor, allowed: Tensor | None, top_k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        k = min(self.top_k if top_k is None else top_k, logits.shape[1])
        values, choices = logits.topk(k, dim=1)
        return choices, values.softmax(1), logits.softmax(1)

    @torch.no_grad()
    def observe(
        self, pool: ExpertPool, namespace: str, expert_id: int, x: Tensor, labels: Tensor | None = None
    ) -> None:
        """Take more data into a live expert's statistics.

        Args:
            pool: the owner of the rows.
            namespace: this router's namespace on it.
            expert_id: a live expert.
            x: (n, D).
            labels: (n,) int64; needed where classes are told apart.
        Raises:
            ValueError: on a frozen expert, missing labels, a wrong shape, or a non-finite input; nothing is changed
                then.
        """
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"features of shape (n, {self.in_features}) are needed, got {tuple(x.shape)}")
        if not torch.isfinite(x).all():
            raise ValueError("the features to observe hold NaN or infinity")
        if pool.record(expert_id).frozen:
            raise ValueError(f"expert {expert_id} is frozen: its statistics are never written")
        if not self.per_class:
            labels = torch.full((len(x),), SINGLE_CLASS)
        if labels is None or labels.shape != x.shape[:1] or labels.is_floating_point():
            raise ValueError(f"one integer label for each of the {len(x)} rows is needed (or per_class=False)")
        x, labels = at_least_float32(x), labels.to(x.device)
        growables = {name: pool.growable(namespace, name) for name in self.row_specs()}
        state = {name: growable.stack([expert_id]).clone() for name, growable in growables.items()}
        for label in labels.unique():
            place = (state["label"] == label).nonzero()
            if len(place) == 0:
                fresh = {name: spec.draw(1, {}, growables[name].like) for name, spec in self.row_specs().items()}
                fresh["label"][0] = label
                state = {name: torch.cat([tensor, fresh[name]]) for name, tensor in state.items()}
            index = int(place[0]) if len(place) else len(state["label"]) - 1
            old = {name: tensor[index] for name, tensor in state.items()}
            for name, value in self.merge(old, x[labels == label]).items():
                state[name][index] = value
        known = pool.growable(namespace, "label").row_counts().get(expert_id, 0)
        if len(state["label"]) > known:
            pool.add_rows(namespace, expert_id, {name: tensor[known:] for name, tensor in state.items()})
        for name, growable in growables.items():
            if isinstance(growable, GrowableBuffer):
                growable.write(expert_id, state[name])


class GaussianRouter(DensityRouter):
    """A Gaussian with full covariance for each class (or each expert): s_c(x) = log N(x; m_c, S_c + r I).

    Moments are exact under any batching (Chan et al. 1979). Scores are raw likelihoods, never calibrated: z-scoring
    each expert's by its own statistics was measured to hurt.

    Args:
        in_features: D.
        per_class: see DensityRouter.
        top_k: see DensityRouter.
        regularization: r, added to the variances; in squared units of the features, fixed before the stream.
    """

    def __init__(self, in_features: int, per_class: bool = True, top_k: int = 1, regularization: float = 0.01):
        super().__init__(in_features, per_class, top_k)
        if regularization <= 0:
            raise ValueError(f"regularization must be positive, got {regularization}")
        self.regularization = regularization

    def row_specs(self) -> dict[str, RowSpec]:
        square = (self.in_features, self.in_features)
        return {
            **super().row_specs(),
            "scatter": RowSpec(square, trainable=False, count=0),
            "whiten": RowSpec(square, trainable=False, count=0),  # W with W W^T = (S + r I)^-1
            "log_norm": RowSpec((), trainable=False, count=0),  # log det W - D/2 log 2 pi
        }

    def class_score(self, x: Tensor, rows: Rows) -> Tensor:
        parts = zip(rows["mean"], rows["whiten"], rows["log_norm"], strict=True)
        # one class after the other: all at once would need T * R * D numbers
        scores = [norm - 0.5 * ((x - mean) @ whiten.to(x.dtype)).square().sum(1) for mean, whiten, norm in parts]
        return torch.stack(scores, 1) if scores else x.new_zeros(len(x), 0)

    def merge(self, old: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        n, seen = len(x), old["count"].double()
        total = seen + n
        mean = x.double().mean(0)
        centred = x.double() - mean
        shift = mean - old["mean"].double()
        scatter = old["scatter"].double() + centred.T @ centred + torch.outer(shift, shift) * (seen * n / total)
        eye = torch.eye(self.in_features, dtype=torch.float64, device=x.device)
        lower = torch.linalg.cholesky(scatter / total + self.regularization * eye)
        whiten = torch.linalg.solve_triangular(lower, eye, upper=False).T
        log_norm = -lower.diagonal().log().sum() - 0.5 * self.in_features * math.log(2 * math.pi)
        new = {"count": total, "mean": old["mean"].double() + shift * (n / total), "scatter": scatter}
        return {**new, "whiten": whiten, "log_norm": log_norm}


class PrototypeRouter(DensityRouter):
    """The mean of each class (or each expert) as its prototype: s_c(x) = -|x - m_c|^2 / (2 width^2).

    Args:
        in_features: D.
        per_class: see DensityRouter.
        top_k: see DensityRouter.
        width: in units of the features; it only matters for weights among several chosen experts.
    """

    def __init__(self, in_features: int, per_class: bool = True, top_k: int = 1, width: float = 1.0):
        super().__init__(in_features, per_class, top_k)
        if width <= 0:
            raise ValueError(f"width must be positive, got {width}")
        self.width = width

    def class_score(self, x: Tensor, rows: Rows) -> Tensor:
        return -0.5 * (x.unsqueeze(1) - rows["mean"]).square().sum(2) / self.width**2

    def merge(self, old: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        total = old["count"].double() + len(x)
        mean = old["mean"].double() + (x.double() - old["mean"].double()).sum(0) / total
        return {"count": total, "mean": mean}
