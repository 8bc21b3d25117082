"""The switch gate: along a single input, one expert up to a breakpoint and another one after it.

The breakpoint t has a continuous prior and is summed out exactly. Between two neighbouring points every t assigns the
points alike, so the integral over t is a sum over the gaps between points, each with the prior's mass of its gap; no
grid is chosen. The evidence of all left sides comes from one Cholesky factor of the sorted points, because
ln p(y_1..j) = sum_{i <= j} ln p(y_i | y_1..i-1), and that of all right sides from a second one, in reversed order.

Axes: K experts, B tasks, C points, J = C + 1 gaps, N targets, M outputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from modmoe.meta.evidence.experts import ExpertView
from modmoe.meta.evidence.linear import cholesky, finite
from modmoe.meta.evidence.predictives import EvidencePredictive, log_normals
from modmoe.meta.task_batch import TaskBatch


class BreakpointDistribution(NamedTuple):
    """With probability rho there is a breakpoint, t ~ N(location, scale^2); four tensors ()."""

    location: Tensor
    scale: Tensor
    log_rho: Tensor
    log_stay: Tensor  # ln (1 - rho)

    def cdf(self, x: Tensor) -> Tensor:
        """P(t < x), elementwise."""
        return torch.special.ndtr((x - self.location) / self.scale)


class BreakpointPrior(nn.Module):
    """The learned prior of the breakpoint, shared by all experts.

    It starts wide, rho = 1/2 and t ~ N(0, 1) for inputs of about unit size; no range is given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.location = nn.Parameter(torch.zeros(()))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.switch_logit = nn.Parameter(torch.zeros(()))

    def forward(self) -> BreakpointDistribution:
        logit = self.switch_logit
        rho, stay = nn.functional.logsigmoid(logit), nn.functional.logsigmoid(-logit)
        return BreakpointDistribution(self.location, self.log_scale.exp(), rho, stay)


class SideEvidence(NamedTuple):
    """What the first j of C points in some order say, for j = 0..C.

    Args:
        log_evidence: (K, B, J).
        shift: (K, B, J, N, M) the posterior mean of a^T u at the targets.
        variance: (K, B, J, N) its variance.
    """

    log_evidence: Tensor
    shift: Tensor
    variance: Tensor

    def reversed(self) -> "SideEvidence":
        """The same with j counted from the other end: what the points from j on say."""
        return SideEvidence(self.log_evidence.flip(2), self.shift.flip(2), self.variance.flip(2))


class SortedPoints(NamedTuple):
    """Points in the order of x; absent ones stand last, at the largest x present, with features and residuals 0.

    Args:
        x: (B, C).
        features: (K, B, C, F).
        residuals: (K, B, C, M).
        mask: (B, C) float, 1 for points that are there.
    """

    x: Tensor
    features: Tensor
    residuals: Tensor
    mask: Tensor

    @classmethod
    def sort(cls, x: Tensor, features: Tensor, residuals: Tensor, present: Tensor) -> "SortedPoints":
        """Sort points (B, C) of which ``present`` (B, C) bool says which are there; ties keep their order."""
        order = torch.where(present, x, torch.inf).sort(dim=1, stable=True).indices
        mask = present.gather(1, order)
        x = x.gather(1, order)
        if x.shape[1]:
            last = torch.where(mask, x, -torch.inf).amax(1, keepdim=True)
            x = torch.where(mask, x, torch.where(last.isfinite(), last, torch.zeros_like(last)))
        weight = mask.to(features.dtype)
        index = order[None, :, :, None]

        def take(values: Tensor) -> Tensor:
            return values.gather(2, index.expand(*values.shape[:1], -1, -1, values.shape[3])) * weight[..., None]

        return cls(x, take(features), take(residuals), weight)

    def sides(self, noise: Tensor, targets: Tensor) -> tuple[SideEvidence, SideEvidence]:
        """What the first j points say, and what those from j on say.

        Args:
            noise: (K,).
            targets: (K, B, N, F) features of the targets; N = 0 where the evidence is all that is wanted.
        """
        flipped = SortedPoints(self.x.flip(1), self.features.flip(2), self.residuals.flip(2), self.mask.flip(1))
        return self._prefixes(noise, targets), flipped._prefixes(noise, targets).reversed()

    def _prefixes(self, noise: Tensor, targets: Tensor) -> SideEvidence:
        a, y = self.features, self.residuals
        eye = torch.eye(a.shape[2], dtype=a.dtype, device=a.device)
        lower = cholesky(a @ a.mT + noise[:, None, None, None] * eye)
        num_outputs = y.shape[-1]
        solved = torch.linalg.solve_triangular(lower, torch.cat([y, a @ targets.mT], -1), upper=False)
        whitened, cross = solved.split([num_outputs, targets.shape[2]], -1)
        each = log_normals(whitened, torch.ones_like(whitened[..., 0]))
        each = (each - num_outputs * lower.diagonal(dim1=-2, dim2=-1).log()) * self.mask
        evidence = finite(_running_sum(each))
        shift = _running_sum(cross[..., None] * whitened[..., None, :])
        variance = targets.square().sum(-1).unsqueeze(2) - _running_sum(cross.square())
        return SideEvidence(evidence, shift, variance.clamp_min(0))


