import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from modmoe import NonFiniteError
from modmoe.meta.evidence.linear import cholesky, infer


def draw(num_points, num_features=4, num_outputs=2, batch=(3,), dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_points)
    features = torch.randn(*batch, num_points, num_features, generator=generator, dtype=torch.float64)
    targets = torch.randn(*batch, num_points, num_outputs, generator=generator, dtype=torch.float64)
    noise = 0.1 + torch.rand(*batch, num_points, generator=generator, dtype=torch.float64)
    return features.to(dtype), targets.to(dtype), noise.to(dtype)


def brute_force(features, targets, noise):
    """ln N(y; 0, A A^T + diag s^2), summed over outputs."""
    covariance = features @ features.mT + torch.diag_embed(noise.expand(features.shape[:-1]))
    zero = features.new_zeros(features.shape[:-1])
    return sum(MultivariateNormal(zero, covariance).log_prob(y) for y in targets.unbind(-1))


def test_two_points_and_one_feature_by_hand():
    # a = (1, 2), y = (3, 3), s^2 = 1: precision of u = 1 + 1 + 4 = 6, mean = (3 + 6) / 6 = 3/2, variance 1/6
    posterior = infer(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [3.0]]), torch.tensor(1.0))
    torch.testing.assert_close(posterior.mean, torch.tensor([[1.5]]))
    # at a = 2: mean 3, variance 4/6
    mean, variance = posterior.predict(torch.tensor([[2.0]]))
    torch.testing.assert_close((mean.item(), variance.item()), (3.0, 2 / 3))
    # the covariance of y is [[2, 2], [2, 5]]: determinant 6, y^T C^-1 y = (5 * 9 - 4 * 9 + 2 * 9) / 6 = 27/6
    expected = -0.5 * (27 / 6 + math.log(6) + 2 * math.log(2 * math.pi))
    torch.testing.assert_close(posterior.log_evidence.item(), expected)


# 4 features: up to four points are computed by their covariance, more by the precision of the weights
@pytest.mark.parametrize("num_points", [1, 3, 4, 5, 60])
def test_evidence_equals_the_brute_force_marginal_likelihood(num_points):
    features, targets, noise = draw(num_points)
    posterior = infer(features, targets, noise)
    assert posterior.dual == (num_points <= 4)
    expected = brute_force(features, targets, noise)
    torch.testing.assert_close(posterior.log_evidence, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("num_points", [0, 3, 60])
def test_posterior_equals_the_textbook(num_points):
    features, targets, noise = draw(num_points)
    posterior = infer(features, targets, noise)
    weighted = features.mT / noise.unsqueeze(-2)
    covariance = torch.linalg.inv(torch.eye(4, dtype=torch.float64) + weighted @ features)
    new = torch.randn(3, 7, 4, dtype=torch.float64)
    mean, variance = posterior.predict(new)
    torch.testing.assert_close(mean, new @ covariance @ weighted @ targets)
    torch.testing.assert_close(posterior.covariance(new), new @ covariance @ new.mT)
    torch.testing.assert_close(variance, (new @ covariance @ new.mT).diagonal(dim1=-2, dim2=-1))


def test_no_points_give_the_prior_and_evidence_zero():
    features, targets, noise = draw(0)
    posterior = infer(features, targets, noise)
    assert torch.equal(posterior.log_evidence, torch.zeros(3, dtype=torch.float64))
    new = torch.randn(3, 2, 4, dtype=torch.float64)
    mean, variance = posterior.predict(new)
    assert torch.equal(mean, torch.zeros(3, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(variance, new.square().sum(-1))


@pytest.mark.parametrize("num_points", [3, 9])
def test_masked_points_do_not_exist(num_points):
    features, targets, noise = draw(num_points)
    mask = torch.tensor([True, False, True] * (num_points // 3))
    masked = infer(features, targets, noise, mask)
    kept = infer(features[:, mask], targets[:, mask], noise[:, mask])
    torch.testing.assert_close(masked.log_evidence, kept.log_evidence)
    torch.testing.assert_close(masked.mean, kept.mean)
    nothing = infer(features, targets, noise, torch.zeros_like(mask))
    assert torch.equal(nothing.log_evidence, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("num_points", [0, 2, 6])
def test_gradients(num_points):
    inputs = [value.requires_grad_() for value in draw(num_points, 3, 2, (2,))]
    new = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)

    def outputs(features, targets, noise, new):
        posterior = infer(features, targets, noise)
        return posterior.log_evidence, *posterior.predict(new)

    assert torch.autograd.gradcheck(outputs, (*inputs, new))


@pytest.mark.parametrize("num_points", [10, 400])
def test_float32_stays_close_where_noise_is_low_and_points_are_equal(num_points):
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(1, 24, generator=generator).expand(num_points, 24).clone()  # one x, many times
    features[num_points // 2 :] = torch.rand(num_points - num_points // 2, 24, generator=generator)
    weights = torch.randn(24, 1, generator=generator)
    noise = torch.tensor(1e-4)
    targets = features @ weights + 1e-2 * torch.randn(num_points, 1, generator=generator)
    single = infer(features, targets, noise)
    double = infer(features.double(), targets.double(), noise.double())
    # ln p is about 3 a point here
    torch.testing.assert_close(single.log_evidence.double(), double.log_evidence, atol=0.02 * num_points, rtol=0)
    mean, variance = single.predict(features)
    torch.testing.assert_close(mean.double(), double.predict(features.double())[0], atol=5e-3, rtol=0)
    assert (variance >= 0).all()


def test_jitter_touches_only_the_matrix_that_needs_it():
    good = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    singular = torch.tensor([[1.0, 1.0], [1.0, 1.0]]) - 1e-7 * torch.eye(2)
    lower = cholesky(torch.stack([good, singular]))
    assert torch.equal(lower[0], torch.linalg.cholesky(good))
    torch.testing.assert_close(lower[1] @ lower[1].T, singular, atol=1e-4, rtol=0)


def test_what_explains_nothing_is_a_low_finite_number():
    posterior = infer(torch.ones(1, 1), torch.full((1, 1), 1e30), torch.tensor(1e-4))
    assert posterior.log_evidence.isfinite()
    assert posterior.log_evidence < -1e30


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(NonFiniteError, match="not positive definite"):
        infer(torch.tensor([[torch.nan]]), torch.ones(1, 1), torch.tensor(1.0))
