"""What a model says of the targets of a task: distributions whose densities are exact.

Axes: B tasks, L latents (or whole functions), N target points, K components at a point, M outputs.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

LOG_TWO_PI = math.log(2 * math.pi)


class Predictive(ABC):
    """A distribution over the outputs of N target points in each of B tasks."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """(B, N, M): the expected output at each point."""

    @abstractmethod
    def log_marginal(self, y: Tensor) -> Tensor:
        """ln p(y_i | context) of each point by itself.

        Args:
            y: (B, N, M).
        Returns:
            (B, N).
        """

    @abstractmethod
    def log_joint(self, y: Tensor) -> Tensor:
        """ln p(y_1, ..., y_N | context) of all points of a task together.

        Args:
            y: (B, N, M).
        Returns:
            (B,).
        """


class PointMixture(Predictive):
    """Given one of L latents, points are independent, and each a mixture of K Gaussians with diagonal covariance.

    p(y_1..N) = sum_l w_l prod_i sum_k g_lik N(y_i; m_lik, diag s_lik^2). L = K = 1 is a conditional neural process,
    L = 1 one with a mixture density, K = 1 a latent neural process whose latent was drawn L times.

    Args:
        means: (B, L, N, K, M).
        stds: (B, L, N, K, M), > 0.
        log_gates: (B, L, N, K), normalised over K; None for equal ones.
        log_weights: (B, L), normalised over L; None for equal ones.
    """

    def __init__(self, means: Tensor, stds: Tensor, log_gates: Tensor | None = None, log_weights: Tensor | None = None):
        num_tasks, num_latents, _, num_components, _ = means.shape
        self.means, self.stds = means, stds
        equal = means.new_full((num_tasks, num_latents), -math.log(num_latents))
        self.log_weights = equal if log_weights is None else log_weights
        equal = means.new_full(means.shape[:4], -math.log(num_components))
        self.log_gates = equal if log_gates is None else log_gates

    @property
    def mean(self) -> Tensor:
        inner = (self.log_gates.exp().unsqueeze(-1) * self.means).sum(3)
        return torch.einsum("bl,blnm->bnm", self.log_weights.exp(), inner)

    def _log_points(self, y: Tensor) -> Tensor:
        """(B, L, N): ln p(y_i | latent l)."""
        z = (y[:, None, :, None] - self.means) / self.stds
        log_normal = -0.5 * (z.square() + LOG_TWO_PI).sum(-1) - self.stds.log().sum(-1)
        return torch.logsumexp(self.log_gates + log_normal, 3)

    def log_marginal(self, y: Tensor) -> Tensor:
        return torch.logsumexp(self.log_weights.unsqueeze(2) + self._log_points(y), 1)

    def log_joint(self, y: Tensor) -> Tensor:
        return torch.logsumexp(self.log_weights + self._log_points(y).sum(2), 1)


class FunctionMixture(Predictive):
    """A mixture of L Gaussian functions: the points of a task are correlated within each.

    p(y_1..N) = sum_l w_l prod_m N(y_m; mu_lm, S_l), the outputs m independent of each other given l.

    Args:
        means: (B, L, N, M).
        covariances: (B, L, N, N), positive definite, noise included.
        log_weights: (B, L), normalised over L.
    """

    def __init__(self, means: Tensor, covariances: Tensor, log_weights: Tensor):
        self.means, self.covariances, self.log_weights = means, covariances, log_weights

    @property
    def mean(self) -> Tensor:
        return torch.einsum("bl,blnm->bnm", self.log_weights.exp(), self.means)

    def log_marginal(self, y: Tensor) -> Tensor:
        variances = self.covariances.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        errors = y.unsqueeze(1) - self.means
        log_normal = -0.5 * (errors.square() / variances + variances.log() + LOG_TWO_PI).sum(-1)
        return torch.logsumexp(self.log_weights.unsqueeze(2) + log_normal, 1)

    def log_joint(self, y: Tensor) -> Tensor:
        errors = y.unsqueeze(1) - self.means
        num_points, num_outputs = errors.shape[2:]
        factor = torch.linalg.cholesky(self.covariances)
        whitened = torch.linalg.solve_triangular(factor, errors, upper=False)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        squares = whitened.square().sum((-2, -1))
        log_normal = -0.5 * (squares + num_outputs * log_det + num_points * num_outputs * LOG_TWO_PI)
        return torch.logsumexp(self.log_weights + log_normal, 1)
