"""What evidence-gated experts answer with."""

from abc import abstractmethod

import torch
from torch import Tensor

from modmoe.meta.evidence.experts import ExpertView
from modmoe.meta.evidence.linear import LinearPosterior, infer
from modmoe.meta.predictive import LOG_TWO_PI, FunctionMixture, Predictive
from modmoe.meta.task_batch import TaskBatch


class EvidencePredictive(Predictive):
    """A prediction that knows what the context itself was worth, and who answers where.

    Axes: B tasks, K experts, N target points, M outputs.

    Args:
        log_evidence: (B,) ln p(context outputs | context inputs), under the whole mixture; 0 for no context.
        expert_evidence: (B, K) the same under each expert alone, without prior weights.
    """

    def __init__(self, log_evidence: Tensor, expert_evidence: Tensor):
        self.log_evidence, self.expert_evidence = log_evidence, expert_evidence

    @property
    @abstractmethod
    def assignment(self) -> Tensor:
        """(B, N, K): the probability, given the context, that a target point is of an expert; adds up to 1 over K."""


class LinearMixture(EvidencePredictive):
    """A mixture of K Bayesian linear functions: FunctionMixture, without its N x N covariances where none is needed.

    p(y_1..N) = sum_k w_k N(y; mu_k, a_k S_k a_k^T + s_k^2 I), where w_k is pi_k times expert k's evidence, normalised.

    Args:
        view: the experts at the context points, then the targets.
        tasks: the same points.
    """

    def __init__(self, view: ExpertView, tasks: TaskBatch):
        num_context = tasks.context_x.shape[1]
        context_y = tasks.clean_context()[1]
        self.view, self.mask = view, tasks.context_mask
        self.residuals = context_y - view.offset[:, :, :num_context]
        noise = view.noise[:, None, None]
        self.posterior: LinearPosterior = infer(view.features[:, :, :num_context], self.residuals, noise, self.mask)
        self.features = view.features[:, :, num_context:]
        shift, variance = self.posterior.predict(self.features)
        self.means = (view.offset[:, :, num_context:] + shift).transpose(0, 1)  # (B, K, N, M)
        self.variances = (variance + noise).transpose(0, 1)  # (B, K, N)
        evidence = self.posterior.log_evidence.T
        joint = view.log_prior + evidence
        self.log_weights = joint.log_softmax(1)  # (B, K)
        super().__init__(joint.logsumexp(1), evidence)

    @property
    def mean(self) -> Tensor:
        return torch.einsum("bk,bknm->bnm", self.log_weights.exp(), self.means)

    @property
    def assignment(self) -> Tensor:
        return self.log_weights.exp().unsqueeze(1).expand(-1, self.means.shape[2], -1)

    def log_marginal(self, y: Tensor) -> Tensor:
        log_normal = log_normals(y.unsqueeze(1) - self.means, self.variances)
        return torch.logsumexp(self.log_weights.unsqueeze(2) + log_normal, 1)

    def log_joint(self, y: Tensor) -> Tensor:
        # ln p(targets | context) = ln p(both) - ln p(context): no covariance is formed, however many targets
        num_context, num_targets = self.residuals.shape[2], y.shape[1]
        residuals = torch.cat([self.residuals, y - self.view.offset[:, :, num_context:]], 2)
        mask = None
        if self.mask is not None:
            mask = torch.cat([self.mask, self.mask.new_ones(len(y), num_targets)], 1)
        both = infer(self.view.features, residuals, self.view.noise[:, None, None], mask).log_evidence
        return torch.logsumexp(self.log_weights + both.T - self.expert_evidence, 1)

    def functions(self) -> FunctionMixture:
        """The same distribution with its covariances written out."""
        eye = torch.eye(self.means.shape[2], dtype=self.means.dtype, device=self.means.device)
        noise = self.view.noise[:, None, None, None] * eye
        covariances = (self.posterior.covariance(self.features) + noise).transpose(0, 1)
        return FunctionMixture(self.means, covariances, self.log_weights)


def log_normals(errors: Tensor, variances: Tensor) -> Tensor:
    """ln N(error; 0, variance I): errors (..., M) and one variance (...) for all outputs -> (...)."""
    num_outputs = errors.shape[-1]
    return -0.5 * (errors.square().sum(-1) / variances + num_outputs * (variances.log() + LOG_TWO_PI))