def _running_sum(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ..., C entries of axis 2."""
    return torch.cat([values.new_zeros(*values.shape[:2], 1, *values.shape[3:]), values.cumsum(2)], 2)


class SwitchMixture(EvidencePredictive):
    """The exact sum over breakpoints, the expert on either side, and no breakpoint.

    p(y) = (1 - rho) sum_k pi_k p_k(y) + rho integral p(t) [sum_k pi_k p_k(y left of t)] [sum_k pi_k p_k(y right of t)]
    for all outputs y of a task, context and targets; what is answered is p(targets | context). Points at x <= t are
    left. The two sides are independent given t, even where one expert has both. A target beyond the outermost context
    points may lie beyond the breakpoint as well: there every expert keeps a part of its prior weight.

    Args:
        view: the experts at the context points, then the targets.
        tasks: the same points, with one input.
        prior: of the breakpoint.
    """

    def __init__(self, view: ExpertView, tasks: TaskBatch, prior: BreakpointDistribution):
        num_context = tasks.context_x.shape[1]
        self.view, self.prior = view, prior
        context_x, context_y = tasks.clean_context()
        self.x = torch.cat([context_x, tasks.target_x], 1).squeeze(2)
        self.residuals = context_y - view.offset[:, :, :num_context]
        self.present = tasks.present
        x, targets_x = self.x[:, :num_context], self.x[:, num_context:]
        points = SortedPoints.sort(x, view.features[:, :, :num_context], self.residuals, self.present)
        left, right = points.sides(view.noise, view.features[:, :, num_context:])
        log_evidence = self._log_evidence(points.x, left, right)
        super().__init__(log_evidence, left.log_evidence[:, :, -1].T)

        # a target is left of t in a part of each gap, right of it in the rest: (B, J, N)
        below, above = _ends(prior.cdf(points.x))
        at = prior.cdf(targets_x).unsqueeze(1)
        at = torch.minimum(torch.maximum(at, below.unsqueeze(2)), above.unsqueeze(2))
        log_left = _log_mass(above.unsqueeze(2) - at)
        log_right = _log_mass(at - below.unsqueeze(2))
        log_prior = view.log_prior[:, None, None]
        other_left = (log_prior + left.log_evidence).logsumexp(0)
        other_right = (log_prior + right.log_evidence).logsumexp(0)
        weights = [
            (log_prior + left.log_evidence + other_right + prior.log_rho).unsqueeze(3) + log_left,
            (log_prior + right.log_evidence + other_left + prior.log_rho).unsqueeze(3) + log_right,
            (log_prior + left.log_evidence[:, :, -1:] + prior.log_stay).unsqueeze(3).expand(-1, -1, -1, at.shape[2]),
        ]
        shift = torch.cat([left.shift, right.shift, left.shift[:, :, -1:]], 2)
        variance = torch.cat([left.variance, right.variance, left.variance[:, :, -1:]], 2)
        # (K, B, 2 J + 1, N, ...): every way in which a target can be explained
        self._log_weights = torch.cat(weights, 2) - log_evidence[None, :, None, None]
        self._means = view.offset[:, :, None, num_context:] + shift
        self._variances = variance + view.noise[:, None, None, None]

    @property
    def mean(self) -> Tensor:
        return torch.einsum("kbjn,kbjnm->bnm", self._log_weights.exp(), self._means)

    @property
    def assignment(self) -> Tensor:
        return self._log_weights.exp().sum(2).permute(1, 2, 0)

    @property
    def means(self) -> Tensor:
        """(B, K, N, M): each expert's own expectation where it is the one that answers."""
        weights = self._log_weights - self._log_weights.logsumexp(2, keepdim=True)
        return torch.einsum("kbjn,kbjnm->bknm", weights.exp(), self._means)

    def log_marginal(self, y: Tensor) -> Tensor:
        log_normal = log_normals(y[None, :, None] - self._means, self._variances)
        return torch.logsumexp(self._log_weights + log_normal, (0, 2))

    def log_joint(self, y: Tensor) -> Tensor:
        # of context and targets together, less the context's own
        num_context = self.residuals.shape[2]
        residuals = torch.cat([self.residuals, y - self.view.offset[:, :, num_context:]], 2)
        present = torch.cat([self.present, torch.ones_like(y[..., 0], dtype=torch.bool)], 1)
        points = SortedPoints.sort(self.x, self.view.features, residuals, present)
        sides = points.sides(self.view.noise, self.view.features[:, :, :0])
        return self._log_evidence(points.x, *sides) - self.log_evidence

    def _log_evidence(self, x: Tensor, left: SideEvidence, right: SideEvidence) -> Tensor:
        """(B,): ln p of all the points, at sorted x (B, C)."""
        log_prior = self.view.log_prior[:, None, None]
        below, above = _ends(self.prior.cdf(x))
        sides = (log_prior + left.log_evidence).logsumexp(0) + (log_prior + right.log_evidence).logsumexp(0)
        switched = self.prior.log_rho + _log_mass(above - below) + sides
        stayed = self.prior.log_stay + (log_prior + left.log_evidence)[:, :, -1].logsumexp(0)
        return torch.cat([switched, stayed.unsqueeze(1)], 1).logsumexp(1)


def _ends(cdf: Tensor) -> tuple[Tensor, Tensor]:
    """P(t < x) at both ends of the gaps before, between and after sorted points: (B, C) -> two of (B, C + 1)."""
    return nn.functional.pad(cdf, (1, 0), value=0.0), nn.functional.pad(cdf, (0, 1), value=1.0)


def _log_mass(mass: Tensor) -> Tensor:
    """ln of a probability, -inf for 0, whose gradient stays finite there."""
    some = mass > 0
    return torch.where(some, torch.where(some, mass, torch.ones_like(mass)).log(), -torch.inf)
