import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from modmoe.meta.predictive import FunctionMixture, PointMixture
from modmoe.meta.task_batch import TaskBatch


def test_a_mixture_of_two_latents_by_hand():
    # one task, two latents with weights .25 and .75, two points, one component, unit variance, means 0 and 1
    means = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1, 1).expand(1, 2, 2, 1, 1)
    weights = torch.tensor([[0.25, 0.75]]).log()
    mixture = PointMixture(means, torch.ones(1, 2, 2, 1, 1), None, weights)
    y = torch.tensor([[[0.0], [1.0]]])
    phi = [math.exp(-0.5 * d * d) / math.sqrt(2 * math.pi) for d in (0.0, 1.0)]
    # at y = 0 latent 0 gives phi(0), latent 1 phi(1); at y = 1 the other way round
    expected = [0.25 * phi[0] + 0.75 * phi[1], 0.25 * phi[1] + 0.75 * phi[0]]
    torch.testing.assert_close(mixture.log_marginal(y).exp(), torch.tensor([expected]))
    # jointly both latents give phi(0) phi(1)
    torch.testing.assert_close(mixture.log_joint(y).exp(), torch.tensor([phi[0] * phi[1]]))
    torch.testing.assert_close(mixture.mean, torch.full((1, 2, 1), 0.75))


def test_components_at_a_point_are_independent_between_points():
    torch.manual_seed(0)
    means, stds = torch.randn(2, 3, 4, 5, 2, dtype=torch.float64), torch.rand(2, 3, 4, 5, 2, dtype=torch.float64) + 0.5
    gates = torch.randn(2, 3, 4, 5, dtype=torch.float64).log_softmax(3)
    weights = torch.randn(2, 3, dtype=torch.float64).log_softmax(1)
    y = torch.randn(2, 4, 2, dtype=torch.float64)
    mixture = PointMixture(means, stds, gates, weights)
    joint = 0.0
    for latent in range(3):
        points = 1.0
        for n in range(4):
            inner = 0.0
            for k in range(5):
                density = Normal(means[0, latent, n, k], stds[0, latent, n, k]).log_prob(y[0, n]).sum().exp()
                inner = inner + gates[0, latent, n, k].exp() * density
            points = points * inner
        joint = joint + weights[0, latent].exp() * points
    torch.testing.assert_close(mixture.log_joint(y)[0].exp(), joint)


def test_functions_equal_torch_s_multivariate_normal():
    torch.manual_seed(0)
    root = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    covariances = root @ root.mT + torch.eye(4, dtype=torch.float64)
    means = torch.randn(2, 3, 4, 1, dtype=torch.float64)
    weights = torch.randn(2, 3, dtype=torch.float64).log_softmax(1)
    y = torch.randn(2, 4, 1, dtype=torch.float64)
    mixture = FunctionMixture(means, covariances, weights)
    log_normal = MultivariateNormal(means.squeeze(-1), covariances).log_prob(y.squeeze(-1).unsqueeze(1))
    torch.testing.assert_close(mixture.log_joint(y), (weights + log_normal).logsumexp(1))
    # one point alone has the variance on the diagonal
    one = FunctionMixture(means[:, :, :1], covariances[:, :, :1, :1], weights)
    torch.testing.assert_close(one.log_marginal(y[:, :1])[:, 0], one.log_joint(y[:, :1]))
    torch.testing.assert_close(mixture.log_marginal(y)[:, 0], one.log_joint(y[:, :1]))


def test_two_outputs_share_a_covariance():
    torch.manual_seed(0)
    covariances = torch.diag_embed(torch.rand(1, 1, 3, dtype=torch.float64) + 0.5)
    means, y = torch.randn(1, 1, 3, 2, dtype=torch.float64), torch.randn(1, 3, 2, dtype=torch.float64)
    mixture = FunctionMixture(means, covariances, torch.zeros(1, 1, dtype=torch.float64))
    # independent points: the joint is the sum of the marginals
    torch.testing.assert_close(mixture.log_joint(y), mixture.log_marginal(y).sum(1))


def batch(**changes) -> TaskBatch:
    x, y = torch.zeros(2, 3, 1), torch.zeros(2, 3, 1)
    return TaskBatch(**{"context_x": x, "context_y": y, "target_x": torch.zeros(2, 5, 1), **changes})


def test_masked_points_may_be_anything():
    y = torch.tensor([1.0, 2.0, math.nan]).reshape(1, 3, 1).expand(2, 3, 1)
    mask = torch.tensor([[True, True, False]] * 2)
    cleaned = batch(context_y=y, context_mask=mask).clean_context()[1]
    assert cleaned[0, :, 0].tolist() == [1.0, 2.0, 0.0]
    assert batch(context_y=y, context_mask=mask)[:1].num_tasks == 1
    assert batch(context_mask=mask).to(torch.float64).context_x.dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_y": torch.full((2, 3, 1), math.nan)}, "context_y has numbers that are not finite: mask"),
        ({"target_y": torch.full((2, 5, 1), math.inf)}, "target_y has numbers that are not finite"),
        ({"context_y": torch.zeros(2, 4, 1)}, r"context_x is \(tasks, points, inputs\)"),
        ({"target_x": torch.zeros(2, 5, 2)}, "targets belong to the tasks of the context"),
        ({"context_mask": torch.ones(2, 3)}, "context_mask is bool"),
    ],
)
def test_bad_batches_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        batch(**changes)
