import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from modmoe.kernels.reference import run_reference
from modmoe.meta import FunctionMixture, TaskBatch
from modmoe.meta.evidence import BayesianExpertMixture


def by_hand(model, tasks, expert_id):
    """Slow: one expert's features by the reference kernel, prior mean, prior covariance and noise variance."""
    rows = model.pool.namespace("expert", [expert_id])
    linear = model.pool.namespace("linear", [expert_id])
    x = torch.cat([tasks.clean_context()[0], tasks.target_x], 1).flatten(0, 1)
    local = torch.zeros(len(x), dtype=torch.int64)
    phi = run_reference(model.pool.expert, {name: rows[name] for name in rows}, x, local)
    phi = phi.unflatten(0, (tasks.num_tasks, -1))
    size = phi.shape[-1]
    root = linear["prior_root"][0] + 2 * size**-0.5 * torch.eye(size, dtype=phi.dtype)
    precision = torch.linalg.inv(root @ root.T)
    return phi, linear["prior_mean"][0], precision, (2 * linear["log_noise"][0]).exp() + 1e-4


def test_two_constant_experts_by_hand():
    # zero weights make every feature 0, so expert k is N(0, s_k^2) noise: variances 1 and 4 (+ 1e-4), equal priors
    model = BayesianExpertMixture(1, num_experts=2, hidden_features=3, num_features=2)
    with torch.no_grad():
        for rows in model.pool.rows["expert"].values():
            rows.c0.zero_()
        model.pool.growable("linear", "log_noise").c0.copy_(torch.tensor([1.0, 2.0]).log())
    tasks = TaskBatch(torch.zeros(1, 1, 1), torch.full((1, 1, 1), 2.0), torch.zeros(1, 1, 1))
    predictive = model(tasks)
    # N(2; 0, 1) = exp(-2) / sqrt(2 pi), N(2; 0, 4) = exp(-1/2) / (2 sqrt(2 pi)): ratio 2 exp(-3/2) = .4463
    weight = 2 * math.exp(-1.5) / (1 + 2 * math.exp(-1.5))
    torch.testing.assert_close(predictive.assignment[0, 0, 0].item(), weight, atol=1e-4, rtol=0)
    # at y = 0 the densities are 1 / sqrt(2 pi) and half of it
    expected = (weight + (1 - weight) / 2) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(predictive.log_marginal(torch.zeros(1, 1, 1)).exp().item(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_context", [2, 3, 9])
def test_evidence_is_the_marginal_likelihood_of_the_prior(mixture_of, tasks_of, num_context):
    model, tasks = mixture_of(3, out_features=2), tasks_of(4, num_context, outputs=2)
    evidence = model.expert_evidence(tasks)
    for k, expert_id in enumerate(model.pool.ids):
        phi, mean, precision, noise = by_hand(model, tasks, expert_id)
        phi = phi[:, :num_context]
        covariance = phi @ torch.linalg.inv(precision) @ phi.mT + noise * torch.eye(num_context, dtype=phi.dtype)
        normal = MultivariateNormal(torch.zeros(4, num_context, dtype=phi.dtype), covariance)
        expected = sum(normal.log_prob(error) for error in (tasks.context_y - phi @ mean).unbind(-1))
        torch.testing.assert_close(evidence[:, k], expected, atol=1e-8, rtol=0)


def test_gradients_of_every_row(mixture_of, tasks_of):
    model, tasks = mixture_of(2, hidden_features=3, num_features=2), tasks_of(2, 3, 2, masked=True)
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in model.named_parameters()), strict=True)

    def outputs(*values):
        predictive = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (tasks,))
        return predictive.log_marginal(tasks.target_y), predictive.log_joint(tasks.target_y), predictive.log_evidence

    assert torch.autograd.gradcheck(outputs, values)


@pytest.mark.parametrize("num_context", [0, 3, 9])
def test_densities_equal_the_function_mixture(mixture_of, tasks_of, num_context):
    model, tasks = mixture_of(3, out_features=2), tasks_of(4, num_context, outputs=2, masked=True)
    predictive = model(tasks)
    functions = predictive.functions()
    assert isinstance(functions, FunctionMixture)
    torch.testing.assert_close(predictive.log_joint(tasks.target_y), functions.log_joint(tasks.target_y))
    torch.testing.assert_close(predictive.log_marginal(tasks.target_y), functions.log_marginal(tasks.target_y))
    torch.testing.assert_close(predictive.mean, functions.mean)


def test_cohorts_of_other_sizes_equal_their_reference(mixture_of, tasks_of):
    model, tasks = mixture_of(2), tasks_of(3, 3)
    model.pool.add_experts(1, hidden_features=9)
    model.freeze([1])
    features = model.view(torch.cat([tasks.context_x, tasks.target_x], 1)).features
    for k, expert_id in enumerate(model.pool.ids):
        phi, _, precision, _ = by_hand(model, tasks, expert_id)
        torch.testing.assert_close(features[k] @ features[k].mT, phi @ torch.linalg.inv(precision) @ phi.mT)


