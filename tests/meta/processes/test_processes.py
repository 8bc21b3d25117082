"""What every kind of neural process holds to, and what the models learn."""

import copy
import dataclasses
import pickle

import pytest
import torch

from modmoe.meta.predictive import PointMixture
from modmoe.meta.processes import CNP, NP, ClassMixture, LatentProcess, MoENeuralProcess
from modmoe.meta.task_batch import TaskBatch

KINDS = ["cnp", "mdn_cnp", "np", "attentive_np", "moe_np"]
OBJECTIVES = [
    *((kind, "exact") for kind in KINDS),
    *((kind, "elbo") for kind in ("np", "attentive_np", "moe_np")),
    ("moe_np", "gumbel"),
]


def log_densities(model, batch, generator) -> torch.Tensor:
    return model(batch, num_samples=4, generator=generator).log_marginal(batch.target_y)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_answer_s_own_density(kind, model_of, tasks_of, seeded):
    model, batch = model_of(kind), tasks_of(num_tasks=1)  # of one task: draws are not shared in training
    answer = model(batch, num_samples=4, generator=seeded())
    expected = -answer.log_joint(batch.target_y).mean() / 5
    torch.testing.assert_close(model.loss(batch, "exact", num_samples=4, generator=seeded()), expected)


def test_cnp_equals_its_equations(model_of, tasks_of):
    # Garnelo et al.: r = mean_i h(x_i, y_i), then (mean, spread) = g(x, r); the size of the context goes in beside r
    model, batch = model_of("cnp"), tasks_of(num_tasks=1)
    features = [model.encoder(batch.context_x[0, i], batch.context_y[0, i]) for i in range(6)]
    code = torch.cat([torch.stack(features).mean(0), torch.tensor([7**-0.5])])
    decoder = model.decoder
    for n in range(5):
        hidden = (decoder.from_code(code) + decoder.from_x(batch.target_x[0, n])).relu()
        mean, spread = decoder.out(decoder.middle(hidden).relu())
        answer = model(batch)
        torch.testing.assert_close(answer.means[0, 0, n, 0, 0], mean)
        torch.testing.assert_close(answer.stds[0, 0, n, 0, 0], 0.03 + torch.nn.functional.softplus(spread))


def test_elbo_is_torch_s(model_of, tasks_of, seeded):
    model, batch = model_of("np"), tasks_of()
    context = model.read(batch)
    everything = model.read_with_targets(context, batch, batch.target_y)
    prior, posterior = model.latent(context), model.latent(everything)
    z = posterior.draw(3, seeded(), shared=False)
    normals = [torch.distributions.Normal(*latent) for latent in (posterior, prior)]
    kl = torch.distributions.kl_divergence(*normals).sum((0, 2))
    raw = model.decode(z, context, batch.target_x).raw
    expected = (model.likelihood.log_prob(raw, batch.target_y).sum((2, 3)).mean(1) - kl).mean() / 5
    torch.testing.assert_close(model.loss(batch, "elbo", num_samples=3, generator=seeded()), -expected)


@pytest.mark.parametrize(("kind", "objective"), OBJECTIVES)
def test_gradients(kind, objective, model_of, tasks_of, seeded):
    model = Loss(model_of(kind, in_features=2).double())
    batch = tasks_of(num_tasks=2, num_context=3, num_targets=2, inputs=2, dtype=torch.float64)
    named = dict(model.named_parameters())
    sizes = [parameter.numel() for parameter in named.values()]

    def loss(context_y, target_y, values):
        changed = dataclasses.replace(batch, context_y=context_y, target_y=target_y)
        pieces = zip(named.items(), values.split(sizes), strict=True)
        parameters = {name: piece.view_as(parameter) for (name, parameter), piece in pieces}
        return torch.func.functional_call(model, parameters, (changed, objective, 2, seeded()))

    values = torch.nn.utils.parameters_to_vector(named.values()).detach().requires_grad_()
    inputs = [batch.context_y.requires_grad_(), batch.target_y.requires_grad_(), values]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


