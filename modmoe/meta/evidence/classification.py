"""Few-shot classification by evidence-gated experts: regression on the log of Dirichlet counts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modmoe.meta.evidence.experts import EvidenceExperts
from modmoe.meta.evidence.linear import infer
from modmoe.meta.evidence.predictives import EvidencePredictive
from modmoe.meta.task_batch import TaskBatch


class BayesianExpertClassifier(EvidenceExperts):
    """K-way classification from a few labels, in closed form.

    A label is one count in a Dirichlet of concentration a: alpha_c = a + [y = c]. The logarithm of each class's
    Gamma(alpha_c, 1) is taken as Gaussian with the variance v = ln(1 / alpha_c + 1) and the mean ln alpha_c - v / 2
    (which gives the first two moments of the Gamma), less the mean over classes. Every class is then a Bayesian linear
    regression on its expert's features with noise v + s_k^2, and the gate is pi_k times the evidence of these
    regressions, which share their targets. The class probabilities are softmax_c(f_c / sqrt(1 + pi var_c / 8)).

    Classes are exchangeable (all have the expert's one prior), so any number of ways is served. An empty context gives
    every class the same probability.

    Args:
        in_features: D.
        num_experts: K at the start.
        hidden_features: H of the feature maps.
        num_features: F.
        concentration: a > 0, one for all experts: their evidences are of the same transformed labels.
    Raises:
        ValueError: on a size below 1 or a concentration that is not positive.
    Source:
        Milios et al. 2018, "Dirichlet-based Gaussian processes for large-scale calibrated classification"; the
        softmax is MacKay's of 1992, where they sample. Linear features and the mixture are ours.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int = 1,
        hidden_features: int = 40,
        num_features: int = 24,
        concentration: float = 0.1,
    ):
        if concentration <= 0:
            raise ValueError(f"concentration must be positive, got {concentration}")
        super().__init__(in_features, 1, num_experts, hidden_features, num_features)
        self.concentration = concentration

    def forward(self, tasks: TaskBatch, experts: Sequence[int] | None = None) -> "ClassMixture":
        """Condition on the labelled context and predict the targets' classes.

        Args:
            tasks: context_y and target_y (B, ., W) one-hot labels of W >= 2 classes.
            experts: ids that may answer; None for all.
        Raises:
            ValueError: on labels that are not one-hot, shapes or a dtype that do not fit, no experts or unknown ids.
        """
        context_x, labels = tasks.clean_context()
        check_one_hot(labels, tasks.present)
        num_context, num_classes = labels.shape[1:]
        view = self.view(torch.cat([context_x, tasks.target_x], 1), experts)
        log_counts, variances = self._log_counts(labels)
        residuals = (log_counts - view.offset[:, :, :num_context]).mT.unsqueeze(4)  # (K, B, W, C, 1)
        noise = view.noise[:, None, None, None] + variances.mT
        features = view.features.unsqueeze(2).expand(-1, -1, num_classes, -1, -1)
        mask = None if tasks.context_mask is None else tasks.context_mask.unsqueeze(1)
        posterior = infer(features[..., :num_context, :], residuals, noise, mask)
        shift, variance = posterior.predict(features[..., num_context:, :])  # the offset is the same for all classes
        logits = shift.squeeze(4) / (1 + math.pi / 8 * variance).sqrt()
        log_probs = logits.log_softmax(2).permute(1, 0, 3, 2)
        evidence = posterior.log_evidence.sum(2).T
        return ClassMixture(log_probs, view.log_prior, evidence)

    def _log_counts(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances (B, C, W) of the logarithms of the Gamma variables, the means centred over classes."""
        counts = labels + self.concentration
        variances = (1 / counts + 1).log()
        means = counts.log() - variances / 2
        return means - means.mean(2, keepdim=True), variances


class ClassMixture(EvidencePredictive):
    """A mixture over K experts of independent class probabilities at each point.

    ``mean`` is the probabilities (B, N, W); the densities of one-hot labels are probabilities of classes.

    Args:
        log_probs: (B, K, N, W), normalised over W.
        log_prior: (K,).
        expert_evidence: (B, K).
    """

    def __init__(self, log_probs: Tensor, log_prior: Tensor, expert_evidence: Tensor):
        joint = log_prior + expert_evidence
        super().__init__(joint.logsumexp(1), expert_evidence)
        self.log_probs, self.log_weights = log_probs, joint.log_softmax(1)

    @property
    def mean(self) -> Tensor:
        return torch.einsum("bk,bknw->bnw", self.log_weights.exp(), self.log_probs.exp())

    @property
    def assignment(self) -> Tensor:
        return self.log_weights.exp().unsqueeze(1).expand(-1, self.log_probs.shape[2], -1)

    def log_marginal(self, y: Tensor) -> Tensor:
        return torch.logsumexp(self.log_weights.unsqueeze(2) + self._log_labels(y), 1)

    def log_joint(self, y: Tensor) -> Tensor:
        return torch.logsumexp(self.log_weights + self._log_labels(y).sum(2), 1)

    def _log_labels(self, y: Tensor) -> Tensor:
        """(B, K, N): ln of the probability of the class that is 1."""
        check_one_hot(y, torch.ones_like(y[..., 0], dtype=torch.bool))
        return (y.unsqueeze(1) * self.log_probs).sum(3)


def check_one_hot(labels: Tensor, present: Tensor) -> None:
    """Raise ValueError unless labels (B, P, W) are one-hot, W >= 2, where present (B, P) is True."""
    fits = ((labels == 0) | (labels == 1)).all(2) & (labels.sum(2) == 1)
    if labels.shape[2] < 2 or not bool((fits | ~present).all()):
        raise ValueError(f"labels are one-hot (tasks, points, ways) with 2 ways or more, got {tuple(labels.shape)}")
