"""How numbers of a decoder become a distribution over an output: Gaussian or categorical."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.meta.predictive import LOG_TWO_PI, PointMixture, Predictive

MIN_STD = 0.03  # of an output: a decoder that fits its points exactly would have an unbounded density


class ClassMixture(Predictive):
    """Given one of L latents, points are independent, and each a mixture of K distributions over classes.

    The outputs are one-hot: ``mean`` (B, N, M) holds the probabilities of the M classes.

    Args:
        log_probs: (B, L, N, K, M), normalised over M.
        log_gates: (B, L, N, K), normalised over K.
    """

    def __init__(self, log_probs: Tensor, log_gates: Tensor):
        self.log_probs, self.log_gates = log_probs, log_gates

    @property
    def mean(self) -> Tensor:
        return (self.log_gates.unsqueeze(-1) + self.log_probs).logsumexp(3).exp().mean(1)

    def _log_points(self, y: Tensor) -> Tensor:
        """(B, L, N): ln p(y_i | latent l)."""
        return torch.logsumexp(self.log_gates + class_log_prob(self.log_probs, y), 3)

    def log_marginal(self, y: Tensor) -> Tensor:
        return log_mean_exp(self._log_points(y), 1)

    def log_joint(self, y: Tensor) -> Tensor:
        return log_mean_exp(self._log_points(y).sum(2), 1)


class Likelihood(ABC):
    """p(y | numbers of a decoder).

    Attributes:
        out_features: M.
        size: how many numbers a decoder gives for one distribution.
    """

    out_features: int
    size: int

    @abstractmethod
    def log_prob(self, raw: Tensor, y: Tensor) -> Tensor:
        """ln p(y | raw): (B, S, N, K, size) and (B, N, M) -> (B, S, N, K)."""

    @abstractmethod
    def predictive(self, raw: Tensor, log_gates: Tensor) -> Predictive:
        """The mixture over K, and over S with equal weights: (B, S, N, K, size) and (B, S, N, K)."""

    def check(self, name: str, y: Tensor, present: Tensor | None = None) -> None:
        """Raise ValueError unless y (B, C, M) holds outputs of this kind, where it is present (B, C)."""
        if y.shape[2] != self.out_features:
            raise ValueError(f"{name} needs {self.out_features} outputs at each point, got {y.shape[2]}")


class GaussianLikelihood(Likelihood):
    """N(y; m, diag s^2) with s = 0.03 + softplus: M means, then M numbers for s."""

    def __init__(self, out_features: int):
        self.out_features, self.size = out_features, 2 * out_features

    def parameters_of(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations, (..., M) each."""
        mean, spread = raw.split(self.out_features, -1)
        return mean, MIN_STD + F.softplus(spread)

    def log_prob(self, raw: Tensor, y: Tensor) -> Tensor:
        mean, std = self.parameters_of(raw)
        errors = (y[:, None, :, None] - mean) / std
        return -0.5 * (errors.square() + LOG_TWO_PI).sum(-1) - std.log().sum(-1)

    def predictive(self, raw: Tensor, log_gates: Tensor) -> PointMixture:
        return PointMixture(*self.parameters_of(raw), log_gates)


class CategoricalLikelihood(Likelihood):
    """A softmax over M classes; outputs are one-hot."""

    def __init__(self, num_classes: int):
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.out_features = self.size = num_classes

    def log_prob(self, raw: Tensor, y: Tensor) -> Tensor:
        return class_log_prob(raw.log_softmax(-1), y)

    def predictive(self, raw: Tensor, log_gates: Tensor) -> ClassMixture:
        return ClassMixture(raw.log_softmax(-1), log_gates)

    def check(self, name: str, y: Tensor, present: Tensor | None = None) -> None:
        super().check(name, y, present)
        one_hot = ((y == 0) | (y == 1)).all(-1) & (y.sum(-1) == 1)
        if not bool((one_hot if present is None else one_hot | ~present).all()):
            raise ValueError(f"{name} needs one-hot vectors of {self.out_features} classes")


def class_log_prob(log_probs: Tensor, y: Tensor) -> Tensor:
    """ln p of one-hot outputs: (B, S, N, K, M) and (B, N, M) -> (B, S, N, K)."""
    return (log_probs * y[:, None, :, None]).sum(-1)


def log_mean_exp(values: Tensor, dim: int) -> Tensor:
    """ln of the mean of exp(values)."""
    return values.logsumexp(dim) - torch.log(values.new_tensor(values.shape[dim]))
