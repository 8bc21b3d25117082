"""Gaussian processes: kernels by hand, the oracle against scikit-learn and torch."""

import math

import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, ExpSineSquared, Kernel, Matern, WhiteKernel
from torch.distributions import MultivariateNormal

from modmoe.meta import FunctionMixture, TaskBatch
from modmoe.meta.families import GaussianProcessFamily, GaussianProcessTasks

KERNELS = ("rbf", "matern52", "periodic")
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def tasks_of(kernel: str, batch: TaskBatch | None = None, **hyper: float) -> GaussianProcessTasks:
    batch = batch or TaskBatch(*(torch.zeros(1, 1, 1) for _ in range(3)))
    values = [torch.tensor([hyper.get(name, 1.0)]).double() for name in ("lengthscale", "scale", "period")]
    return GaussianProcessTasks(batch, kernel, *values, hyper.get("noise", 1.0))


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("rbf", 4 * math.exp(-2)),  # d / l = 2: exp(-4 / 2)
        # a = 2 sqrt 5: (1 + 2 sqrt 5 + 20 / 3) exp(-2 sqrt 5)
        ("matern52", 4 * (23 / 3 + 2 * math.sqrt(5)) * math.exp(-2 * math.sqrt(5))),
        # d / p = 1 / 4: sin^2(pi / 4) = 1/2, over l^2 = 1/4: exp(-2 * 2)
        ("periodic", 4 * math.exp(-4)),
    ],
)
def test_kernels_by_hand(kernel, expected):
    tasks = tasks_of(kernel, lengthscale=0.5, scale=2.0, period=4.0)
    covariance = tasks.covariance(torch.tensor([[[0.0]]]), torch.tensor([[[1.0], [0.0]]]))
    assert covariance.flatten().tolist() == pytest.approx([expected, 4.0])


def test_the_oracle_by_hand():
    # rbf, s = l = noise = 1, context (0, 2), target x = 0: mean 1 / (1 + 1) * 2 = 1, variance 1 + 1 - 1 / 2 = 1.5
    zero = torch.zeros(1, 1, 1)
    oracle = tasks_of("rbf", TaskBatch(zero, zero + 2, zero, zero + 1)).oracle()
    assert oracle.mean.item() == pytest.approx(1.0)
    expected = -0.5 * math.log(2 * math.pi * 1.5)
    one = torch.ones(1, 1, 1).double()
    assert oracle.log_marginal(one).item() == pytest.approx(expected)
    assert oracle.log_joint(one).item() == pytest.approx(expected)


def sklearn_kernel(tasks: GaussianProcessTasks, row: int) -> Kernel:
    length, scale, period = (float(values[row]) for values in (tasks.lengthscale, tasks.scale, tasks.period))
    # theirs has sin^2 / l^2 with a factor 2 as well
    shape = {"rbf": RBF(length), "matern52": Matern(length, nu=2.5), "periodic": ExpSineSquared(length, period)}
    return ConstantKernel(scale**2) * shape[tasks.kernel] + WhiteKernel(tasks.noise**2)


