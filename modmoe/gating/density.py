"""Gates that keep a density, or a prototype, for each class or each expert.

Their scores do not compete through a trained normaliser: what an expert says of an input depends on its own rows
only, so a pool keeps its behaviour while it grows.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from modmoe.gating.classwise import ClasswiseRouter, DensityRouter
from modmoe.growable import RowSpec
from modmoe.rows import Rows


class GaussianRouter(DensityRouter):
    """A Gaussian with full covariance for each class (or each expert): s_c(x) = log N(x; m_c, S_c + r I).

    Moments are exact under any batching (Chan et al. 1979). Scores are raw likelihoods, never calibrated: z-scoring
    each expert's by its own statistics was measured to hurt.

    Args:
        in_features: D.
        per_class: see ClasswiseRouter.
        top_k: see ClasswiseRouter.
        regularization: r, added to the variances; in squared units of the features, fixed before the stream.
    """

    mergeable = True

    def __init__(self, in_features: int, per_class: bool = True, top_k: int = 1, regularization: float = 0.01):
        super().__init__(in_features, per_class, top_k)
        if regularization <= 0:
            raise ValueError(f"regularization must be positive, got {regularization}")
        self.regularization = regularization

    def row_specs(self) -> dict[str, RowSpec]:
        square = (self.in_features, self.in_features)
        return {
            **super().row_specs(),
            "mean": RowSpec((self.in_features,), trainable=False, count=0),
            "scatter": RowSpec(square, trainable=False, count=0),
            "whiten": RowSpec(square, trainable=False, count=0),  # W with W W^T = (S + r I)^-1
            "log_norm": RowSpec((), trainable=False, count=0),  # log det W - D/2 log 2 pi
        }

    def class_score(self, x: Tensor, rows: Rows) -> Tensor:
        parts = zip(rows["mean"], rows["whiten"], rows["log_norm"], strict=True)
        # one class after the other: all at once would need T * R * D numbers
        scores = [norm - 0.5 * ((x - mean) @ whiten.to(x.dtype)).square().sum(1) for mean, whiten, norm in parts]
        return torch.stack(scores, 1) if scores else x.new_zeros(len(x), 0)

    def fit_class(self, old: dict[str, Tensor] | None, x: Tensor, label: int) -> dict[str, Tensor]:
        x = x.double()
        mean, count = x.mean(0), torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
        moments = {"count": count, "mean": mean, "scatter": (x - mean).T @ (x - mean)}
        return self._scored(moments if old is None else pooled_moments(old, moments))

    def merged_class(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._scored(pooled_moments(first, second))

    def _scored(self, moments: dict[str, Tensor]) -> dict[str, Tensor]:
        """The moments (float64), with what scoring reads."""
        scatter = moments["scatter"]
        eye = torch.eye(self.in_features, dtype=torch.float64, device=scatter.device)
        lower = torch.linalg.cholesky(scatter / moments["count"] + self.regularization * eye)
        whiten = torch.linalg.solve_triangular(lower, eye, upper=False).T
        log_norm = -lower.diagonal().log().sum() - 0.5 * self.in_features * math.log(2 * math.pi)
        return {**moments, "whiten": whiten, "log_norm": log_norm}

    def sample(self, row: Mapping[str, Tensor], n: int, generator: torch.Generator) -> Tensor:
        mean, whiten = row["mean"], row["whiten"]
        noise = torch.randn(n, self.in_features, generator=generator).to(mean)
        # W = L^-T for the covariance L L^T, so that z W^-1 = z L^T has it
        return mean + torch.linalg.solve_triangular(whiten, noise, upper=True, left=False)


class PrototypeRouter(ClasswiseRouter):
    """The mean of each class (or each expert) as its prototype: s_c(x) = -|x - m_c|^2 / (2 width^2).

    Args:
        in_features: D.
        per_class: see ClasswiseRouter.
        top_k: see ClasswiseRouter.
        width: in units of the features; it only matters for weights among several chosen experts.
    """

    mergeable = True

    def __init__(self, in_features: int, per_class: bool = True, top_k: int = 1, width: float = 1.0):
        super().__init__(in_features, per_class, top_k)
        if width <= 0:
            raise ValueError(f"width must be positive, got {width}")
        self.width = width

    def row_specs(self) -> dict[str, RowSpec]:
        return {**super().row_specs(), "mean": RowSpec((self.in_features,), trainable=False, count=0)}

    def class_score(self, x: Tensor, rows: Rows) -> Tensor:
        return -0.5 * (x.unsqueeze(1) - rows["mean"]).square().sum(2) / self.width**2

    def fit_class(self, old: dict[str, Tensor] | None, x: Tensor, label: int) -> dict[str, Tensor]:
        seen = x.new_zeros((), dtype=torch.float64) if old is None else old["count"].double()
        before = x.new_zeros(self.in_features, dtype=torch.float64) if old is None else old["mean"].double()
        total = seen + len(x)
        return {"count": total, "mean": before + (x.double() - before).sum(0) / total}

    def merged_class(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        before, total = first["mean"].double(), first["count"].double() + second["count"].double()
        return {"count": total, "mean": before + (second["mean"].double() - before) * (second["count"] / total)}


def pooled_moments(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Count (), mean (D,) and scatter (D, D) of two sets of samples together, in float64 (Chan et al. 1979)."""
    seen, n = first["count"].double(), second["count"].double()
    total, shift = seen + n, second["mean"].double() - first["mean"].double()
    scatter = second["scatter"].double() + first["scatter"].double() + torch.outer(shift, shift) * (seen * n / total)
    return {"count": total, "mean": first["mean"].double() + shift * (n / total), "scatter": scatter}
