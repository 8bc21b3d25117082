import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from modmoe.meta import TaskBatch
from modmoe.meta.evidence import BayesianExpertMixture, SwitchMixture


def enumerate_evidence(model, x, y):
    """ln p(y | x) of one task by listing gaps and experts: x (P,), y (P, M)."""
    order = x.argsort()
    x, y = x[order], y[order]
    view = model.view(x.reshape(1, -1, 1))
    prior = model.breakpoints

    def side(index):
        total = 0.0
        for k in range(len(view.log_prior)):
            a, error = view.features[k, 0, index], y[index] - view.offset[k, 0, index]
            density = 1.0
            if len(x[index]):
                covariance = a @ a.T + view.noise[k] * torch.eye(len(a), dtype=a.dtype)
                normal = MultivariateNormal(torch.zeros_like(x[index]), covariance)
                density = sum(normal.log_prob(column) for column in error.T).exp()
            total = total + view.log_prior[k].exp() * density
        return total

    rho = torch.sigmoid(prior.switch_logit)
    normal = Normal(prior.location, prior.log_scale.exp())
    edges = [torch.zeros(()).double(), *(normal.cdf(value) for value in x), torch.ones(()).double()]
    total = (1 - rho) * side(slice(None))
    for gap in range(len(x) + 1):
        total = total + rho * (edges[gap + 1] - edges[gap]) * side(slice(0, gap)) * side(slice(gap, None))
    return total.log()


def test_a_target_without_context_by_hand(mixture_of):
    # no context: a target at x is left or right of t, but each side gives it its prior: the breakpoint cancels
    model = mixture_of(2, switch=True)
    none = TaskBatch(*(torch.zeros(1, 0, 1, dtype=torch.float64),) * 2, torch.tensor([[[0.3]]]).double())
    predictive = model(none)
    view = model.view(none.target_x)
    y = torch.tensor(0.7).double()
    expected = sum(
        view.log_prior[k].exp()
        * Normal(view.offset[k].squeeze(), (view.features[k].square().sum() + view.noise[k]).sqrt()).log_prob(y).exp()
        for k in range(2)
    )
    torch.testing.assert_close(predictive.log_marginal(y.reshape(1, 1, 1)).exp().squeeze(), expected)
    assert predictive.log_evidence.abs().item() < 1e-12


@pytest.mark.parametrize("outputs", [1, 2])
def test_densities_equal_the_enumeration(mixture_of, tasks_of, outputs):
    model = mixture_of(3, switch=True, out_features=outputs)
    tasks = tasks_of(3, 4, 3, outputs=outputs)
    predictive = model(tasks)
    joint, marginal = predictive.log_joint(tasks.target_y), predictive.log_marginal(tasks.target_y)
    for b in range(3):
        x, y = tasks.context_x[b, :, 0], tasks.context_y[b]
        evidence = enumerate_evidence(model, x, y)
        torch.testing.assert_close(predictive.log_evidence[b], evidence, atol=1e-8, rtol=0)
        new_x, new_y = tasks.target_x[b, :, 0], tasks.target_y[b]
        both = enumerate_evidence(model, torch.cat([x, new_x]), torch.cat([y, new_y]))
        torch.testing.assert_close(joint[b], both - evidence, atol=1e-8, rtol=0)
        for n in range(3):
            one = enumerate_evidence(model, torch.cat([x, new_x[n : n + 1]]), torch.cat([y, new_y[n : n + 1]]))
            torch.testing.assert_close(marginal[b, n], one - evidence, atol=1e-8, rtol=0)


