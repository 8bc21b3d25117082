import math

import pytest
import torch
import torch.nn.functional as F

from modmoe.meta import TaskBatch
from modmoe.meta.evidence import BayesianExpertClassifier, prediction_loss


def labelled(num_tasks, ways, shots, queries, dtype=torch.float64, seed=0):
    """Blobs: classes of a task are points in the plane, samples scatter around them."""
    g = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(num_tasks, 1, ways, 2, generator=g)
    x = centres + 0.3 * torch.randn(num_tasks, shots + queries, ways, 2, generator=g)
    y = torch.eye(ways).expand(num_tasks, shots + queries, ways, ways)
    parts = [part.flatten(1, 2).to(dtype) for v in (x, y) for part in v.split([shots, queries], 1)]
    return TaskBatch(parts[0], parts[2], parts[1], parts[3])


def test_one_label_by_hand():
    # two classes, a = 1: alpha = (2, 1), v = (ln 3/2, ln 2), means ln 2 - v/2 and -v/2, then centred
    model = BayesianExpertClassifier(1, hidden_features=3, num_features=1, concentration=1.0)
    with torch.no_grad():
        for rows in model.pool.rows["expert"].values():
            rows.c0.zero_()
        model.pool.growable("expert", "b_out").c0.fill_(20.0)  # the feature is tanh(20) = 1
        model.pool.growable("linear", "prior_root").c0.fill_(-1.0)  # 2 - 1: the weight is N(0, 1)
        model.pool.growable("linear", "prior_mean").c0.zero_()
        model.pool.growable("linear", "log_noise").c0.fill_(-20.0)  # leaves the floor of 1e-4
    one = torch.ones(1, 1, 1)
    tasks = TaskBatch(one, torch.tensor([[[1.0, 0.0]]]), one, torch.tensor([[[1.0, 0.0]]]))
    v = [math.log(1.5) + 1e-4, math.log(2) + 1e-4]
    difference = (math.log(2) - math.log(1.5) / 2 + math.log(2) / 2) / 2  # of the centred means: +-difference
    mean = [difference / (1 + v[0]), -difference / (1 + v[1])]
    variance = [v[0] / (1 + v[0]), v[1] / (1 + v[1])]
    logits = [m / math.sqrt(1 + math.pi / 8 * s) for m, s in zip(mean, variance, strict=True)]
    expected = 1 / (1 + math.exp(logits[1] - logits[0]))
    predictive = model(tasks)
    torch.testing.assert_close(predictive.mean[0, 0, 0].item(), expected)
    # the evidence: both centred means are N(0, 1 + v)
    evidence = sum(-0.5 * (difference**2 / (1 + s) + math.log(2 * math.pi * (1 + s))) for s in v)
    torch.testing.assert_close(predictive.log_evidence.item(), evidence)


def test_gradients():
    torch.manual_seed(0)
    model = BayesianExpertClassifier(2, 2, 3, 2).double()
    tasks = labelled(2, 3, 1, 1)
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in model.named_parameters()), strict=True)

    def outputs(*values):
        predictive = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (tasks,))
        return predictive.log_joint(tasks.target_y), predictive.log_marginal(tasks.target_y), predictive.log_evidence

    assert torch.autograd.gradcheck(outputs, values)


def test_probabilities_add_up_and_classes_are_exchangeable():
    torch.manual_seed(0)
    model, tasks = BayesianExpertClassifier(2, 3).double(), labelled(4, 5, 2, 3)
    predictive = model(tasks)
    torch.testing.assert_close(predictive.mean.sum(2), torch.ones(4, 15, dtype=torch.float64))
    torch.testing.assert_close(predictive.log_marginal(tasks.target_y).exp(), (predictive.mean * tasks.target_y).sum(2))
    order = torch.tensor([2, 0, 4, 1, 3])
    swapped = TaskBatch(tasks.context_x, tasks.context_y[..., order], tasks.target_x)
    torch.testing.assert_close(model(swapped).mean, predictive.mean[..., order])


def test_no_labels_give_equal_probabilities_and_masked_ones_do_not_exist():
    torch.manual_seed(0)
    model, tasks = BayesianExpertClassifier(2, 2).double(), labelled(2, 3, 2, 1)
    empty = TaskBatch(tasks.context_x[:, :0], tasks.context_y[:, :0], tasks.target_x)
    torch.testing.assert_close(model(empty).mean, torch.full((2, 3, 3), 1 / 3, dtype=torch.float64))
    mask = torch.tensor([[True] * 3 + [False] * 3] * 2)
    hidden = tasks.context_y.masked_fill(~mask.unsqueeze(2), torch.nan)
    masked = TaskBatch(tasks.context_x, hidden, tasks.target_x, None, mask)
    fewer = TaskBatch(tasks.context_x[:, :3], tasks.context_y[:, :3], tasks.target_x)
    torch.testing.assert_close(model(masked).mean, model(fewer).mean)
    torch.testing.assert_close(model(masked).log_evidence, model(fewer).log_evidence)


def test_blobs_are_learned():
    torch.manual_seed(0)
    model = BayesianExpertClassifier(2, 2, 16, 12)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    test = labelled(100, 3, 1, 5, torch.float32, seed=10_000)

    def accuracy():
        with torch.no_grad():
            return (model(test).mean.argmax(2) == test.target_y.argmax(2)).float().mean().item()

    before = accuracy()
    for step in range(100):
        tasks = labelled(16, 3, 1, 3, torch.float32, seed=step)
        loss = prediction_loss(model(tasks), tasks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accuracy() > max(0.9, before), (before, accuracy())


def test_bad_input():
    tasks = labelled(2, 3, 1, 1, torch.float32)
    model = BayesianExpertClassifier(2)
    with pytest.raises(ValueError, match="labels are one-hot"):
        model(TaskBatch(tasks.context_x, tasks.context_y * 0.5, tasks.target_x))
    with pytest.raises(ValueError, match="2 ways or more"):
        model(TaskBatch(tasks.context_x, tasks.context_y[..., :1], tasks.target_x))
    with pytest.raises(ValueError, match="labels are one-hot"):
        model(tasks).log_marginal(F.softmax(tasks.target_y, 2))
    with pytest.raises(ValueError, match="concentration must be positive"):
        BayesianExpertClassifier(2, concentration=0.0)
