"""MAML over a pool: the inner loop, the choice of experts, growth and freezing."""

import math

import pytest
import torch
from torch.func import functional_call

from modmoe import ExpertPool, MLPExpert, sync_optimizer
from modmoe.errors import NonFiniteError
from modmoe.meta import TaskBatch
from modmoe.meta.l2l import (
    MAML,
    LearnedGate,
    NearestCentroid,
    RegressionNetwork,
    RoutedMAML,
    SupportPosterior,
    balance_loss,
    balanced,
)


def model_of(num_experts=3, choice=None, seed=0, hidden=(6,), **options):
    torch.manual_seed(seed)
    return RoutedMAML(ExpertPool(RegressionNetwork(1, hidden, 1, "tanh"), num_experts), choice, **options)


def tasks(num_tasks=4, seed=0, dtype=torch.float32, num_context=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(num_tasks, num_context + 7, 1, generator=generator, dtype=torch.float64) * 2 - 1
    phase = torch.rand(num_tasks, 1, 1, generator=generator, dtype=torch.float64) * 3
    y = torch.sin(3 * x + phase)
    c = num_context
    return TaskBatch(x[:, :c], y[:, :c], x[:, c:], y[:, c:]).to(dtype)


def lines_and_waves(num_tasks, generator, num_context=5):
    """Half the tasks are y = a, half y = a sin(4 x); which is the family (B,)."""
    x = torch.rand(num_tasks, num_context + 10, 1, generator=generator) * 2 - 1
    a = torch.rand(num_tasks, 1, 1, generator=generator) + 0.5
    family = torch.arange(num_tasks) % 2
    y = torch.where(family.view(-1, 1, 1) == 0, a.expand_as(x), a * torch.sin(4 * x))
    return TaskBatch(x[:, :num_context], y[:, :num_context], x[:, num_context:], y[:, num_context:]), family


def set_rows(model, namespace, **values):
    for name, value in values.items():
        ((tensor, _),) = model.pool.growable(namespace, name).live()
        with torch.no_grad():
            tensor.copy_(value)


def test_one_step_by_hand():
    # f(x) = tanh(0 x + 0) w_out + b_out = b_out: all but b_out have the gradient 0 at w_out = 0, w_0 = 0.
    # Context y = 1 and 3, b_out = 0: L = (1 + 9) / 2 = 5, dL/db = -2 (1 + 3) / 2 = -4, rate 0.25: b' = 1.
    # L' = (0 + 4) / 2 = 2; the second expert starts at b_out = 2: L = 1, dL/db = 0, b' = 2, L' = 1.
    # Posterior with n = 2 and s = 1: ln w = -n L' / 2 = -2 and -1, w_2 = 1 / (1 + e^-1) = 0.731; mean 1 w_1 + 2 w_2.
    model = model_of(2, SupportPosterior(noise_std=1.0), hidden=(1,), steps=1, inner_rate=0.25)
    zeros = dict.fromkeys(("w_0", "b_0", "w_out"), 0.0)
    set_rows(model, "expert", **{n: torch.tensor(v) for n, v in zeros.items()}, b_out=torch.tensor([[0.0], [2.0]]))
    batch = TaskBatch(torch.zeros(1, 2, 1), torch.tensor([[[1.0], [3.0]]]), torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    adapted = model.adapt(batch)
    assert adapted.losses.flatten().tolist() == pytest.approx([2, 1])
    assert adapted.outputs.flatten().tolist() == pytest.approx([1, 2])
    second = 1 / (1 + math.exp(-1))
    assert model(batch).mean.item() == pytest.approx((1 - second) + 2 * second, rel=1e-5)
    # loss: (mean - 1)^2 = second^2
    assert model.loss(batch).item() == pytest.approx(second**2, rel=1e-5)


def test_gradcheck_of_the_second_order_loss():
    model, batch = model_of(2, steps=2).double(), tasks(2, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]

    def loss(*values):
        # the pool's tensors are swapped for those that are checked
        for name, value in zip(names, values, strict=True):
            path, _, key = name.rpartition(".")
            model.get_submodule(path)._parameters[key] = value
        return model.loss(batch)

    values = tuple(parameter.detach().clone().requires_grad_() for parameter in model.parameters())
    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("second_order", [True, False])
def test_equals_maml_task_by_task(second_order):
    """One expert is plain MAML: the batched inner loop against learn2learn's wrapper on one task after the other."""
    model = model_of(1, steps=3, inner_rate=0.1, second_order=second_order).double()
    batch = tasks(3, dtype=torch.float64)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            rows = model.pool.namespace("expert")
            for name in rows:
                setattr(self, name, torch.nn.Parameter(rows[name][0].detach().clone()))

        def forward(self, x):
            return torch.tanh(x @ self.w_0 + self.b_0) @ self.w_out + self.b_out

    net = Net()
    wrapper = MAML(net, 0.1, first_order=not second_order)
    means, total = [], torch.zeros((), dtype=torch.float64)
    for task in range(3):
        clone = wrapper.clone()
        for _ in range(3):
            clone.adapt((clone(batch.context_x[task]) - batch.context_y[task]).square().mean())
        means.append(clone(batch.target_x[task]))
        total = total + (means[-1] - batch.target_y[task]).square().mean() / 3
    torch.testing.assert_close(model(batch).mean, torch.stack(means))
    loss = model.loss(batch)
    torch.testing.assert_close(loss, total)
    loss.backward()
    total.backward()
    for name in ("w_0", "b_0", "w_out", "b_out"):
        ((tensor, _),) = model.pool.growable("expert", name).live()
        torch.testing.assert_close(tensor.grad[0], getattr(net, name).grad)
    unchanged = functional_call(net, dict(net.named_parameters()), (batch.target_x[0],))
    assert not torch.equal(unchanged, means[0])


def test_without_gradients_it_answers_the_same():
    model, batch = model_of(), tasks()
    with_graph = model(batch)
    with torch.no_grad():
        without = model(batch)
    assert not without.means.requires_grad
    torch.testing.assert_close(without.mean, with_graph.mean)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_any_linear_expert_serves_and_seeded_runs_are_equal():
    def run():
        torch.manual_seed(5)
        model = RoutedMAML(ExpertPool(MLPExpert(1, 4, 1), 2), steps=2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for seed in range(3):
            optimizer.zero_grad()
            model.loss(tasks(seed=seed)).backward()
            optimizer.step()
        return model(tasks()).mean

    assert torch.equal(run(), run())


CHOICES = {
    "posterior": lambda: SupportPosterior(),
    "hard": lambda: SupportPosterior(hard=True),
    "centroid": lambda: NearestCentroid(1),
    "gate": lambda: LearnedGate(1),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_grows_freezes_saves_and_loads(choice):
    model, batch = model_of(2, CHOICES[choice](), steps=2), tasks()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

    def step():
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()

    step()
    survivors = model.adapt(batch)
    model.pool.add_experts(1)
    grown = model.adapt(batch)
    assert torch.equal(grown.outputs[:, :2], survivors.outputs)  # growth leaves the others' adaptation alone
    model.pool.freeze([0, 1])
    sync_optimizer(optimizer, model)
    state = {name: rows.clone() for name, rows in model.pool.expert_state(0).items()}
    scores = model.choice.scores(batch, grown.losses, model.pool.namespace("choice"))[:, :2]
    for _ in range(2):
        step()
    frozen = model.adapt(batch)
    assert torch.equal(frozen.outputs[:, :2], grown.outputs[:, :2].detach())
    assert torch.equal(model.choice.scores(batch, frozen.losses, model.pool.namespace("choice"))[:, :2], scores)
    assert all(torch.equal(rows, state[name]) for name, rows in model.pool.expert_state(0).items())
    assert not torch.equal(frozen.outputs[:, 2], grown.outputs[:, 2])
    twin = model_of(1, CHOICES[choice](), seed=9, steps=2)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(batch).mean, model(batch).mean, rtol=0, atol=0)


def test_hard_choice_is_the_expert_of_the_smallest_support_loss():
    model, batch = model_of(3, SupportPosterior(hard=True)), tasks()
    adapted = model.adapt(batch)
    best = adapted.losses.argmin(1)
    assert torch.equal(model(batch).mean, adapted.outputs[torch.arange(4), best])


def test_oracle_by_task_and_by_point():
    model, batch = model_of(3), tasks()
    adapted = model.adapt(batch)
    families = torch.tensor([2, 0, 1, 1])
    assert torch.equal(model(batch, families).mean, adapted.outputs[torch.arange(4), families])
    # all points of one family: as by task
    by_point = families[:, None].expand(4, 5), families[:, None].expand(4, 7)
    torch.testing.assert_close(model(batch, by_point).mean, model(batch, families).mean)
    # targets of another family than the context: an expert that saw no points answers unadapted
    other = model(batch, (families[:, None].expand(4, 5), torch.zeros(4, 7, dtype=torch.int64))).mean
    bare = TaskBatch(batch.context_x[:, :0], batch.context_y[:, :0], batch.target_x)
    torch.testing.assert_close(other[0], model.adapt(bare).outputs[0, 0])


def test_masked_points_do_not_count_and_no_context_gives_the_prior():
    model, batch = model_of(2, SupportPosterior()), tasks()
    set_rows(model, "choice", log_prior=torch.tensor([0.0, math.log(3.0)]))
    x, y = batch.context_x.clone(), batch.context_y.clone()
    x[:, 3:], y[:, 3:] = math.nan, math.nan
    mask = torch.arange(5).expand(4, 5) < 3
    cut = TaskBatch(x[:, :3], y[:, :3], batch.target_x)
    masked = TaskBatch(x, y, batch.target_x, context_mask=mask)
    torch.testing.assert_close(model(masked).mean, model(cut).mean)
    nothing = TaskBatch(x[:, :0], y[:, :0], batch.target_x)
    assert model(nothing).log_weights.exp()[0].tolist() == pytest.approx([0.25, 0.75])


def test_duplicate_and_single_points_and_larger_contexts_are_answered():
    model, batch = model_of(2), tasks(num_context=1)
    assert model(batch).mean.isfinite().all()
    twice = TaskBatch(batch.context_x.repeat(1, 40, 1), batch.context_y.repeat(1, 40, 1), batch.target_x)
    assert model(twice).mean.isfinite().all()


def test_balance_by_hand():
    # usage (0.9, 0.1): -(ln 1.8 + ln 0.2) / 2 = -(0.5878 - 1.6094) / 2 = 0.5108
    weights = torch.tensor([[1.0, 0.0], [0.8, 0.2]])
    assert balance_loss(weights.log()).item() == pytest.approx(0.5108, abs=1e-4)
    assert balance_loss(torch.full((3, 4), 0.25).log()).item() == pytest.approx(0, abs=1e-6)
    # shares (0.9, 0.1) half of the way to (0.5, 0.5) are (0.7, 0.3)
    soft = torch.tensor([[0.95, 0.05], [0.85, 0.15]]).log()
    assert balanced(soft, 0.5).mean(0).tolist() == pytest.approx([0.7, 0.3], abs=1e-4)
    assert balanced(soft, 0.0).mean(0).tolist() == pytest.approx([0.9, 0.1], abs=1e-6)


def usage_after_training(balance, choice):
    model = model_of(2, choice, hidden=(8,), steps=2, inner_rate=0.02, balance=balance)
    with torch.no_grad():  # the second expert starts out far from every task
        ((bias, rows),) = model.pool.growable("expert", "b_out").live()
        bias[rows[1].owner] += 4.0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        batch, _ = lines_and_waves(16, generator)
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return model(lines_and_waves(64, generator)[0]).log_weights.exp().mean(0).min().item()


@pytest.mark.parametrize(
    ("choice", "balance"), [(lambda: SupportPosterior(), 0.5), (lambda: SupportPosterior(hard=True), 1.0)]
)
def test_balance_prevents_a_collapse(choice, balance):
    assert usage_after_training(0.0, choice()) < 0.02
    assert usage_after_training(balance, choice()) > 0.2


def test_centroids_find_the_families():
    """K-means on least-squares fits: after training, tasks of one family share a centroid."""
    model = model_of(2, NearestCentroid(1, momentum=0.3), steps=1, balance=1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        batch, _ = lines_and_waves(32, generator, num_context=8)
        model.loss(batch)
    batch, family = lines_and_waves(64, generator, num_context=8)
    chosen = model(batch).log_weights.argmax(1)
    assert max((chosen == family).double().mean().item(), (chosen != family).double().mean().item()) > 0.9


def test_centroid_embedding_equals_ridge_regression():
    choice, batch = NearestCentroid(1, num_centres=4), tasks(2, dtype=torch.float64)
    phi, centres = choice.features(batch.context_x), choice.features(choice.centres.double().unsqueeze(0))
    gram = phi.transpose(1, 2) @ phi + choice.ridge * torch.eye(4, dtype=torch.float64)
    want = centres @ torch.linalg.solve(gram, phi.transpose(1, 2) @ batch.context_y)
    torch.testing.assert_close(choice.embed(batch), want.flatten(1))


def test_evaluation_moves_no_centroid():
    model = model_of(2, NearestCentroid(1)).eval()
    before = model.pool.expert_state(0)["choice.centroid"]
    model.loss(tasks())
    assert torch.equal(model.pool.expert_state(0)["choice.centroid"], before)
    model.train().loss(tasks())
    assert any(not torch.equal(model.pool.expert_state(e)["choice.centroid"], before) for e in (0,)) or not torch.equal(
        model.pool.expert_state(1)["choice.centroid"], before
    )


def test_learns_tasks_of_two_families():
    model = model_of(2, hidden=(16,), steps=3, inner_rate=0.1, balance=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    test, _ = lines_and_waves(64, torch.Generator().manual_seed(1))

    def error():
        with torch.no_grad():
            return (model(test).mean - test.target_y).square().mean().item()

    untrained = error()
    for _ in range(100):
        optimizer.zero_grad()
        model.loss(lines_and_waves(16, generator)[0]).backward()
        optimizer.step()
    assert error() < min(0.1, 0.3 * untrained)


def test_cost_of_a_step():
    # forward products of one expert with H = 6: 2 * 6 and 6 * 1, so 2 * 12 flops a point; 2 tasks of 5 context points
    model, batch = model_of(1, steps=1), tasks(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost, double = model.step_cost(batch, repeats=1), model_of(2, steps=1).step_cost(batch, repeats=1)
    assert cost.seconds > 0
    assert cost.flops >= 24 * 10 * 2
    assert 2 * cost.flops <= double.flops < 2.1 * cost.flops  # the mixture itself is a small product, too
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_input():
    with pytest.raises(ValueError, match="steps >= 1"):
        model_of(steps=0)
    with pytest.raises(ValueError, match="balance in"):
        model_of(balance=2.0)
    with pytest.raises(ValueError, match="noise_std must be above 0"):
        SupportPosterior(noise_std=0)
    with pytest.raises(ValueError, match="momentum in"):
        NearestCentroid(1, momentum=0)
    with pytest.raises(ValueError, match="at least one hidden layer"):
        RegressionNetwork(1, ())
    with pytest.raises(ValueError, match="spread"):
        RegressionNetwork(1, spread=0)
    model, batch = model_of(2), tasks()
    with pytest.raises(ValueError, match="families of shapes"):
        model(batch, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"positions of experts, in \[0, 2\)"):
        model(batch, torch.full((4,), 2))
    with pytest.raises(ValueError, match="training needs target_y"):
        model.loss(TaskBatch(batch.context_x, batch.context_y, batch.target_x))
    with pytest.raises(NonFiniteError, match="inner loop diverged"):
        model_of(2, inner_rate=1e12, steps=8)(batch)