def test_one_expert_is_plain_bayesian_regression(mixture_of, tasks_of):
    model, tasks = mixture_of(1), tasks_of(2, 4, 3)
    phi, mean, precision, noise = by_hand(model, tasks, 0)
    old, new = phi[:, :4], phi[:, 4:]
    covariance = torch.linalg.inv(precision + old.mT @ old / noise)
    weights = mean + covariance @ old.mT @ (tasks.context_y - old @ mean) / noise
    predictive = model(tasks)
    torch.testing.assert_close(predictive.mean, new @ weights)
    full = new @ covariance @ new.mT + noise * torch.eye(3, dtype=phi.dtype)
    expected = MultivariateNormal((new @ weights).squeeze(2), full).log_prob(tasks.target_y.squeeze(2))
    torch.testing.assert_close(predictive.log_joint(tasks.target_y), expected)


@pytest.mark.parametrize("switch", [False, True])
def test_contexts_that_are_empty_single_repeated_or_long_have_answers(mixture_of, tasks_of, switch):
    model = mixture_of(3, torch.float32, switch=switch)
    for num_context in (0, 1, 200):
        tasks = tasks_of(2, num_context, 3, dtype=torch.float32)
        repeated = TaskBatch(torch.zeros_like(tasks.context_x), tasks.context_y, tasks.target_x, tasks.target_y)
        for batch in (tasks, repeated):
            predictive = model(batch)
            for density in (predictive.log_marginal(batch.target_y), predictive.log_joint(batch.target_y)):
                assert density.isfinite().all()
                for gradient in torch.autograd.grad(density.sum(), list(model.parameters()), retain_graph=True):
                    assert gradient.isfinite().all()
    # a context of masked points only, NaN in them, is the empty context
    nan = torch.full((2, 4, 1), torch.nan)
    masked = TaskBatch(nan, nan, tasks.target_x, None, torch.zeros(2, 4, dtype=torch.bool))
    empty = TaskBatch(nan[:, :0], nan[:, :0], tasks.target_x)
    torch.testing.assert_close(model(masked).log_joint(tasks.target_y), model(empty).log_joint(tasks.target_y))
    assert torch.equal(model(empty).expert_evidence, torch.zeros(2, 3))


@pytest.mark.parametrize("switch", [False, True])
def test_an_expert_that_explains_nothing_gets_no_weight(mixture_of, tasks_of, switch):
    model, tasks = mixture_of(3, torch.float32, switch=switch), tasks_of(2, 5, 3, dtype=torch.float32)
    # between context points: beyond them a switch may bring any expert, by its prior weight
    inside = tasks.context_x.mean(1, keepdim=True).expand(2, 3, 1)
    tasks = TaskBatch(tasks.context_x, tasks.context_y, inside, tasks.target_y)
    without = model(tasks, experts=[0, 2])
    with torch.no_grad():
        model.pool.growable("linear", "prior_mean").c0[1] = 1e25
        model.pool.growable("linear", "prior_root").c0[1].zero_()
    predictive = model(tasks)
    assert (predictive.assignment[..., 1] == 0).all()
    assert predictive.log_marginal(tasks.target_y).isfinite().all()
    if not switch:  # with it, fewer experts also make a switch more likely against none
        torch.testing.assert_close(predictive.assignment[..., [0, 2]], without.assignment)
    predictive.log_marginal(tasks.target_y).sum().backward()
    live = [p.grad[[0, 2]] for name, p in model.named_parameters() if name.startswith("pool.")]
    assert all(gradient.isfinite().all() for gradient in live)


def test_tasks_of_a_batch_do_not_meet(mixture_of, tasks_of):
    model, tasks = mixture_of(2, switch=True), tasks_of(5, 4, 3, masked=True)
    alone = torch.cat([model(tasks[i : i + 1]).log_joint(tasks.target_y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(model(tasks).log_joint(tasks.target_y), alone)


def test_bad_input(mixture_of, tasks_of):
    model = mixture_of(2)
    with pytest.raises(ValueError, match="experts have 1 outputs, context_y has 2"):
        model(tasks_of(outputs=2))
    with pytest.raises(ValueError, match=r"\(tasks, points, 1\) and dtype torch.float64 is needed, got .*float32"):
        model(tasks_of(dtype=torch.float32))
    with pytest.raises(ValueError, match=r"\(tasks, points, 1\)"):
        model(tasks_of(inputs=2))
    with pytest.raises(ValueError, match=r"got experts=\[\]"):
        model(tasks_of(), experts=[])
    with pytest.raises(ValueError, match=r"no experts with ids \[7\]"):
        model(tasks_of(), experts=[0, 7])
    with pytest.raises(ValueError, match="out_features must be at least 1"):
        BayesianExpertMixture(1, out_features=0)
    with pytest.raises(ValueError, match="every size of an expert"):
        BayesianExpertMixture(1, num_features=0)