class Loss(torch.nn.Module):
    """The loss as a forward, which is what functional_call calls."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *arguments):
        return self.model.loss(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_order_and_padding_of_the_context_change_nothing(kind, model_of, tasks_of, seeded):
    model, batch = model_of(kind, in_features=2, out_features=2), tasks_of(inputs=2, outputs=2)
    expected = log_densities(model, batch, seeded())
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = dataclasses.replace(batch, context_x=batch.context_x[:, order], context_y=batch.context_y[:, order])
    torch.testing.assert_close(log_densities(model, shuffled, seeded()), expected, atol=1e-5, rtol=0)
    nowhere = torch.full((4, 3, 2), torch.nan)
    padded = TaskBatch(
        torch.cat([nowhere, batch.context_x], 1),
        torch.cat([nowhere, batch.context_y], 1),
        batch.target_x,
        batch.target_y,
        torch.tensor([False] * 3 + [True] * 6).expand(4, -1),
    )
    torch.testing.assert_close(log_densities(model, padded, seeded()), expected, atol=1e-5, rtol=0)
    model.loss(padded, generator=seeded()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_does_not_depend_on_the_rest_of_the_batch(kind, model_of, tasks_of, seeded):
    model, batch = model_of(kind), tasks_of(num_tasks=7)
    together = log_densities(model, batch, seeded())
    for task in range(7):
        alone = log_densities(model, batch[task : task + 1], seeded())
        torch.testing.assert_close(together[task : task + 1], alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_context_is_the_prior(kind, model_of, tasks_of, seeded):
    model, batch = model_of(kind), tasks_of()
    empty = tasks_of(num_context=0)
    empty = dataclasses.replace(empty, target_x=batch.target_x, target_y=batch.target_y)
    expected = log_densities(model, empty, seeded())
    assert expected.isfinite().all()
    masked = dataclasses.replace(batch, context_mask=torch.zeros(4, 6, dtype=torch.bool))
    torch.testing.assert_close(log_densities(model, masked, seeded()), expected)
    assert (log_densities(model, batch, seeded()) - expected).abs().min() > 0  # a context says something
    if isinstance(model, LatentProcess):  # all tasks have the same z
        latent = model.latent(model.read(empty))
        torch.testing.assert_close(latent.mean, latent.mean[:, :1].expand_as(latent.mean))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["one point", "equal x", "a large context", "far away"])
def test_unusual_contexts_have_finite_answers(kind, case, model_of, tasks_of, seeded):
    batch = tasks_of(num_context={"one point": 1, "a large context": 5000}.get(case, 6))
    if case == "equal x":
        batch = dataclasses.replace(batch, context_x=batch.context_x[:, :1].expand(-1, 6, -1))
    if case == "far away":
        batch = dataclasses.replace(batch, context_x=100 * batch.context_x, context_y=100 * batch.context_y)
    model = model_of(kind)
    answer = model(batch, num_samples=4, generator=seeded())
    assert answer.mean.shape == (4, 5, 1)
    assert answer.mean.isfinite().all()
    assert answer.log_joint(batch.target_y).isfinite().all()
    assert (answer.stds > 0).all()
    for objective in model.objectives:
        loss = model.loss(batch, objective)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", ["np", "attentive_np", "moe_np"])
def test_answers_in_blocks_equal_those_at_once(kind, model_of, tasks_of, seeded, monkeypatch):
    model, batch = model_of(kind), tasks_of(num_tasks=7)
    expected = log_densities(model, batch, seeded())  # with gradients: at once
    counts = []
    decode = model.decode
    monkeypatch.setattr(
        model, "decode", lambda z, *rest, **choice: counts.append(z.shape[2]) or decode(z, *rest, **choice)
    )
    monkeypatch.setattr("modmoe.meta.processes.latent.CPU_BLOCK", 3 * 3 * 4 * 5 * 10)  # three tasks of 3 experts
    with torch.no_grad():
        torch.testing.assert_close(log_densities(model, batch, seeded()), expected, atol=1e-6, rtol=1e-6)
    assert counts == ([3, 3, 1] if kind == "moe_np" else [7])  # one latent: nine tasks fit


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_the_generator(kind, model_of, tasks_of, seeded):
    model, batch = model_of(kind), tasks_of()
    first, again, other = (log_densities(model, batch, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first, other) != isinstance(model, LatentProcess)
    losses = [model.loss(batch, generator=seeded(seed)) for seed in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert (losses[0] == losses[2]) != isinstance(model, LatentProcess)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_saved_models_answer_alike(kind, model_of, tasks_of, seeded):
    model, batch = model_of(kind), tasks_of()
    expected = log_densities(model, batch, seeded())
    loaded = model_of(kind, seed=1)
    assert not torch.equal(log_densities(loaded, batch, seeded()), expected)
    loaded.load_state_dict(model.state_dict())
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(log_densities(other, batch, seeded()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_classes(kind, model_of, tasks_of, seeded):
    colours = tasks_of(inputs=2, outputs=3)
    answer = model_of(kind, in_features=2, out_features=3)(colours, num_samples=4)
    assert isinstance(answer, PointMixture)
    assert answer.means.shape[-1] == 3
    labels = tasks_of(inputs=7, num_classes=4)
    model = model_of(kind, in_features=7, num_classes=4)
    answer = model(labels, num_samples=4, generator=seeded())
    assert isinstance(answer, ClassMixture)
    torch.testing.assert_close(answer.mean.sum(2), torch.ones(4, 5))
    chances = torch.stack([answer.log_marginal(one.expand(4, 5, 4)) for one in torch.eye(4)], 2).exp()
    torch.testing.assert_close(chances, answer.mean)
    assert model.loss(labels).isfinite()


def test_classes_of_new_tasks_are_learned(seeded):
    # two classes on a line, with labels that change from task to task: the context alone says which side is which
    torch.manual_seed(0)
    for model in (CNP(1, hidden_features=32, num_classes=2), MoENeuralProcess(1, 1, 2, 32, 8, num_classes=2)):
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for step in range(151):
            x = torch.rand(32, 14, 1) * 2 - 1
            flip = torch.rand(32, 1, 1) < 0.5
            y = torch.cat([(x > 0) ^ flip, (x <= 0) ^ flip], 2).float()
            batch = TaskBatch(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:])
            if step < 150:
                optimizer.zero_grad()
                model.loss(batch, num_samples=2).backward()
                optimizer.step()
        right = model(batch, generator=seeded()).mean.argmax(2) == y[:, 4:].argmax(2)
        assert right.float().mean() > 0.9  # chance is .5


@pytest.mark.parametrize("objective", ["exact", "elbo", "gumbel"])
def test_lines_are_learned(objective, seeded):
    # y = a x with a in [-3, 3] and x in [-1, 1]: a constant prediction has an MSE of E[a^2] E[x^2] = 3 * 1/3 = 1
    torch.manual_seed(0)
    model = MoENeuralProcess(1, num_experts=2, hidden_features=32, code_features=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(101):
        x = torch.rand(32, 13, 1) * 2 - 1
        y = (torch.rand(32, 1, 1) * 6 - 3) * x
        batch = TaskBatch(x[:, :3], y[:, :3], x[:, 3:], y[:, 3:])
        if step < 100:
            optimizer.zero_grad()
            model.loss(batch, objective, num_samples=1).backward()
            optimizer.step()
    assert (model(batch, generator=seeded()).mean - y[:, 3:]).square().mean() < 0.15


def test_bad_input(model_of, tasks_of):
    model, batch = model_of("np"), tasks_of()
    with pytest.raises(ValueError, match="points of 1 inputs are needed, got 2"):
        model(tasks_of(inputs=2))
    with pytest.raises(ValueError, match="context_y needs 1 outputs at each point, got 3"):
        model(tasks_of(outputs=3))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        model(batch, num_samples=0)
    with pytest.raises(ValueError, match="unknown objective 'gumbel', NP has \\('exact', 'elbo'\\)"):
        model.loss(batch, "gumbel")
    with pytest.raises(ValueError, match="a loss needs tasks with target points"):
        model.loss(dataclasses.replace(batch, target_y=None))
    with pytest.raises(ValueError, match="a loss needs tasks with target points"):
        model.loss(tasks_of(num_targets=0))
    labels = model_of("moe_np", in_features=1, num_classes=2)
    with pytest.raises(ValueError, match="context_y needs one-hot vectors of 2 classes"):
        labels(tasks_of(outputs=2))
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        CNP(1, num_classes=1)
    with pytest.raises(ValueError, match="leave out_features out"):
        CNP(1, 2, num_classes=3)
    with pytest.raises(ValueError, match="at least 1, got 0 and 1"):
        NP(0)
    with pytest.raises(ValueError, match="num_components must be at least 1"):
        model_of("mdn_cnp").__class__(1, num_components=0)
