"""Distillation: the loss by hand, what the loop leaves alone, and a dense student of a mixture on real digits."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.testing import assert_close

from modmoe import ExpertPool, MLPExpert, MoELayer, NonFiniteError, TopKRouter
from modmoe.conversion import distill, distillation_loss, measure_load, to_dense
from modmoe.losses import load_balancing_loss


def test_the_loss_by_hand():
    # T = 1: t = (log 3, 0) says (3/4, 1/4), s = (0, 0) says (1/2, 1/2)
    # KL = 3/4 log(3/2) + 1/4 log(1/2) = 0.130812
    t, s = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation_loss(s, t, 1.0).item() == pytest.approx(expected, rel=1e-6)
    # T = 2 of twice the logits: the same distributions, times T^2 = 4
    assert distillation_loss(2 * s, 2 * t, 2.0).item() == pytest.approx(4 * expected, rel=1e-6)
    # a mean over samples, of which one is equal
    both = distillation_loss(torch.cat([s, t]).view(2, 1, 2), torch.cat([t, t]).view(2, 1, 2), 1.0)
    assert both.item() == pytest.approx(expected / 2, rel=1e-6)


def test_the_gradient():
    torch.manual_seed(0)
    s, t = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, t, 3.0), s)
    # T^2 * (softmax(s / T) - softmax(t / T)) / T / 5 samples
    (gradient,) = torch.autograd.grad(distillation_loss(s, t, 3.0), s)
    assert_close(gradient, 3.0 * ((s / 3).softmax(1) - (t / 3).softmax(1)) / 5)
    t.requires_grad_()
    assert not torch.autograd.grad(distillation_loss(s, t), t, allow_unused=True)[0]


def pair(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    return nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_a_step_is_adamw_on_the_formula(alpha):
    student, teacher = (module.double() for module in pair())
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, -100, 1])
    other = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.05)
    expected = []
    for _ in range(3):
        logits = other(x)
        p, q = (teacher[0](x).detach() / 4).softmax(1), (logits / 4).softmax(1)
        loss = 16 * (p * (p.log() - q.log())).sum(1).mean()
        counted = y >= 0
        loss = loss - alpha * logits.log_softmax(1)[counted, y[counted]].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    history = distill(student, teacher, [(x, y)], 3, lr=0.05, temperature=4.0, alpha=alpha)
    assert history == pytest.approx(expected, rel=1e-9)
    assert_close(student.weight, other.weight, atol=1e-9, rtol=1e-9)


def test_the_history_is_the_mean_over_batches():
    student, teacher = pair()
    student.requires_grad_(False)
    student.weight.requires_grad_()
    x = [torch.randn(2, 3), torch.randn(5, 3)]
    losses = [distillation_loss(student(part), teacher[0](part), 2.0).item() for part in x]
    (history,) = distill(student, teacher, x, 1, lr=0.0)  # nothing moves
    assert history == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_what_is_left_alone():
    student, teacher = pair()
    student = nn.Sequential(student, nn.Dropout(0.0))
    student.eval()
    teacher[0].eval()
    bias = student[0].bias.requires_grad_(False).clone()
    before = copy.deepcopy(teacher.state_dict())
    distill(student, teacher, [torch.randn(4, 3)], 2)
    assert not any(module.training for module in student.modules())
    assert (teacher.training, teacher[0].training, teacher[1].training) == (True, False, True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert torch.equal(student[0].bias, bias)
    with pytest.raises(ValueError, match="alpha > 0 needs batches"):
        distill(student, teacher, [torch.randn(4, 3)], 1, alpha=1.0)
    assert not any(module.training for module in student.modules())  # also after an error


def test_the_student_trains_and_the_teacher_does_not():
    class Recorder(nn.Identity):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x):
            self.seen.append((self.training, torch.is_grad_enabled()))
            return x

    mine, theirs = Recorder(), Recorder()
    student, teacher = pair()
    distill(nn.Sequential(mine, student).eval(), nn.Sequential(theirs, teacher).train(), [torch.randn(2, 3)], 2)
    assert mine.seen == [(True, True)] * 2
    assert theirs.seen == [(False, False)] * 2


def test_seeded_it_repeats_itself():
    def once():
        student, teacher = pair(3)
        return distill(nn.Sequential(student, nn.Dropout(0.3)), teacher, [torch.ones(2, 3), torch.randn(4, 3)], 4)

    assert once() == once()


def test_refusals():
    student, teacher = pair()
    x = [torch.randn(4, 3)]
    with pytest.raises(ValueError, match="epochs must be at least 1 and alpha at least 0, got 0 and 0"):
        distill(student, teacher, x, 0)
    with pytest.raises(ValueError, match="got 1 and -1"):
        distill(student, teacher, x, 1, alpha=-1)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        distill(student, teacher, x, 1, temperature=0)
    with pytest.raises(ValueError, match=r"logits of one shape are needed, got \(4, 4\) and \(4, 2\)"):
        distill(student, nn.Linear(3, 2), x, 1)
    with pytest.raises(ValueError, match="student and teacher share modules"):
        distill(nn.Sequential(teacher[0]), teacher, x, 1)
    with pytest.raises(ValueError, match="no batches in epoch 2: a list or a DataLoader is needed"):
        distill(student, teacher, iter(x), 2)
    with pytest.raises(NonFiniteError, match="the loss is nan in batch 1 of epoch 1"):
        distill(student, teacher, [torch.full((4, 3), torch.nan)], 1)
    assert torch.isfinite(student.weight).all()
    with pytest.raises(ValueError, match="nothing of the student is trainable"):
        distill(student.requires_grad_(False), teacher, x, 1)


# -- real digits -------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(64, 16)
        self.layer = MoELayer(ExpertPool(MLPExpert(16, 32), 4), TopKRouter(16, 2))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.embed(x).relu()
        return self.head(x + self.layer(x))


def digits(seed: int):
    """Training batches, and a test set of 450."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[450:], order[:450]
    return [(x[part], y[part]) for part in train.split(64)], (x[test], y[test])


