import math

import pytest
import torch

from modmoe.meta.predictive import PointMixture
from modmoe.meta.processes.likelihood import CategoricalLikelihood, ClassMixture, GaussianLikelihood
from modmoe.meta.processes.objectives import elbo_points, exact_points, gaussian_kl, gumbel_points, npml


def test_bounds_by_hand():
    # gates 1/4, 3/4 and densities 8, 2: exact ln(8/4 + 3*2/4) = ln 3.5, elbo ln(8)/4 + 3 ln(2)/4 = 6/4 ln 2
    gates = torch.tensor([0.25, 0.75]).log().reshape(1, 1, 1, 2)
    densities = torch.tensor([8.0, 2.0]).log().reshape(1, 1, 1, 2)
    torch.testing.assert_close(exact_points(densities, gates), torch.full((1, 1, 1), math.log(3.5)))
    torch.testing.assert_close(elbo_points(densities, gates), torch.full((1, 1, 1), 1.5 * math.log(2)))


def test_npml_by_hand():
    # two draws whose two points have densities (2, 3) and (1, 4): ln((6 + 4) / 2) = ln 5
    points = torch.tensor([[[2.0, 3.0], [1.0, 4.0]]]).log()
    torch.testing.assert_close(npml(points), torch.tensor([math.log(5)]))


def test_kl_by_hand():
    # KL[N(1, 2^2) || N(0, 1)] = (4 + 1 - 1) / 2 - ln 2
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    torch.testing.assert_close(gaussian_kl(one, two, torch.zeros(()), one), torch.tensor(2 - math.log(2)))


def test_kl_equals_torch_s():
    torch.manual_seed(0)
    means, stds = torch.randn(2, 5), torch.rand(2, 5) + 0.1
    normals = [torch.distributions.Normal(*both) for both in zip(means, stds, strict=True)]
    expected = torch.distributions.kl_divergence(*normals)
    torch.testing.assert_close(gaussian_kl(means[0], stds[0], means[1], stds[1]), expected)


def test_exact_is_never_below_the_elbo():
    torch.manual_seed(0)
    densities, gates = 3 * torch.randn(200, 2, 4, 5), (3 * torch.randn(200, 2, 4, 5)).log_softmax(-1)
    gap = exact_points(densities, gates) - elbo_points(densities, gates)
    assert gap.min() > 0
    alike = densities[..., :1].expand(-1, -1, -1, 5)  # Jensen's gap is 0 where all experts say the same
    torch.testing.assert_close(exact_points(alike, gates), elbo_points(alike, gates))


def test_gumbel_draws_relaxed_experts():
    # an indicator of expert k in place of densities gives e_k itself; the largest e_k is expert k's with its gate
    gates = torch.tensor([0.2, 0.3, 0.5]).log().expand(1, 1, 20000, 3)
    shares = [
        gumbel_points(one.expand_as(gates), gates, torch.Generator().manual_seed(0)).flatten() for one in torch.eye(3)
    ]
    e = torch.stack(shares, 1)
    torch.testing.assert_close(e.sum(1), torch.ones(20000))
    chosen = torch.bincount(e.argmax(1), minlength=3) / 20000
    torch.testing.assert_close(chosen, torch.tensor([0.2, 0.3, 0.5]), atol=0.012, rtol=0)  # 3 sqrt(.25 / 20000)


def test_gumbel_of_one_expert_and_with_a_seed():
    torch.manual_seed(0)
    one, alone = torch.randn(2, 2, 3, 1), torch.zeros(2, 2, 3, 1)
    torch.testing.assert_close(gumbel_points(one, alone), elbo_points(one, alone))
    densities, gates = torch.randn(1, 1, 1, 3), torch.randn(1, 1, 1, 3).log_softmax(-1)
    draws = [gumbel_points(densities, gates, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_gaussian_numbers_by_hand():
    # mean 2, std .03 + ln(1 + e^0) = .03 + ln 2, y = 3
    raw = torch.tensor([2.0, 0.0]).reshape(1, 1, 1, 1, 2)
    std = 0.03 + math.log(2)
    expected = -0.5 / std**2 - math.log(std) - 0.5 * math.log(2 * math.pi)
    found = GaussianLikelihood(1).log_prob(raw, torch.full((1, 1, 1), 3.0))
    torch.testing.assert_close(found, torch.full((1, 1, 1, 1), expected))


def test_class_numbers_by_hand():
    # logits ln 1, ln 3: probabilities 1/4, 3/4; the second expert says 1/2, 1/2; gates 1/3, 2/3
    raw = torch.tensor([[1.0, 3.0], [1.0, 1.0]]).log().reshape(1, 1, 1, 2, 2)
    gates = torch.tensor([1 / 3, 2 / 3]).log().reshape(1, 1, 1, 2)
    answer = CategoricalLikelihood(2).predictive(raw, gates)
    assert isinstance(answer, ClassMixture)
    torch.testing.assert_close(answer.mean, torch.tensor([[[5 / 12, 7 / 12]]]))
    torch.testing.assert_close(answer.log_marginal(torch.tensor([[[0.0, 1.0]]])).exp(), torch.tensor([[7 / 12]]))


def test_joint_of_classes_by_hand():
    # two latents say (1/4, 3/4) and (3/4, 1/4) at both of two points; both points in class 0: (1/16 + 9/16) / 2
    probs = torch.tensor([[0.25, 0.75], [0.75, 0.25]]).log().reshape(1, 2, 1, 1, 2).expand(1, 2, 2, 1, 2)
    answer = ClassMixture(probs, torch.zeros(1, 2, 2, 1))
    y = torch.tensor([1.0, 0.0]).expand(1, 2, 2)
    torch.testing.assert_close(answer.log_joint(y).exp(), torch.tensor([10 / 32]))
    torch.testing.assert_close(answer.log_marginal(y).exp(), torch.full((1, 2), 0.5))


@pytest.mark.parametrize(("likelihood", "size"), [(GaussianLikelihood(2), 4), (CategoricalLikelihood(3), 3)])
def test_log_prob_is_what_the_answer_says(likelihood, size):
    torch.manual_seed(0)
    raw, gates = torch.randn(2, 3, 4, 5, size), torch.randn(2, 3, 4, 5).log_softmax(-1)
    y = torch.randn(2, 4, 2) if size == 4 else torch.eye(3)[torch.randint(3, (2, 4))]
    answer = likelihood.predictive(raw, gates)
    assert isinstance(answer, PointMixture | ClassMixture)
    points = exact_points(likelihood.log_prob(raw, y), gates)
    torch.testing.assert_close(answer.log_joint(y), npml(points))
