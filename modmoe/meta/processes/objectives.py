"""What a latent neural process is trained by, as functions of tensors.

Axes: B tasks, S draws of the latents, N target points, K experts. e_i is the expert of point i.
"""

import torch
from torch import Tensor

from modmoe.meta.processes.likelihood import log_mean_exp

GUMBEL_TEMPERATURE = 0.5


def exact_points(log_likelihood: Tensor, log_gates: Tensor) -> Tensor:
    """ln p(y_i | x_i, z) with e_i summed out: ln sum_k p(e_i = k | x_i, z) p(y_i | x_i, z_k).

    Args:
        log_likelihood: (B, S, N, K).
        log_gates: (B, S, N, K), normalised over K.
    Returns:
        (B, S, N).
    """
    return torch.logsumexp(log_gates + log_likelihood, -1)


def elbo_points(log_likelihood: Tensor, log_gates: Tensor) -> Tensor:
    """A lower bound of :func:`exact_points`: sum_k p(e_i = k | x_i, z) ln p(y_i | x_i, z_k).

    Arguments and returns as there.

    Source:
        MoE-NP, Wang and van Hoof 2022, in our reconstruction. Theirs has E_q(e)[ln p] - KL[q(e) || p(e | x, z)] with a
        learned q(e). Here q(e) is the gate itself, which makes the KL 0; the q(e) that is best would make the bound
        equal to ``exact_points``, which is at hand.
    """
    return (log_gates.exp() * log_likelihood).sum(-1)


def gumbel_points(log_likelihood: Tensor, log_gates: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One draw in place of the sum of :func:`elbo_points`, with e_i relaxed: sum_k e_ik ln p(y_i | x_i, z_k).

    e_i = softmax((ln gate + Gumbel noise) / 0.5). Arguments and returns as there. A relaxed e is not distributed as
    the gate, so it is no unbiased estimate of ``elbo_points``, but with K = 1 it is equal.

    Source:
        The concrete distribution, Maddison et al. 2017, equation 10; Gumbel-softmax, Jang et al. 2017, equation 2.
    """
    noise = -torch.empty_like(log_gates).exponential_(generator=generator).log()
    relaxed = ((log_gates + noise) / GUMBEL_TEMPERATURE).softmax(-1)
    return (relaxed * log_likelihood).sum(-1)


def npml(log_points: Tensor) -> Tensor:
    """ln p(y_1..N) of each task by S draws from the prior p(z | context): ln mean_s exp sum_i ln p(y_i | x_i, z_s).

    Args:
        log_points: (B, S, N).
    Returns:
        (B,).
    Source:
        Foong et al. 2020 (ConvNP), equation 8: maximum likelihood in place of the ELBO.
    """
    return log_mean_exp(log_points.sum(2), 1)


def gaussian_kl(mean: Tensor, std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """KL[N(mean, std^2) || N(prior_mean, prior_std^2)] of each coordinate, all of one shape."""
    ratio = std / prior_std
    shift = (mean - prior_mean) / prior_std
    return 0.5 * (ratio.square() + shift.square() - 1) - ratio.log()