def accuracy(model: nn.Module, x, y) -> float:
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).double().mean().item()


def study(seed: int, epochs: int = 8) -> dict[str, float]:
    """Test accuracies: the mixture, its two dense versions, and the average after distillation."""
    torch.manual_seed(seed)
    batches, test = digits(seed)
    moe = Classifier()
    optimizer = torch.optim.AdamW(moe.parameters(), lr=5e-3)
    for _ in range(epochs):
        for x, y in batches:
            loss = F.cross_entropy(moe(x), y)
            routing = moe.layer.routing
            loss = loss + 0.01 * load_balancing_loss(routing.probs, routing.choices)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    figures = {"moe": accuracy(moe, *test)}
    load = measure_load(moe, batches)
    for how in ("busiest", "average"):
        student = copy.deepcopy(moe)
        to_dense(student, how, load)
        figures[how] = accuracy(student, *test)
    history = distill(student, moe, batches, epochs, lr=5e-3)
    figures |= {"distilled": accuracy(student, *test), "first loss": history[0], "last loss": history[-1]}
    return figures


def test_a_dense_student_of_a_mixture_loses_at_most_two_points():
    runs = [study(seed) for seed in range(3)]
    mean = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
    assert mean["moe"] > 0.9
    assert mean["distilled"] > mean["moe"] - 0.02
    assert mean["last loss"] < 0.5 * mean["first loss"]


@pytest.mark.slow
def test_figures_over_ten_seeds():
    runs = [study(seed, epochs=30) for seed in range(10)]
    for name in runs[0]:
        values = torch.tensor([run[name] for run in runs])
        print(f"{name}: {values.mean():.4f} +- {values.std() / 10**0.5:.4f}")
    losses = torch.tensor([run["moe"] - run["distilled"] for run in runs])
    assert losses.mean() < 0.02
