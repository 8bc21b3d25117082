"""PPCARouter: its density against scipy and by hand, its fit against eigenvectors, small classes, exactness."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor
from torch.testing import assert_close

from modmoe import ExpertPool, MLPExpert
from modmoe.gating.ppca import PPCARouter, assign_by_kmeans, component_scores, leading_subspace


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pool_for(router: PPCARouter, num_experts: int = 1) -> ExpertPool:
    pool = ExpertPool(MLPExpert(router.in_features, 4), num_experts)
    pool.declare("gate", router.row_specs())
    return pool


def fitted(router: PPCARouter, x: Tensor, labels: Tensor | None = None) -> ExpertPool:
    pool = pool_for(router)
    router.observe(pool, "gate", 0, x, torch.zeros(len(x), dtype=torch.int64) if labels is None else labels)
    return pool


def covariances(pool: ExpertPool, row: int = 0) -> list[np.ndarray]:
    """W W^T + v I of each component of one class, in float64."""
    rows = pool.namespace("gate")
    found = []
    for k in range(rows["noise"].shape[1]):
        U, variances, v = (rows[name][row, k].double() for name in ("directions", "variances", "noise"))
        W = U * (variances - v).clamp(min=0).sqrt()
        found.append((W @ W.T + v * torch.eye(len(U), dtype=torch.float64)).numpy())
    return found


# -- the density -------------------------------------------------------------------------------------------------------


def test_log_density_by_hand():
    # D = 2, one direction (1, 0) with variance 4, noise 1, mean 0: at (2, 1)
    # -1/2 [2 log 2 pi + log 4 + log 1 + 4/4 + 1/1] = -(log 2 pi + log 2 + 1)
    scores = component_scores(
        torch.tensor([[2.0, 1.0]]),
        log_weight=torch.zeros(1),
        mean=torch.zeros(1, 2),
        directions=torch.tensor([[[1.0], [0.0]]]),
        variances=torch.tensor([[4.0]]),
        noise=torch.ones(1),
    )
    assert scores.item() == pytest.approx(-(math.log(2 * math.pi) + math.log(2) + 1), rel=1e-6)


def test_posterior_by_hand():
    # D = 1, samples +-1 around 0 (variance 1) and around 4 (variance 1): with floor .25 both N(m, 1.25).
    # At x = 1 the log odds are (3^2 - 1^2) / (2 * 1.25) = 3.2, and both classes have two samples.
    router = PPCARouter(1, components=1, noise_floor=0.25)
    pool = fitted(router, torch.tensor([[-1.0], [1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1, 1]))
    joint, labels = router.class_log_joint(torch.tensor([[1.0]]), pool.namespace("gate"))
    assert labels.tolist() == [0, 1]
    assert (joint[0, 0] - joint[0, 1]).item() == pytest.approx(3.2, abs=1e-5)
    normal = math.log(2) - 0.5 * math.log(2 * math.pi * 1.25) - 1 / 2.5
    assert joint[0, 0].item() == pytest.approx(normal, abs=1e-5)


@pytest.mark.parametrize(("D", "rank"), [(6, 2), (6, 6), (3, 25), (40, 5)])
def test_density_equals_scipy(D: int, rank: int):
    x = torch.randn(300, D, generator=generator()) @ torch.randn(D, D, generator=generator(1)) / math.sqrt(D)
    router = PPCARouter(D, components=1, rank=rank)
    pool = fitted(router, x)
    mean = pool.namespace("gate")["mean"][0, 0].double().numpy()
    expected = multivariate_normal.logpdf(x.double().numpy(), mean, covariances(pool)[0])
    score = router.score(x, pool.namespace("gate"))[:, 0]
    assert_close(score.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


def test_mixture_equals_scipy():
    x = torch.cat([torch.randn(200, 4, generator=generator()) + shift for shift in (-4, 0, 4)])
    router = PPCARouter(4, components=3, rank=2)
    pool = fitted(router, x)
    rows = pool.namespace("gate")
    assert_close(rows["log_weight"].exp().sum(), torch.tensor(1.0))
    parts = [
        math.exp(rows["log_weight"][0, k]) * multivariate_normal.pdf(x.numpy(), rows["mean"][0, k].numpy(), covariance)
        for k, covariance in enumerate(covariances(pool))
    ]
    expected = torch.from_numpy(np.log(sum(parts)))
    assert_close(router.score(x, rows)[:, 0].double(), expected, rtol=1e-4, atol=1e-4)


def test_density_integrates_to_one():
    router = PPCARouter(1, components=2, rank=1)
    x = torch.cat([torch.randn(100, 1, generator=generator()), torch.randn(50, 1, generator=generator(1)) * 0.2 + 3])
    pool = fitted(router, x)
    grid = torch.linspace(-10, 12, 20_001, dtype=torch.float64).unsqueeze(1)
    density = router.score(grid, pool.namespace("gate")).exp().squeeze(1)
    assert torch.trapezoid(density, dx=22 / 20_000).item() == pytest.approx(1.0, abs=1e-5)


# -- the fit -----------------------------------------------------------------------------------------------------------


def test_one_component_is_the_closed_form():
    # Tipping & Bishop: variances are the leading eigenvalues of the covariance, the noise is the mean of the others
    x = torch.randn(500, 8, generator=generator()) * torch.tensor([5.0, 3, 2, 1, 1, 0.5, 0.2, 0.1])
    router = PPCARouter(8, components=1, rank=3, noise_floor=0.01)
    rows = fitted(router, x).namespace("gate")
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    assert_close(rows["variances"][0, 0], eigenvalues[:3] + 0.01, rtol=1e-4, atol=1e-5)
    assert_close(rows["noise"][0, 0], eigenvalues[3:].mean() + 0.01, rtol=1e-4, atol=1e-5)
    U = rows["directions"][0, 0]
    assert_close(U.T @ U, torch.eye(3), rtol=0, atol=1e-5)


def test_subspace_iteration_finds_the_leading_eigenvectors():
    # D = 80 is more than rank + 10 columns, so that it has to iterate
    x = torch.randn(400, 80, generator=generator(), dtype=torch.float64) * torch.linspace(3, 0.1, 80) ** 2
    values, vectors = leading_subspace(x, 5, generator(1))
    exact, exact_vectors = torch.linalg.eigh(x.T @ x / 400)
    assert_close(values, exact.flip(0)[:5], rtol=1e-3, atol=0)
    overlap = (vectors.T @ exact_vectors.flip(1)[:, :5]).abs().diagonal()
    assert overlap.min() > 0.99


def test_kmeans_finds_separate_clusters():
    centres = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]])
    x = torch.randn(90, 2, generator=generator()) + centres.repeat_interleave(30, 0)
    for seed in range(5):
        parts = assign_by_kmeans(x, 3, generator(seed)).view(3, 30)
        assert (parts == parts[:, :1]).all()
        assert len(parts[:, 0].unique()) == 3


def test_kmeans_of_equal_rows_leaves_clusters_empty():
    assert assign_by_kmeans(torch.ones(5, 2), 3, generator()).shape == (5,)


def test_a_class_with_two_modes_needs_two_components():
    x = torch.cat([torch.randn(60, 2, generator=generator()) * 0.1 + side for side in (-3.0, 3.0)])
    one, two = PPCARouter(2, components=1), PPCARouter(2, components=2)
    at_zero = torch.zeros(1, 2)
    low = two.score(at_zero, fitted(two, x).namespace("gate"))
    high = one.score(at_zero, fitted(one, x).namespace("gate"))
    assert high - low > 100  # the mixture knows that nothing lies between the modes


# -- few samples -------------------------------------------------------------------------------------------------------


def test_a_single_sample_by_hand():
    # no variance was seen: N(x; sample, floor I). At distance 1 along an axis: -(2 log(2 pi .5) + 1/.5) / 2
    router = PPCARouter(2, components=3, rank=2, noise_floor=0.5)
    pool = fitted(router, torch.tensor([[1.0, 2.0]]))
    score = router.score(torch.tensor([[2.0, 2.0]]), pool.namespace("gate"))
    assert score.item() == pytest.approx(-0.5 * (2 * math.log(2 * math.pi * 0.5) + 2), rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 30])
def test_fewer_samples_than_the_rank(n: int):
    router = PPCARouter(20, components=4, rank=10)
    x = torch.randn(n, 20, generator=generator())
    pool = fitted(router, x)
    rows = pool.namespace("gate")
    used = rows["log_weight"].isfinite().sum()
    assert used == max(1, min(4, n // 20))
    assert (rows["variances"][0, 0] > rows["noise"][0, 0]).sum() == min(10, n // 2)
    score = router.score(torch.cat([x, torch.randn(50, 20, generator=generator(1))]), rows)
    assert score.isfinite().all()
    expected = multivariate_normal.logpdf(x.double().numpy(), rows["mean"][0, 0].numpy(), covariances(pool)[0])
    if used == 1:
        assert_close(score[:n, 0].double(), torch.from_numpy(np.atleast_1d(expected)), rtol=1e-4, atol=1e-3)


def test_equal_samples():
    router = PPCARouter(3, components=2, rank=1, noise_floor=0.1)
    rows = fitted(router, torch.ones(12, 3)).namespace("gate")
    assert_close(rows["noise"][0][rows["log_weight"][0].isfinite()].unique(), torch.tensor([0.1]))
    assert router.score(torch.ones(1, 3), rows).isfinite().all()


# -- exactness ---------------------------------------------------------------------------------------------------------


def test_a_fit_is_the_classs_own_and_leaves_the_global_generator_alone():
    x, labels = torch.randn(90, 5, generator=generator()), torch.arange(90) % 3
    router = PPCARouter(5, components=2, rank=2)
    pool = pool_for(router)
    state = torch.get_rng_state()
    router.observe(pool, "gate", 0, x, labels)
    assert torch.equal(torch.get_rng_state(), state)
    rows = pool.namespace("gate")
    alone = fitted(router, x[labels == 1], labels[labels == 1]).namespace("gate")
    for name in alone:
        assert torch.equal(rows[name][1], alone[name][0])


def test_another_seed_draws_other_components():
    x = torch.randn(400, 5, generator=generator())
    first, second = (fitted(PPCARouter(5, components=4, rank=2, seed=seed), x).namespace("gate") for seed in (0, 1))
    assert not torch.equal(first["mean"], second["mean"])


def test_digits_to_a_threshold():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).float() / 16, torch.from_numpy(y)
    router = PPCARouter(64, components=2, rank=15)
    pool = pool_for(router, 5)
    train = torch.arange(len(x)) % 4 != 0
    for expert_id in range(5):
        mine = train & (y // 2 == expert_id)
        router.observe(pool, "gate", expert_id, x[mine], y[mine])
    joint, labels = router.class_log_joint(x[~train], pool.namespace("gate"))
    assert (labels[joint.argmax(1)] == y[~train]).float().mean() > 0.97
    assert (router.score(x[~train], pool.namespace("gate")).argmax(1) == y[~train] // 2).float().mean() > 0.97


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": 0}, "components, rank and iterations must be at least 1, got 0, 25 and 4"),
        ({"rank": 0}, "components, rank and iterations must be at least 1, got 10, 0 and 4"),
        ({"iterations": 0}, "components, rank and iterations must be at least 1, got 10, 25 and 0"),
        ({"noise_floor": 0.0}, "noise_floor must be positive, got 0.0"),
    ],
)
def test_bad_settings(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PPCARouter(4, **settings)
