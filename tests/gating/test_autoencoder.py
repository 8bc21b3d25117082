"""AutoencoderRouter: scores by hand, training inside observe, digits to a threshold, errors."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from modmoe import ExpertPool, MLPExpert
from modmoe.gating.autoencoder import AutoencoderRouter, reconstruct


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pool_for(router: AutoencoderRouter, num_experts: int = 1) -> ExpertPool:
    pool = ExpertPool(MLPExpert(router.in_features, 4), num_experts)
    pool.declare("gate", router.row_specs())
    return pool


def fitted(router: AutoencoderRouter, x: Tensor, labels: Tensor | None = None) -> ExpertPool:
    pool = pool_for(router)
    router.observe(pool, "gate", 0, x, torch.zeros(len(x), dtype=torch.int64) if labels is None else labels)
    return pool


def test_score_by_hand():
    # D = H = 2, identity weights, no bias: r(x) = relu(x). At (1, -3): |x - r|^2 = 9, over 2 * 3^2 gives -1/2
    router = AutoencoderRouter(2, hidden_features=2, epochs=1, width=3.0)
    pool = fitted(router, torch.zeros(1, 2))
    weights = {"encoder": torch.eye(2), "decoder": torch.eye(2), "encoder_bias": torch.zeros(2)}
    for name, values in {**weights, "decoder_bias": torch.zeros(2)}.items():
        pool.growable("gate", name).banks()[0][0].copy_(values)
    assert_close(
        router.score(torch.tensor([[1.0, -3.0], [1.0, 3.0]]), pool.namespace("gate")), torch.tensor([[-0.5], [0.0]])
    )


def test_reconstruction_equals_a_sequential_network():
    network = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 5))
    x = torch.randn(4, 5, generator=generator())
    first, last = network[0], network[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    assert_close(reconstruct(x, first.weight, first.bias, last.weight, last.bias), network(x))


def test_training_starts_from_principal_directions():
    x = torch.randn(100, 6, generator=generator()) * torch.tensor([4.0, 3, 1, 0.5, 0.5, 0.1]) + 2
    router = AutoencoderRouter(6, hidden_features=5, epochs=1, learning_rate=1e-9)  # two pairs, and a unit without use
    centred = x - x.mean(0)
    principal = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    expected = -0.5 * (centred - centred @ principal.T @ principal).square().sum(1, keepdim=True)
    assert_close(router.score(x, fitted(router, x).namespace("gate")), expected, rtol=1e-4, atol=1e-4)


def test_more_epochs_reconstruct_better():
    x = torch.randn(200, 2, generator=generator()) @ torch.randn(2, 10, generator=generator(1))
    errors = []
    for epochs in (1, 40):
        router = AutoencoderRouter(10, hidden_features=8, epochs=epochs, learning_rate=1e-2, noise=0.0)
        errors.append(-router.score(x, fitted(router, x).namespace("gate")).mean().item())
    assert errors[1] < errors[0] / 5


def test_noise_keeps_a_wide_autoencoder_from_rebuilding_what_its_class_is_not():
    # a class along one axis of four with variance 4, the others .01; H = 8 could be the identity. The best linear
    # reconstruction under noise of variance 1 shrinks an axis of variance v by v / (v + 1): 4/5 of the class's own
    # axis, and .01 of another one. At (0, 3, 0, 0) that leaves about (.99 * 3)^2 = 8.8 of the square 9
    x = torch.randn(2000, 4, generator=generator()) * torch.tensor([2.0, 0.1, 0.1, 0.1])
    other, own = torch.tensor([[0.0, 3.0, 0.0, 0.0]]), torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    errors = {}
    for noise in (0.0, 1.0):
        router = AutoencoderRouter(4, hidden_features=8, epochs=60, learning_rate=1e-2, noise=noise)
        rows = fitted(router, x).namespace("gate")
        errors[noise] = [-2 * router.score(point, rows).item() for point in (other, own)]
    assert errors[0.0][0] < 1
    assert errors[1.0][0] > 6
    assert errors[1.0][1] < 1.5


def test_one_autoencoder_for_each_expert():
    router = AutoencoderRouter(4, hidden_features=2, epochs=1, per_class=False)
    pool = pool_for(router)
    router.observe(pool, "gate", 0, torch.randn(9, 4, generator=generator()))
    assert pool.namespace("gate")["label"].tolist() == [-1]


def test_rows_need_no_gradient_and_the_global_generator_is_left_alone():
    router = AutoencoderRouter(4, hidden_features=2, epochs=2)
    pool = pool_for(router)
    state = torch.get_rng_state()
    router.observe(pool, "gate", 0, torch.randn(150, 4, generator=generator()), torch.zeros(150, dtype=torch.int64))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(tensor.requires_grad for tensor in pool.namespace("gate").values())
    assert not list(router.parameters())


def test_a_fit_is_the_classs_own():
    x, labels = torch.randn(60, 4, generator=generator()), torch.arange(60) % 2
    router = AutoencoderRouter(4, hidden_features=3, epochs=2)
    both = fitted(router, x, labels).namespace("gate")
    alone = fitted(router, x[labels == 1], labels[labels == 1]).namespace("gate")
    for name in alone:
        assert torch.equal(both[name][1], alone[name][0])


def test_digits_to_a_threshold():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).float() / 16, torch.from_numpy(y)
    router = AutoencoderRouter(64, hidden_features=24, epochs=40, learning_rate=1e-2)
    pool = pool_for(router, 5)
    train = torch.arange(len(x)) % 4 != 0
    for expert_id in range(5):
        mine = train & (y // 2 == expert_id)
        router.observe(pool, "gate", expert_id, x[mine], y[mine])
    score = router.score(x[~train], pool.namespace("gate"))
    assert (score.argmax(1) == y[~train] // 2).float().mean() > 0.93


def test_scores_are_minus_squared_errors():
    x = torch.randn(30, 6, generator=generator())
    router = AutoencoderRouter(6, hidden_features=2, epochs=1, width=0.5)
    rows = fitted(router, x).namespace("gate")
    weights = [rows[name][0] for name in ("encoder", "encoder_bias", "decoder", "decoder_bias")]
    slow = [-F.mse_loss(reconstruct(row, *weights), row, reduction="sum") / (2 * 0.25) for row in x]
    assert_close(router.score(x, rows)[:, 0], torch.stack(slow))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_features": 0}, "hidden_features and epochs must be at least 1, got 0 and 10"),
        ({"epochs": 0}, "hidden_features and epochs must be at least 1, got 64 and 0"),
        ({"learning_rate": 0.0}, "learning_rate and width must be positive, got 0.0 and 1.0"),
        ({"width": -1.0}, "learning_rate and width must be positive, got 0.002 and -1.0"),
        ({"noise": -0.1}, "noise must be at least 0, got -0.1"),
    ],
)
def test_bad_settings(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        AutoencoderRouter(4, **settings)
