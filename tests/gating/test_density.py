"""GaussianRouter and PrototypeRouter: gates fitted to data."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from modmoe import ExpertPool, GaussianRouter, MLPExpert, MoELayer, NonFiniteError, PrototypeRouter, TopKRouter

D = 3
KINDS = {
    "gaussian": lambda **kwargs: GaussianRouter(D, **kwargs),
    "prototype": lambda **kwargs: PrototypeRouter(D, **kwargs),
}
kinds = pytest.mark.parametrize("kind", sorted(KINDS))


def layer_of(router, num_experts: int = 2, dtype: torch.dtype = torch.float32) -> MoELayer:
    return MoELayer(ExpertPool(MLPExpert(router.in_features, 4), num_experts), router).to(dtype)


def data(seed: int, n: int = 40, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=generator)
    x, shape = (torch.randn(m, D, generator=generator, dtype=torch.float64) for m in (n, D))
    return (x @ shape + 2 * labels.unsqueeze(1) + seed).to(dtype), labels + 2 * seed


def fitted(kind: str, num_experts: int = 2, dtype: torch.dtype = torch.float32, **kwargs) -> MoELayer:
    layer = layer_of(KINDS[kind](**kwargs), num_experts, dtype)
    for expert_id in layer.pool.ids:
        layer.observe(expert_id, *data(expert_id, dtype=dtype))
    return layer


def gate_state(layer: MoELayer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items() if ".gate." in name}


def assert_equal_states(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_two_gaussians_on_a_line_by_hand():
    layer = layer_of(GaussianRouter(1, per_class=False, top_k=2, regularization=1.0))
    layer.observe(0, torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]))  # mean 0, variance 1, and r = 1: N(0, 2)
    layer.observe(1, torch.tensor([[4.0]]))  # mean 4, variance 0, and r = 1: N(4, 1)
    routing = layer.route(torch.tensor([[3.0], [0.0]]))
    # log N(3; 0, 2) = -9/4 - log(2)/2 - log(2 pi)/2 = -2.25 - .346574 - .918939 = -3.515512
    # log N(3; 4, 1) = -1/2 - .918939 = -1.418939
    # log N(0; 0, 2) = -.346574 - .918939 = -1.265512; log N(0; 4, 1) = -8 - .918939 = -8.918939
    expected = torch.tensor([[-3.515512, -1.418939], [-1.265512, -8.918939]])
    assert_close(routing.logits, expected, atol=1e-5, rtol=0)
    assert routing.choices.tolist() == [[1, 0], [0, 1]]
    # Equal priors: p(expert 1 | x = 3) = 1 / (1 + e^(-3.515512 + 1.418939)) = 1 / (1 + .122876) = .890570
    assert_close(routing.matrix()[0], torch.tensor([0.109430, 0.890570]), atol=1e-5, rtol=0)
    assert_close(routing.weight.view(2, 2).sum(1), torch.ones(2))


def test_a_mixture_of_classes_by_hand():
    layer = layer_of(GaussianRouter(1, regularization=1.0), 1)
    layer.observe(0, torch.tensor([[0.0], [0.0], [0.0], [2.0]]), torch.tensor([7, 7, 7, 9]))
    # (3/4) N(1; 0, 1) + (1/4) N(1; 2, 1) = N(1; 0, 1) = e^(-1/2) / sqrt(2 pi): log = -.5 - .918939
    assert_close(layer.route(torch.tensor([[1.0]])).logits, torch.tensor([[-1.418939]]), atol=1e-6, rtol=0)
    joint, labels = layer.router.class_log_joint(torch.tensor([[1.0]]), layer.pool.namespace("gate"))
    assert labels.tolist() == [7, 9]
    assert_close(joint, torch.tensor([[math.log(3.0), 0.0]]) - 1.418939, atol=1e-6, rtol=0)


def test_prototypes_by_hand():
    layer = layer_of(PrototypeRouter(2, width=2.0, top_k=2))
    layer.observe(0, torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0]))  # mean (1, 0)
    layer.observe(1, torch.tensor([[4.0, 4.0]]), torch.tensor([1]))
    routing = layer.route(torch.tensor([[1.0, 4.0]]))
    # -|(0, 4)|^2 / 8 = -2; -|(-3, 0)|^2 / 8 = -9/8
    assert_close(routing.logits, torch.tensor([[-2.0, -1.125]]))
    assert_close(routing.matrix(), torch.tensor([[-2.0, -1.125]]).softmax(1))


# -- against libraries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_class", [True, False])
def test_the_log_density_equals_torch_and_scipy(per_class):
    layer = fitted("gaussian", 2, torch.float64, per_class=per_class, regularization=0.05)
    x, _ = data(5, 20, torch.float64)
    got = layer.route(x).logits
    for expert_id in (0, 1):
        seen, labels = data(expert_id, dtype=torch.float64)
        parts = [seen[labels == label] for label in labels.unique()] if per_class else [seen]
        by_torch, by_scipy = [], []
        for part in parts:
            covariance = torch.cov(part.T, correction=0) + 0.05 * torch.eye(D, dtype=torch.float64)
            prior = math.log(len(part) / len(seen))
            by_torch.append(MultivariateNormal(part.mean(0), covariance).log_prob(x) + prior)
            by_scipy.append(multivariate_normal(part.mean(0).numpy(), covariance.numpy()).logpdf(x.numpy()) + prior)
        assert_close(got[:, expert_id], torch.stack(by_torch).logsumexp(0), atol=1e-10, rtol=1e-10)
        expected = torch.from_numpy(np.logaddexp.reduce(by_scipy))
        assert_close(got[:, expert_id], expected, atol=1e-10, rtol=1e-10)


def test_the_log_density_in_float32():
    single, double = fitted("gaussian"), fitted("gaussian", dtype=torch.float64)
    x, _ = data(1, 20, torch.float64)
    # the scores run to 60, of which float32 keeps 7 digits
    assert_close(single.route(x.float()).logits.double(), double.route(x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("per_class", [True, False])
def test_prototypes_choose_the_nearest_mean(per_class):
    layer = fitted("prototype", 3, per_class=per_class)
    x, _ = data(1, 60)
    means, owners = [], []
    for expert_id in range(3):
        seen, labels = data(expert_id)
        for label in labels.unique() if per_class else [None]:
            means.append((seen if label is None else seen[labels == label]).mean(0))
            owners.append(expert_id)
    distance = torch.cdist(x, torch.stack(means))
    joint, _ = layer.router.class_log_joint(x, layer.pool.namespace("gate"))
    assert torch.equal((joint - layer.pool.namespace("gate")["count"].log()).argmax(1), distance.argmin(1))
    if not per_class:  # with classes, their frequency inside the expert counts as well
        assert torch.equal(layer.route(x).choices[:, 0], torch.tensor(owners)[distance.argmin(1)])


# -- moments under any batching ----------------------------------------------------------------------------------------


@kinds
@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=6), seed=st.integers(0, 100), per_class=st.booleans())
def test_moments_do_not_depend_on_the_batches(kind, cuts, seed, per_class):
    x, labels = data(seed, dtype=torch.float64)
    whole, parts = (layer_of(KINDS[kind](per_class=per_class), 1, torch.float64) for _ in range(2))
    whole.observe(0, x, labels)
    bounds = [0, *sorted(cuts), 40]
    for start, end in pairwise(bounds):
        parts.observe(0, x[start:end], labels[start:end])
    rows, expected = parts.pool.namespace("gate"), whole.pool.namespace("gate")
    order, expected_order = rows["label"].argsort(), expected["label"].argsort()
    for name in rows:
        assert_close(rows[name][order], expected[name][expected_order], atol=1e-10, rtol=1e-10)


def test_moments_in_float32_over_many_batches():
    # 200 single samples around 100, standard deviation 1: summing squares would lose four digits.
    generator = torch.Generator().manual_seed(0)
    x = 100 + torch.randn(200, D, generator=generator)
    layer = layer_of(GaussianRouter(D, per_class=False), 1)
    for row in x:
        layer.observe(0, row[None])
    rows = layer.pool.namespace("gate")
    assert rows["count"].tolist() == [200.0]
    assert_close(rows["mean"][0], x.double().mean(0).float(), atol=1e-4, rtol=0)
    assert_close(rows["scatter"][0] / 200, torch.cov(x.double().T, correction=0).float(), atol=1e-3, rtol=1e-4)


def test_a_single_sample_has_the_regularisation_as_its_covariance():
    layer = layer_of(GaussianRouter(2, regularization=0.25), 1)
    layer.observe(0, torch.tensor([[3.0, -1.0]]), torch.tensor([0]))
    # D = 2, |x - m|^2 = 1: -(1 / .25)/2 - log .25 - log 2 pi = -2 + 1.386294 - 1.837877 = -2.451583
    assert_close(layer.route(torch.tensor([[3.0, 0.0]])).logits, torch.tensor([[-2.451583]]), atol=1e-5, rtol=0)


@kinds
def test_a_class_seen_again_updates_its_row(kind):
    layer = layer_of(KINDS[kind](), 1)
    x = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0], [10.0, 0.0, 0.0], [4.0, 4.0, 4.0]])
    layer.observe(0, x[:3], torch.tensor([5, 5, 3]))
    layer.observe(0, x[3:], torch.tensor([5]))
    rows = layer.pool.namespace("gate")
    columns = (rows[name].tolist() for name in ("label", "count", "mean"))
    found = {label: (count, mean) for label, count, mean in zip(*columns, strict=True)}
    # class 5: (0 + 2 + 4)/3 = 2
    assert found == {5: (3, [2.0, 2.0, 2.0]), 3: (1, [10.0, 0.0, 0.0])}
    layer.observe(0, x[:1], torch.tensor([8]))
    assert layer.pool.namespace("gate")["label"].tolist() == [3, 5, 8]


@kinds
def test_without_classes_labels_do_not_matter(kind):
    layers = [layer_of(KINDS[kind](per_class=False), 1) for _ in range(2)]
    x, labels = data(0)
    layers[0].observe(0, x)
    layers[1].observe(0, x, labels)
    assert layers[0].pool.namespace("gate")["label"].tolist() == [-1]
    assert_equal_states(gate_state(layers[0]), gate_state(layers[1]))


@kinds
def test_no_samples_change_nothing(kind):
    layer = fitted(kind)
    before = gate_state(layer)
    layer.observe(0, torch.zeros(0, D), torch.zeros(0, dtype=torch.int64))
    assert_equal_states(gate_state(layer), before)


# -- who is chosen -----------------------------------------------------------------------------------------------------


@kinds
def test_an_unfitted_expert_is_chosen_only_where_nobody_else_is_open(kind):
    layer = layer_of(KINDS[kind](top_k=2), 3)
    x, _ = data(0, 10)
    routing = layer.route(x)  # nobody is fitted: all alike
    assert routing.load.sum() == 20
    assert_close(routing.weight, torch.full((20,), 0.5))

    layer.observe(1, *data(1))
    routing = layer.route(x)
    assert (routing.choices == torch.tensor([1, -1])).all()
    assert_close(routing.matrix(), torch.tensor([[0.0, 1.0, 0.0]]).expand(10, 3))
    assert (routing.logits[:, [0, 2]] == -torch.inf).all()

    # a new task whose expert has not been fitted yet
    routing = layer.route(x, expert_mask=torch.tensor([False, False, True]))
    assert (routing.choices == torch.tensor([2, -1])).all()
    assert (routing.weight.view(10, 2) == torch.tensor([1.0, 0.0])).all()
    by_token = torch.ones(10, 3, dtype=torch.bool)
    by_token[:4, 1] = False
    routing = layer.route(x, expert_mask=by_token)
    assert (routing.matrix()[:4] == torch.tensor([0.5, 0.0, 0.5])).all()
    assert (routing.matrix()[4:] == torch.tensor([0.0, 1.0, 0.0])).all()
    by_token[0] = False
    with pytest.raises(ValueError, match="every expert is masked for token 0 of 10"):
        layer.route(x, expert_mask=by_token)


@kinds
def test_a_raw_score_never_changes_when_experts_join_or_leave(kind):
    layer = fitted(kind, 2)
    x, _ = data(1, 31)
    before = layer.route(x).logits
    layer.freeze([0, 1])
    (new,) = layer.add_experts(1)
    assert torch.equal(layer.route(x).logits[:, :2], before)
    layer.observe(new, *data(2))
    assert torch.equal(layer.route(x).logits[:, :2], before)
    layer.add_experts(9)
    assert torch.equal(layer.route(x).logits[:, :2], before)
    layer.remove([0])
    assert torch.equal(layer.route(x).logits[:, :1], before[:, 1:])


@kinds
def test_the_gate_tells_tasks_apart(kind):
    torch.manual_seed(0)
    layer = layer_of(KINDS[kind](), 3)
    centres = torch.tensor([[0.0, 0.0, 0.0], [6.0, 0.0, 0.0], [0.0, 6.0, 0.0]])
    for expert_id, centre in enumerate(centres):
        layer.observe(expert_id, centre + torch.randn(50, D), torch.randint(2, (50,)))
    x = (centres.unsqueeze(1) + torch.randn(3, 100, D)).flatten(0, 1)
    right = layer.route(x).choices[:, 0] == torch.arange(3).repeat_interleave(100)
    assert right.float().mean() > 0.97


@kinds
def test_gradients_reach_the_input_only(kind):
    layer = fitted(kind, top_k=2)
    layer.add_experts(1)  # unfitted: its score is -inf
    x = data(0, 6)[0].requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert not any("gate" in name for name, _ in layer.named_parameters())


def test_the_gradient_of_the_score():
    layer = fitted("gaussian", 2, torch.float64)
    x = data(0, 5, torch.float64)[0].requires_grad_()
    rows = layer.pool.namespace("gate")
    assert torch.autograd.gradcheck(lambda x: layer.router.score(x, rows), (x,))


# -- precision ---------------------------------------------------------------------------------------------------------


@kinds
def test_scores_are_float32_under_autocast(kind):
    layer = fitted(kind)
    x, _ = data(1, 30)
    expected = layer.route(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.route(x).logits, expected)
        assert layer(x).dtype == torch.bfloat16


@kinds
def test_a_bfloat16_model_computes(kind):
    layer = fitted(kind).to(torch.bfloat16)
    x, _ = data(1, 30)
    routing = layer.route(x.bfloat16())
    assert routing.logits.dtype == torch.float32
    layer.observe(0, x.bfloat16(), torch.zeros(30, dtype=torch.int64))
    assert torch.isfinite(layer(x.bfloat16())).all()


# -- saved, frozen, refused --------------------------------------------------------------------------------------------


@kinds
def test_saved_and_loaded(kind, tmp_path):
    layer = fitted(kind, 3)
    layer.freeze([1])
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = layer_of(KINDS[kind](), 1)
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    x, _ = data(1, 20)
    assert torch.equal(other.route(x).logits, layer.route(x).logits)
    assert torch.equal(other(x), layer(x))
    for some in (layer, other):  # and both go on alike
        some.observe(0, *data(7))
    assert torch.equal(other.route(x).logits, layer.route(x).logits)
    with pytest.raises(ValueError, match="expert 1 is frozen"):
        other.observe(1, *data(7))


@kinds
def test_a_frozen_expert_observes_nothing(kind):
    layer = fitted(kind)
    layer.freeze([0])
    before = gate_state(layer)
    with pytest.raises(ValueError, match="expert 0 is frozen: its statistics are never written"):
        layer.observe(0, *data(3))
    assert_equal_states(gate_state(layer), before)
    layer.unfreeze([0])
    layer.observe(0, *data(3))
    assert layer.pool.namespace("gate")["count"].sum() == 120


@kinds
def test_training_and_evaluation_write_no_statistics(kind):
    layer = fitted(kind)
    before = gate_state(layer)
    for mode in (True, False):
        layer.train(mode)
        layer(data(4)[0]).sum().backward()
    assert_equal_states(gate_state(layer), before)


@kinds
@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (torch.zeros(4, D + 1), torch.zeros(4, dtype=torch.int64), r"features of shape \(n, 3\) are needed"),
        (torch.zeros(D), torch.zeros(1, dtype=torch.int64), r"features of shape \(n, 3\) are needed"),
        (torch.full((4, D), torch.nan), torch.zeros(4, dtype=torch.int64), "NaN or infinity"),
        (torch.full((4, D), torch.inf), torch.zeros(4, dtype=torch.int64), "NaN or infinity"),
        (torch.zeros(4, D), None, "one integer label for each of the 4 rows"),
        (torch.zeros(4, D), torch.zeros(3, dtype=torch.int64), "one integer label for each of the 4 rows"),
        (torch.zeros(4, D), torch.zeros(4, 1, dtype=torch.int64), "one integer label for each of the 4 rows"),
        (torch.zeros(4, D), torch.zeros(4), "one integer label for each of the 4 rows"),
    ],
)
def test_data_that_cannot_be_observed(kind, x, labels, message):
    layer = fitted(kind)
    before = gate_state(layer)
    with pytest.raises(ValueError, match=message):
        layer.observe(0, x, labels)
    assert_equal_states(gate_state(layer), before)


@kinds
def test_an_unknown_expert(kind):
    layer = fitted(kind)
    with pytest.raises(ValueError, match=r"no experts with ids \[9\]"):
        layer.observe(9, *data(0))


def test_a_trained_gate_observes_nothing():
    layer = MoELayer(ExpertPool(MLPExpert(D, 4), 2), TopKRouter(D))
    with pytest.raises(ValueError, match="TopKRouter is trained by gradient: it observes no data"):
        layer.observe(0, torch.zeros(4, D))


@kinds
def test_non_finite_inputs_are_named(kind):
    for layer in (fitted(kind), layer_of(KINDS[kind]())):
        for value in (torch.nan, torch.inf, -torch.inf):
            x = torch.zeros(4, D)
            x[2, 0] = value
            with pytest.raises(NonFiniteError, match="non-finite input at token 2 of 4"):
                layer.route(x)


def test_bad_settings():
    with pytest.raises(ValueError, match="regularization must be positive, got 0"):
        GaussianRouter(D, regularization=0)
    with pytest.raises(ValueError, match="width must be positive, got -1"):
        PrototypeRouter(D, width=-1)
    for kind in KINDS.values():
        with pytest.raises(ValueError, match="must be at least 1, got 3 and 0"):
            kind(top_k=0)
        layer = layer_of(kind(top_k=5), 2)  # the pool may grow up to it
        assert layer.route(torch.zeros(1, D)).top_k == 2
        with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
            layer.route(torch.zeros(1, D), top_k=0)
        with pytest.raises(ValueError, match="top_k=3 experts cannot be chosen out of 2"):
            layer.route(torch.zeros(1, D), top_k=3)


@kinds
def test_a_copy_is_its_own(kind):
    layer = fitted(kind)
    clone = copy.deepcopy(layer)
    before = gate_state(layer)
    clone.observe(0, *data(3))
    assert_equal_states(gate_state(layer), before)
    assert not torch.equal(clone.pool.namespace("gate")["count"], layer.pool.namespace("gate")["count"])
