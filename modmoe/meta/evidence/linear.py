"""Bayesian linear regression in closed form: posterior, prediction and evidence, over any batch axes.

y_i = a_i^T u + e_i, with u ~ N(0, I) for each output and e_i ~ N(0, s_i^2). A prior N(w_0, R R^T) over weights w of
features phi is this one with a_i = R^T phi_i and targets y_i - phi_i^T w_0.

Axes: C points, F features, M outputs (independent given the features), N new points.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from modmoe.errors import NonFiniteError

LOG_TWO_PI = math.log(2 * math.pi)
JITTER_STEPS = 6  # of a factor 10 each, from the unit roundoff on


class LinearPosterior(NamedTuple):
    """What the points say of the weights.

    Args:
        mean: (..., F, M) of u.
        log_evidence: (...) ln p(y), all outputs together.
        factor: (..., R, F). The covariance of u is I - factor^T factor if ``dual``, else factor^T factor.
        dual: which of the two.
    """

    mean: Tensor
    log_evidence: Tensor
    factor: Tensor
    dual: bool

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The mean (..., N, M) and the variance (..., N) of a^T u for features (..., N, F); no noise in it."""
        squares = (features @ self.factor.mT).square().sum(-1)
        variance = (features.square().sum(-1) - squares).clamp_min(0) if self.dual else squares
        return features @ self.mean, variance

    def covariance(self, features: Tensor) -> Tensor:
        """(..., N, N): the covariance of a^T u between N points with features (..., N, F); no noise in it."""
        spread = features @ self.factor.mT
        product = spread @ spread.mT
        return features @ features.mT - product if self.dual else product


def infer(features: Tensor, targets: Tensor, noise: Tensor, mask: Tensor | None = None) -> LinearPosterior:
    """Condition u ~ N(0, I) on y = A u + e, and say how likely y was.

    ln p(y) = sum_m ln N(y_m; 0, A A^T + diag s^2). Up to C = F it is computed from the C x C covariance of the
    points, beyond from the F x F precision of the weights; no point at all gives the prior, with evidence 0.

    Args:
        features: (..., C, F) the rows a_i; where the mask is False they may be anything finite.
        targets: (..., C, M); likewise.
        noise: s_i^2 > 0, broadcastable to (..., C).
        mask: bool, broadcastable to (..., C), True for points that count; None for all.
    Returns:
        The posterior; its batch axes are those of features.
    Raises:
        NonFiniteError: if a number is not finite, or noise is so small that rounding leaves nothing.
    Source:
        Bishop, Pattern Recognition and Machine Learning, equations 3.53, 3.54 and 3.86 (with the weights whitened).
    """
    noise = noise.expand(features.shape[:-1])
    scale = noise.rsqrt()
    log_scale = scale.log()
    if mask is not None:
        scale, log_scale = scale * mask, log_scale * mask
    count = features.shape[-2] if mask is None else mask.sum(-1)
    a, y = features * scale.unsqueeze(-1), targets * scale.unsqueeze(-1)
    num_outputs = targets.shape[-1]
    constant = num_outputs * (log_scale.sum(-1) - 0.5 * LOG_TWO_PI * count)
    dual = a.shape[-2] <= a.shape[-1]
    lower = cholesky(_plus_identity(a @ a.mT if dual else a.mT @ a))
    log_det = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    if dual:
        solved = torch.linalg.solve_triangular(lower, torch.cat([a, y], -1), upper=False)
        factor, whitened = solved.split([a.shape[-1], num_outputs], -1)
        mean = factor.mT @ whitened
        squares = whitened.square().sum((-2, -1))
    else:
        mean = torch.cholesky_solve(a.mT @ y, lower)
        factor = torch.linalg.solve_triangular(
            lower, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device), upper=False
        )
        # y^T y - y^T A mean would lose all digits where the fit is good; this is the same at the posterior's mean
        squares = (y - a @ mean).square().sum((-2, -1)) + mean.square().sum((-2, -1))
    return LinearPosterior(mean, finite(constant - num_outputs * log_det - 0.5 * squares), factor, dual)


def cholesky(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor of (..., n, n); matrices that rounding made indefinite get the least jitter that helps.

    The others of the batch are left as they are, to the last bit.

    Raises:
        NonFiniteError: if none helps.
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    if not bool(info.any()):
        return lower
    size = matrix.detach().diagonal(dim1=-2, dim2=-1).mean(-1) * torch.finfo(matrix.dtype).eps
    jitter = torch.zeros_like(size)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for step in range(JITTER_STEPS):
        jitter = torch.where(info > 0, size * 10**step, jitter)
        lower, info = torch.linalg.cholesky_ex(matrix + jitter[..., None, None] * eye)
        if not bool(info.any()):
            return lower
    raise NonFiniteError("a covariance is not positive definite: an input, a feature or the noise is not finite")


def finite(log_density: Tensor) -> Tensor:
    """Keep what overflowed to -inf as a very low number, so that a softmax over experts stays defined."""
    return log_density.clamp_min(torch.finfo(log_density.dtype).min / 4)


def _plus_identity(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
