"""LearnedRouter: the gate by hand, frozen networks, seeds, the stop rule, digits, draws from densities, errors."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modmoe import ExpertPool, GaussianRouter, MLPExpert, PPCARouter, PrototypeRouter
from modmoe.gating.classwise import DENSITY, DensityRouter, PartOfRows
from modmoe.gating.fitted import FittedRouter
from modmoe.gating.learned import LearnedRouter, gate_logits


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pool_for(router: LearnedRouter, num_experts: int = 1) -> ExpertPool:
    pool = ExpertPool(MLPExpert(router.in_features, 4), num_experts)
    pool.declare("gate", router.row_specs())
    return pool


def blobs(num_classes: int = 6, n: int = 40, D: int = 5, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    labels = torch.arange(num_classes).repeat_interleave(n)
    centres = spread * torch.randn(num_classes, D, generator=generator(1))
    return centres[labels] + torch.randn(len(labels), D, generator=generator(2)), labels


def learned(D: int = 5, **settings) -> LearnedRouter:
    return LearnedRouter(D, GaussianRouter(D), **{"hidden_features": 16, "max_epochs": 30, **settings})


def learn(router: LearnedRouter, pool: ExpertPool, x: Tensor, labels: Tensor, task: int) -> None:
    """Classes 2 * task and 2 * task + 1 to a new expert (the first one, for task 0), which is frozen then."""
    expert_id = pool.ids[0] if task == 0 else pool.add_experts(1)[0]
    mine = labels // 2 == task
    router.observe(pool, "gate", expert_id, x[mine], labels[mine])
    pool.freeze([expert_id])


def stream(router: LearnedRouter, x: Tensor, labels: Tensor, num_tasks: int = 3) -> ExpertPool:
    pool = pool_for(router)
    for task in range(num_tasks):
        learn(router, pool, x, labels, task)
    return pool


# -- scoring -----------------------------------------------------------------------------------------------------------


def rows_by_hand() -> ExpertPool:
    """Two experts with one hidden unit h = relu(x - 1).

    Expert 0 owns class 4 alone: P(4) = 1, whatever its logit. Expert 1 owns class 7, with logits h log 2 for it and
    log 3 for older.
    """
    pool = pool_for(LearnedRouter(1, GaussianRouter(1), hidden_features=1), 2)
    networks = [
        {"label": [4], "order": [0], "output": [[5.0]], "output_bias": [1.0]},
        {"label": [7], "order": [1], "output": [[math.log(2)], [0.0]], "output_bias": [0.0, math.log(3)]},
    ]
    for expert_id, network in enumerate(networks):
        # the density: N(0, 1) for class 4, N(1, 1) for class 7, log N(m, 1) = -(x - m)^2 / 2 - log(2 pi) / 2
        density = {"label": network["label"], "count": [10.0], "mean": [[float(expert_id)]], "scatter": [[[9.9]]]}
        density |= {"whiten": [[[1.0]]], "log_norm": [-0.5 * math.log(2 * math.pi)]}
        shared = {"epochs": [1], "hidden": [[[1.0]]], "hidden_bias": [[-1.0]]}
        rows = {**network, **shared, **{DENSITY + name: value for name, value in density.items()}}
        for name, value in rows.items():
            pool.growable("gate", name).add([expert_id] * len(value), torch.tensor(value))
    return pool


def test_score_by_hand():
    # At x = 3: h = 2, expert 1's logits are log 4 and log 3, so P(7) = 4/7 and P(older) = 3/7.
    # score(0) = log 1 = 0, score(1) = log 4/7 - log 3/7 = log 4/3; and p = softmax = (3/7, 4/7).
    # At x = 0: h = 0, logits 0 and log 3: P(7) = 1/4, P(older) = 3/4, p = (3/4, 1/4).
    pool, x = rows_by_hand(), torch.tensor([[3.0], [0.0]])
    router = LearnedRouter(1, GaussianRouter(1), hidden_features=1, density_weight=0.0)
    scores = router.score(x, pool.namespace("gate"))
    assert_close(scores, torch.tensor([[0.0, math.log(4 / 3)], [0.0, math.log(1 / 3)]]))
    assert_close(scores.softmax(1), torch.tensor([[3 / 7, 4 / 7], [3 / 4, 1 / 4]]))
    joint, labels = router.class_log_joint(x, pool.namespace("gate"))
    assert labels.tolist() == [4, 7]
    assert router.class_owner(pool.namespace("gate")).tolist() == [0, 1]
    assert_close(joint, scores)


def test_density_by_hand():
    # w = 1/2 adds, at x = 3, -(9 / 4 + c) to class 4 and -(4 / 4 + c) to class 7, c = log(2 pi) / 4
    pool, x = rows_by_hand(), torch.tensor([[3.0]])
    router = LearnedRouter(1, GaussianRouter(1), hidden_features=1, density_weight=0.5)
    c = math.log(2 * math.pi) / 4
    assert_close(router.score(x, pool.namespace("gate")), torch.tensor([[-2.25 - c, math.log(4 / 3) - 1.0 - c]]))


def test_equals_the_textbook_stick():
    x, labels = blobs()
    router = learned(density_weight=0.0)
    pool = stream(router, x, labels)
    log_p, log_older = torch.zeros(len(x), 6), torch.zeros(len(x), 1)
    for task in (2, 1, 0):  # newest first
        rows = pool.namespace("gate", [task])
        network = rows["hidden"][0], rows["hidden_bias"][0], rows["output"], rows["output_bias"]
        assert len(rows["output"]) == (2 if task == 0 else 3)
        log_probs = gate_logits(x, *network).log_softmax(1)
        log_p[:, 2 * task : 2 * task + 2] = log_probs[:, :2] + log_older
        log_older = log_older + log_probs[:, 2:].sum(1, keepdim=True)
    assert_close(log_p.exp().sum(1), torch.ones(len(x)))
    joint, order = router.class_log_joint(x, pool.namespace("gate"))
    assert order.tolist() == list(range(6))
    assert_close(joint.log_softmax(1), log_p, rtol=1e-4, atol=1e-4)
    experts = router.score(x, pool.namespace("gate")).softmax(1)
    assert_close(experts, log_p.exp().view(-1, 3, 2).sum(2), rtol=1e-4, atol=1e-6)


def test_older_has_its_true_share():
    # Both experts' inputs come from one distribution, so nothing but the shares can be learned: 300 samples of
    # the first expert, 100 of the second, so P(older) = 3/4 though training drew as many as the 100.
    x = torch.randn(400, 2, generator=generator())
    router = learned(2, density_weight=0.0, max_epochs=60, held_out_share=0.4)
    pool = pool_for(router, 2)
    router.observe(pool, "gate", 0, x[:300], torch.zeros(300, dtype=torch.int64))
    router.observe(pool, "gate", 1, x[300:], torch.ones(100, dtype=torch.int64))
    older = router.score(torch.zeros(1, 2), pool.namespace("gate")).softmax(1)[0, 0]
    assert older.item() == pytest.approx(0.75, abs=0.1)


def test_the_order_is_that_of_observing_not_of_ids():
    x, labels = blobs(4)
    router = learned()
    pool, swapped = pool_for(router, 2), pool_for(router, 2)
    for task in (0, 1):
        mine = labels // 2 == task
        router.observe(pool, "gate", task, x[mine], labels[mine])
        router.observe(swapped, "gate", 1 - task, x[mine], labels[mine])
    assert swapped.namespace("gate")["order"].tolist() == [1, 0]
    scores = router.score(x, pool.namespace("gate"))
    assert torch.equal(router.score(x, swapped.namespace("gate")), scores.flip(1))


def test_experts_may_own_the_same_class():
    x = torch.cat([torch.randn(60, 2, generator=generator()) - 4, torch.randn(60, 2, generator=generator(1)) + 4])
    labels = torch.arange(120) % 2
    router = learned(2)
    pool = pool_for(router, 2)
    for expert_id, mine in enumerate(torch.arange(120).split(60)):
        router.observe(pool, "gate", expert_id, x[mine], labels[mine])
    assert router.class_log_joint(x, pool.namespace("gate"))[1].tolist() == [0, 1, 0, 1]
    assert (router.score(x, pool.namespace("gate")).argmax(1) == torch.arange(120) // 60).all()


# -- freezing, saving, seeds -------------------------------------------------------------------------------------------


def test_growth_leaves_scores_and_rows_to_the_bit():
    x, labels = blobs()
    router = learned()
    pool = stream(router, x, labels, num_tasks=1)
    before, state = router.score(x, pool.namespace("gate")), pool.expert_state(0)
    for task in (1, 2):
        learn(router, pool, x, labels, task)
    assert torch.equal(router.score(x, pool.namespace("gate"))[:, :1], before)
    assert all(torch.equal(pool.expert_state(0)[name], tensor) for name, tensor in state.items())


def test_a_gate_is_fitted_once():
    x, labels = blobs(2)
    router = learned()
    pool = pool_for(router)
    router.observe(pool, "gate", 0, x, labels)
    state = pool.expert_state(0)
    with pytest.raises(ValueError, match="expert 0 has been fitted: LearnedRouter needs all of its data in one call"):
        router.observe(pool, "gate", 0, x, labels)
    pool.freeze([0])
    with pytest.raises(ValueError, match="expert 0 is frozen"):
        router.observe(pool, "gate", 0, x, labels)
    assert all(torch.equal(pool.expert_state(0)[name], tensor) for name, tensor in state.items())


def test_save_and_load_and_the_stream_goes_on():
    x, labels = blobs()
    router = learned()
    expected = stream(router, x, labels)
    half = stream(router, x, labels, num_tasks=2)
    again, loaded = learned(), pool_for(learned())
    loaded.load_state_dict(half.state_dict())
    scores = again.score(x, loaded.namespace("gate"))
    assert torch.equal(scores, router.score(x, half.namespace("gate")))
    learn(again, loaded, x, labels, 2)
    assert torch.equal(again.score(x, loaded.namespace("gate")), router.score(x, expected.namespace("gate")))


def test_seeded_and_the_global_generator_is_left_alone():
    x, labels = blobs(4)
    scores = []
    for global_seed, seed in ((0, 0), (1, 0), (1, 1)):
        torch.manual_seed(global_seed)
        router = learned(seed=seed)
        pool = pool_for(router, 2)
        state = torch.get_rng_state()
        with torch.no_grad():
            for expert_id in range(2):
                mine = labels // 2 == expert_id
                router.observe(pool, "gate", expert_id, x[mine], labels[mine])
        assert torch.equal(torch.get_rng_state(), state)
        scores.append(router.score(x, pool.namespace("gate")))
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_what_was_observed_stays_as_it_was_and_rows_keep_no_graph():
    x, labels = blobs(2)
    kept = x.clone()
    router = learned()
    pool = pool_for(router)
    router.observe(pool, "gate", 0, x, labels)
    assert torch.equal(x, kept)
    assert not any(tensor.requires_grad for tensor in pool.namespace("gate").values())


# -- the stop rule -----------------------------------------------------------------------------------------------------


def epochs(x: Tensor, labels: Tensor, **settings) -> int:
    router = learned(x.shape[1], **settings)
    pool = pool_for(router)
    router.observe(pool, "gate", 0, x, labels)
    return int(pool.namespace("gate")["epochs"])


def test_easy_classes_stop_early():
    x, labels = blobs(2, spread=10.0)
    stopped = epochs(x, labels, max_epochs=500, learning_rate=0.02)
    assert 3 < stopped < 100  # the loss falls at first, and has nowhere to fall soon


def test_max_epochs_is_the_end():
    x, labels = blobs(2)
    assert epochs(x, labels, max_epochs=4, tolerance=0.0) == 4


@pytest.mark.parametrize("patience", [1, 2, 7])
def test_patience(patience: int):
    # nothing is an improvement by 1000 nats
    x, labels = blobs(2)
    assert epochs(x, labels, patience=patience, tolerance=1000.0) == patience


def test_a_longer_patience_goes_on():
    x, labels = blobs(2, spread=0.5)
    stops = [epochs(x, labels, patience=patience, max_epochs=200) for patience in (1, 5, 20)]
    assert stops == sorted(set(stops))


def test_the_best_weights_are_kept():
    # with steps of 1e3 the start is the best there is: more epochs end with the same rows
    x, labels = blobs(2, spread=0.1)
    kept = []
    for max_epochs in (1, 5):
        router = learned(learning_rate=1e3, patience=9, max_epochs=max_epochs)
        pool = pool_for(router)
        router.observe(pool, "gate", 0, x, labels)
        kept.append(pool.expert_state(0))
    assert [int(state["gate.epochs"]) for state in kept] == [1, 5]
    assert torch.equal(kept[0]["gate.hidden"], kept[1]["gate.hidden"])
    assert kept[0]["gate.hidden"].abs().max() < 10


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_samples_are_judged_by_themselves(n: int):
    x, labels = blobs(4, n=n)
    router = learned()
    pool = pool_for(router, 2)
    for expert_id in range(2):
        mine = labels // 2 == expert_id
        router.observe(pool, "gate", expert_id, x[mine], labels[mine])
    assert router.score(torch.cat([x, 100 * x]), pool.namespace("gate")).isfinite().all()


def test_equal_samples():
    router = learned()
    pool = pool_for(router)
    router.observe(pool, "gate", 0, torch.ones(12, 5), torch.arange(12) % 2)
    assert router.score(torch.ones(1, 5), pool.namespace("gate")).isfinite().all()


# -- learning ----------------------------------------------------------------------------------------------------------


def accuracy(router: FittedRouter, x: Tensor, labels: Tensor, train: Tensor, num_tasks: int) -> float:
    """Of the gate as a classifier, on what is not for training; two classes for each expert."""
    pool = ExpertPool(MLPExpert(router.in_features, 4), num_tasks)
    pool.declare("gate", router.row_specs())
    for expert_id in range(num_tasks):
        mine = train & (labels // 2 == expert_id)
        router.observe(pool, "gate", expert_id, x[mine], labels[mine])
    joint, order = router.class_log_joint(x[~train], pool.namespace("gate"))
    return (order[joint.argmax(1)] == labels[~train]).float().mean().item()


def test_it_tells_apart_what_its_density_cannot():
    # eight spots on a circle belong to two classes in turn, which so have the same mean and the same covariance
    angle = torch.arange(8) * (math.pi / 4)
    circle = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    spots = torch.cat([circle, circle + 12])
    x = spots.repeat_interleave(50, 0) + 0.2 * torch.randn(800, 2, generator=generator())
    spot, train = torch.arange(800) // 50, torch.arange(800) % 2 == 0
    labels = 2 * (spot // 8) + spot % 2
    assert accuracy(GaussianRouter(2), x, labels, train, 2) < 0.7
    # the loss stays at log 2 for a while, which is what patience is for
    router = learned(2, hidden_features=64, max_epochs=200, patience=30, learning_rate=0.01)
    assert accuracy(router, x, labels, train, 2) > 0.8


def test_digits_to_a_threshold():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).float() / 16, torch.from_numpy(y)
    router = LearnedRouter(64, PPCARouter(64, components=1, rank=5, noise_floor=0.01), max_epochs=30)
    assert accuracy(router, x, y, torch.arange(len(x)) % 4 != 0, 5) > 0.96


# -- draws from densities ----------------------------------------------------------------------------------------------


def check_moments(samples: Tensor, mean: list[float], covariance: list[list[float]]) -> None:
    """Means and covariances within 5 standard errors of what they should be."""
    n, wanted = len(samples), torch.tensor(covariance, dtype=torch.float64)
    error = (samples.double().mean(0) - torch.tensor(mean, dtype=torch.float64)).abs()
    assert (error < 5 * (wanted.diagonal() / n).sqrt()).all()
    # var of an entry of the sample covariance of normal samples: (S_ii S_jj + S_ij^2) / n
    deviation = ((torch.outer(wanted.diagonal(), wanted.diagonal()) + wanted.square()) / n).sqrt()
    assert ((torch.cov(samples.double().T) - wanted).abs() < 5 * deviation).all()


def row_of(density: DensityRouter, x: Tensor) -> dict[str, Tensor]:
    pool = ExpertPool(MLPExpert(density.in_features, 4))
    pool.declare("gate", density.row_specs())
    density.observe(pool, "gate", 0, x, torch.zeros(len(x), dtype=torch.int64))
    return {name: tensor[0] for name, tensor in pool.namespace("gate").items()}


def test_gaussian_samples_have_the_scored_moments():
    # (0, 0), (2, 2), (4, 1): mean (2, 1), deviations (-2, -1), (0, 1), (2, 0), so the covariance (over n = 3) is
    # [[8, 2], [2, 2]] / 3, and r = 0.5 is added to the diagonal
    density = GaussianRouter(2, regularization=0.5)
    row = row_of(density, torch.tensor([[0.0, 0.0], [2.0, 2.0], [4.0, 1.0]]))
    covariance = [[8 / 3 + 0.5, 2 / 3], [2 / 3, 2 / 3 + 0.5]]
    check_moments(density.sample(row, 20_000, generator()), [2.0, 1.0], covariance)


def ppca_row(log_weight: list[float], mean: list[list[float]]) -> dict[str, Tensor]:
    """Components with the direction (.6, .8, 0), variance 5 along it and noise 1."""
    K = len(mean)
    return {
        "log_weight": torch.tensor(log_weight),
        "mean": torch.tensor(mean),
        "directions": torch.tensor([[0.6], [0.8], [0.0]]).repeat(K, 1, 1),
        "variances": torch.full((K, 1), 5.0),
        "noise": torch.ones(K),
    }


def test_ppca_samples_have_the_scored_moments():
    # U U^T (5 - 1) + I = [[1 + 4 * .36, 4 * .48, 0], [4 * .48, 1 + 4 * .64, 0], [0, 0, 1]]
    density = PPCARouter(3, components=1, rank=1)
    samples = density.sample(ppca_row([0.0], [[1.0, -2.0, 3.0]]), 20_000, generator())
    check_moments(samples, [1.0, -2.0, 3.0], [[2.44, 1.92, 0.0], [1.92, 3.56, 0.0], [0.0, 0.0, 1.0]])


def test_ppca_samples_come_from_components_by_their_weight():
    # 1/4 around -50 and 3/4 around 50; the third component is unused
    density = PPCARouter(3, components=3, rank=1)
    row = ppca_row([math.log(0.25), math.log(0.75), -math.inf], [[-50.0] * 3, [50.0] * 3, [0.0] * 3])
    samples = density.sample(row, 10_000, generator())
    assert (samples.abs() > 30).all()
    share = (samples[:, 0] > 0).float().mean().item()
    assert share == pytest.approx(0.75, abs=5 * math.sqrt(0.25 * 0.75 / 10_000))
    check_moments(samples[samples[:, 0] > 0], [50.0] * 3, [[2.44, 1.92, 0.0], [1.92, 3.56, 0.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    "density",
    [GaussianRouter(4), PPCARouter(4, components=1, rank=2), PPCARouter(4, components=1, rank=4)],
    ids=["gaussian", "ppca", "ppca of full rank"],
)
def test_draws_are_scored_as_normal_samples_are(density: DensityRouter):
    # log N(x) = log N(mean) - q / 2, and q of a draw is chi-squared with D = 4 degrees of freedom: mean 4, variance 8
    data = torch.randn(60, 4, generator=generator()) * torch.tensor([3.0, 2.0, 1.0, 0.1])
    pool = ExpertPool(MLPExpert(4, 4))
    pool.declare("gate", density.row_specs())
    density.observe(pool, "gate", 0, data, torch.zeros(60, dtype=torch.int64))
    rows = pool.namespace("gate")
    row = {name: tensor[0] for name, tensor in rows.items()}
    draws = density.sample(row, 4_000, generator())
    at_mean = density.class_score(row["mean"].view(1, 4), rows)
    q = 2 * (at_mean - density.class_score(draws, rows))
    assert q.mean().item() == pytest.approx(4.0, abs=5 * math.sqrt(8 / 4_000))


@pytest.mark.parametrize("density", [GaussianRouter(4), PPCARouter(4, components=2, rank=2)], ids=["gaussian", "ppca"])
def test_draws_are_seeded(density: DensityRouter):
    row = row_of(density, torch.randn(60, 4, generator=generator()))
    state = torch.get_rng_state()
    draws = density.sample(row, 10, generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws, density.sample(row, 10, generator()))
    assert not torch.equal(draws, density.sample(row, 10, generator(1)))
    assert density.sample(row, 0, generator()).shape == (0, 4)


def test_negatives_come_from_older_classes_by_their_counts():
    router = learned(1)
    far = [torch.randn(30, 1, generator=generator()) - 50, torch.randn(10, 1, generator=generator()) + 50]
    older = [row_of(router.density, x) for x in far]
    draws = router._draw(older, 4_000, generator())
    assert draws.shape == (4_000, 1)
    assert (draws < 0).float().mean().item() == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / 4_000))


def test_density_rows_are_those_of_the_density_alone():
    x, labels = blobs(2)
    router = learned()
    pool = stream(router, x, labels, num_tasks=1)
    part = PartOfRows(pool.namespace("gate"), DENSITY)
    alone = row_of(router.density, x[labels == 0])
    assert all(torch.equal(part[name][0], tensor) for name, tensor in alone.items())


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": PrototypeRouter(4)}, "PrototypeRouter is no density of single classes that can be drawn from"),
        ({"density": GaussianRouter(4, per_class=False)}, "GaussianRouter is no density of single classes"),
        ({"density": GaussianRouter(3)}, "the density has to take all 4 features, it takes 3"),
        ({"hidden_features": 0}, "hidden_features, max_epochs and patience must be at least 1, got 0"),
        ({"max_epochs": 0}, "max_epochs and patience must be at least 1"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"tolerance": -0.1}, "tolerance and density_weight not negative"),
        ({"density_weight": -0.1}, "tolerance and density_weight not negative"),
        ({"held_out_share": 0.0}, r"held_out_share must be in \(0, 1\), got 0.0"),
        ({"held_out_share": 1.0}, r"held_out_share must be in \(0, 1\), got 1.0"),
    ],
)
def test_bad_settings(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LearnedRouter(**{"in_features": 4, "density": GaussianRouter(4), **settings})


def test_bad_observations_change_nothing():
    x, labels = blobs(2)
    router = learned()
    pool = pool_for(router)
    for bad_x, bad_labels, message in [
        (x, None, "one integer label for each"),
        (x, labels.float(), "one integer label for each"),
        (x[:, :4], labels, r"features of shape \(n, 5\) are needed"),
        (x * torch.nan, labels, "NaN or infinity"),
    ]:
        with pytest.raises(ValueError, match=message):
            router.observe(pool, "gate", 0, bad_x, bad_labels)
    assert not any(name.startswith("gate") for name in pool.expert_state(0))
