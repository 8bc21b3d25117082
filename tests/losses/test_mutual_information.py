"""mutual_information_loss: the published numbers, pairs without probability, gradients, errors."""

import math

import pytest
import torch
from torch.testing import assert_close

from modmoe.analysis import mutual_information
from modmoe.losses import mutual_information_loss


def test_published_numbers():
    # 2 * .4 log(.4/.25) + 2 * .1 log(.1/.25) = .376003 - .183258 = .192745
    assert mutual_information_loss(torch.tensor([[0.4, 0.1], [0.1, 0.4]])).item() == pytest.approx(-0.192745, abs=1e-5)
    assert mutual_information_loss(torch.eye(2) / 2).item() == pytest.approx(-0.693147, abs=1e-5)  # log 2
    assert mutual_information_loss(torch.full((2, 3), 1 / 6)).item() == pytest.approx(0, abs=1e-6)


def test_it_agrees_with_the_metric():
    joint = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    joint = joint / joint.sum()
    assert mutual_information_loss(joint).item() == pytest.approx(-mutual_information(joint))


def test_pairs_without_probability_have_finite_gradients():
    joint = torch.tensor([[0.5, 0.0], [0.5, 0.0]], requires_grad=True)
    loss = mutual_information_loss(joint)
    loss.backward()
    assert_close(loss, torch.tensor(0.0))
    assert joint.grad is not None
    assert torch.isfinite(joint.grad).all()


def test_gradcheck():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)

    def loss(logits):
        return mutual_information_loss(logits.flatten().softmax(0).view(3, 4))

    assert torch.autograd.gradcheck(loss, (logits,))


def test_it_gives_each_task_an_expert():
    logits = (0.1 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss = mutual_information_loss(logits.softmax(1) / 3)
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(-math.log(3), abs=0.05)
    assert sorted(logits.argmax(1).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("joint", "message"),
    [
        (torch.ones(3) / 3, r"joint must be \(number of tasks, E\), got \(3,\)"),
        (torch.ones(0, 3), r"joint must be \(number of tasks, E\), got \(0, 3\)"),
        (torch.tensor([[1.5, -0.5]]), "joint has a negative entry"),
        (torch.ones(2, 2), "joint must sum to 1"),
    ],
)
def test_bad_input(joint, message):
    with pytest.raises(ValueError, match=message):
        mutual_information_loss(joint)