@every_kernel
def test_the_oracle_equals_scikit_learn(kernel):
    tasks = GaussianProcessFamily(kernel, noise=0.1).sample(3, 6, 5, torch.Generator().manual_seed(0))
    oracle, y = tasks.oracle(), tasks.batch.target_y
    assert y is not None
    for row in range(3):
        # alpha 0: the noise is in the kernel, and only there it counts for the targets too
        model = GaussianProcessRegressor(sklearn_kernel(tasks, row), alpha=0.0, optimizer=None)
        model.fit(tasks.batch.context_x[row].double().numpy(), tasks.batch.context_y[row, :, 0].double().numpy())
        mean, covariance = model.predict(tasks.batch.target_x[row].double().numpy(), return_cov=True)
        normal = MultivariateNormal(torch.from_numpy(mean), torch.from_numpy(covariance))
        targets = y[row, :, 0].double()
        torch.testing.assert_close(oracle.mean[row, :, 0], normal.mean, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(oracle.log_joint(y.double())[row], normal.log_prob(targets), rtol=1e-7, atol=1e-7)
        alone = torch.distributions.Normal(normal.mean, normal.variance.sqrt()).log_prob(targets)
        torch.testing.assert_close(oracle.log_marginal(y.double())[row], alone, rtol=1e-7, atol=1e-7)


@every_kernel
def test_the_oracle_is_the_ratio_of_two_evidences(kernel):
    # p(targets | context) = p(both) / p(context)
    tasks = GaussianProcessFamily(kernel).sample(4, 7, 6, torch.Generator().manual_seed(1))
    batch = tasks.batch
    assert batch.target_y is not None
    x, y = (
        torch.cat(pair, 1).double() for pair in ((batch.context_x, batch.target_x), (batch.context_y, batch.target_y))
    )
    covariance = tasks.covariance(x, x) + 0.02**2 * torch.eye(13).double()
    both = MultivariateNormal(torch.zeros(4, 13).double(), covariance).log_prob(y.squeeze(2))
    context = MultivariateNormal(torch.zeros(4, 7).double(), covariance[:, :7, :7]).log_prob(y[:, :7].squeeze(2))
    torch.testing.assert_close(tasks.oracle().log_joint(y[:, 7:]), both - context, rtol=1e-6, atol=1e-6)


def test_points_that_are_not_there_change_nothing():
    tasks = GaussianProcessFamily().sample(6, (0, 8), 5, torch.Generator().manual_seed(0))
    oracle = tasks.oracle()
    assert len(set(tasks.batch.present.sum(1).tolist())) > 2
    for row in range(6):
        size = int(tasks.batch.present[row].sum())
        part = tasks.batch[row : row + 1]
        short = TaskBatch(part.context_x[:, :size], part.context_y[:, :size], part.target_x, part.target_y)
        hyper = [values[row : row + 1] for values in (tasks.lengthscale, tasks.scale, tasks.period)]
        alone = GaussianProcessTasks(short, "rbf", *hyper, tasks.noise).oracle()
        torch.testing.assert_close(oracle.mean[row], alone.mean[0])
        torch.testing.assert_close(oracle.covariances[row], alone.covariances[0])


@every_kernel
def test_draws_have_the_prior_s_moments(kernel):
    # E s^2 + noise^2 = (1 - .001) / (3 * .9) + .0004 = .3704
    tasks = GaussianProcessFamily(kernel).sample(20_000, 0, 1, torch.Generator().manual_seed(0))
    y = tasks.batch.target_y
    assert y is not None
    assert abs(y.mean()) < 4 * y.std() / 20_000**0.5
    assert abs(y.square().mean() - 0.3704) < 4 * y.square().std() / 20_000**0.5
    assert abs(tasks.batch.target_x.mean()) < 4 * (4 / 3 / 20_000) ** 0.5
    assert abs(tasks.lengthscale.mean() - 0.35) < 4 * 0.5 / math.sqrt(12 * 20_000)


@every_kernel
def test_the_oracle_is_calibrated(kernel):
    # whitened by the true covariance, targets are standard normal: their mean square is 1, of deviation sqrt(2 / n)
    tasks = GaussianProcessFamily(kernel).sample(500, 10, 12, torch.Generator().manual_seed(0))
    oracle, y = tasks.oracle(), tasks.batch.target_y
    assert isinstance(oracle, FunctionMixture)
    assert y is not None
    factor = torch.linalg.cholesky(oracle.covariances[:, 0])
    z = torch.linalg.solve_triangular(factor, y.double() - oracle.mean, upper=False)
    assert abs(z.square().mean() - 1) < 4 * math.sqrt(2 / 6000)


@pytest.mark.parametrize("context", [0, 1])
def test_empty_and_one_point_contexts(context):
    tasks = GaussianProcessFamily().sample(3, context, 4, torch.Generator().manual_seed(0))
    oracle = tasks.oracle()
    assert oracle.mean.shape == (3, 4, 1)
    if context == 0:
        assert (oracle.mean == 0).all()
        noise = 0.02**2 * torch.eye(4).double()
        torch.testing.assert_close(oracle.covariances[:, 0], tasks.covariance(*[tasks.batch.target_x] * 2) + noise)


def test_equal_seeds_and_many_points():
    family = GaussianProcessFamily("rbf", lengthscale=(0.6, 0.6))
    one, again = (family.sample(4, 100, 50, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.batch.context_y, again.batch.context_y)
    assert torch.equal(one.scale, again.scale)
    assert (one.lengthscale == 0.6).all()
    assert one.batch.target_y is not None
    assert one.oracle().log_joint(one.batch.target_y.double()).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "linear"}, "unknown kernel 'linear', choose from rbf, matern52, periodic"),
        ({"lengthscale": (0.0, 1.0)}, "lengthscale is"),
        ({"period": (0.5, 0.1)}, r"period is \(low, high\) with 0 < low <= high, got \(0.5, 0.1\)"),
        ({"noise": 0.0}, "noise is positive"),
    ],
)
def test_bad_families(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianProcessFamily(**options)


def test_bad_samples():
    with pytest.raises(ValueError, match="1 or more, got 0 and 3"):
        GaussianProcessFamily().sample(0, 3, 3)
    with pytest.raises(ValueError, match="0 <= low <= high, got -2"):
        GaussianProcessFamily().sample(1, -2, 3)