def test_weights_add_up_and_the_mean_is_that_of_the_density(mixture_of, tasks_of):
    predictive = mixture_of(2, switch=True)(tasks_of(2, 4, 3))
    torch.testing.assert_close(predictive.assignment.sum(2), torch.ones(2, 3, dtype=torch.float64))
    grid = torch.linspace(-30, 30, 601, dtype=torch.float64)
    density = torch.stack([predictive.log_marginal(y.expand(2, 3, 1)).exp() for y in grid], 2)
    step = grid[1] - grid[0]
    torch.testing.assert_close(density.sum(2) * step, torch.ones(2, 3, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close((density * grid).sum(2) * step, predictive.mean.squeeze(2), atol=1e-5, rtol=0)
    inside = (predictive.assignment.mT.unsqueeze(3) * predictive.means).sum(1)
    torch.testing.assert_close(inside, predictive.mean)


def test_further_targets_do_not_change_what_is_said_of_a_point(mixture_of, tasks_of):
    model, tasks = mixture_of(2, switch=True), tasks_of(2, 5, 6)
    fewer = TaskBatch(tasks.context_x, tasks.context_y, tasks.target_x[:, :2])
    torch.testing.assert_close(
        model(fewer).log_marginal(tasks.target_y[:, :2]), model(tasks).log_marginal(tasks.target_y)[:, :2]
    )


def test_gradients_also_with_masked_and_equal_points(mixture_of, tasks_of):
    model = mixture_of(2, switch=True)
    tasks = tasks_of(2, 4, 2)
    x = tasks.context_x.clone()
    x[0, 1] = x[0, 0]
    mask = torch.tensor([[True, True, True, False], [False, False, False, False]])

    def outputs(context_y, *shared):
        values = {f"breakpoints.{name}": value for name, value in zip(names, shared, strict=True)}
        batch = TaskBatch(x, context_y, tasks.target_x, None, mask)
        predictive = torch.func.functional_call(model, values, (batch,))
        return predictive.log_marginal(tasks.target_y), predictive.log_joint(tasks.target_y)

    names = [name for name, _ in model.breakpoints.named_parameters()]
    shared = [p.detach().clone().requires_grad_() for p in model.breakpoints.parameters()]
    assert torch.autograd.gradcheck(outputs, (tasks.context_y.requires_grad_(), *shared))


def test_without_breakpoints_it_is_the_plain_mixture(mixture_of, tasks_of):
    model, tasks = mixture_of(3, switch=True), tasks_of(4, 6, 5, masked=True)
    with torch.no_grad():
        model.breakpoints.switch_logit.fill_(-60.0)
    switched = model(tasks)
    assert isinstance(switched, SwitchMixture)
    model.breakpoints = None
    plain = model(tasks)
    for name in ("log_marginal", "log_joint"):
        torch.testing.assert_close(getattr(switched, name)(tasks.target_y), getattr(plain, name)(tasks.target_y))
    for name in ("mean", "assignment", "log_evidence", "expert_evidence"):
        torch.testing.assert_close(getattr(switched, name), getattr(plain, name))


def test_the_place_of_a_switch_is_found():
    # two experts that are certain constants, -1 and 1, with noise .1; left of 0 the context says -1, right of it 1
    torch.manual_seed(0)
    model = BayesianExpertMixture(1, 1, 2, 4, 3, switch=True)
    with torch.no_grad():
        for rows in model.pool.rows["expert"].values():
            rows.c0.zero_()
        model.pool.growable("expert", "b_out").c0[:, 0] = torch.atanh(torch.tensor(0.5))
        mean, root = model.pool.growable("linear", "prior_mean").c0, model.pool.growable("linear", "prior_root").c0
        mean.zero_()
        mean[:, 0, 0] = torch.tensor([-2.0, 2.0])  # times the feature's 0.5
        root.copy_(-2 * 3**-0.5 * torch.eye(3))  # a prior without any spread
        model.pool.growable("linear", "log_noise").c0.fill_(math.log(0.1))
    x = torch.tensor([-0.9, -0.5, -0.2, 0.2, 0.5, 0.9]).reshape(1, 6, 1)
    tasks = TaskBatch(x, x.sign(), torch.tensor([-0.4, 0.0, 0.4]).reshape(1, 3, 1))
    assignment = model(tasks).assignment[0]
    assert assignment[0, 0] > 0.999
    assert assignment[2, 1] > 0.999
    torch.testing.assert_close(assignment[1], torch.tensor([0.5, 0.5]), atol=1e-3, rtol=0)  # in the middle of the gap
    torch.testing.assert_close(model(tasks).mean[0, :, 0], torch.tensor([-1.0, 0.0, 1.0]), atol=1e-2, rtol=0)


def test_bad_input():
    with pytest.raises(ValueError, match="needs in_features=1, got 2"):
        BayesianExpertMixture(2, switch=True)
