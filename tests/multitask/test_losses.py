"""The loss of several tasks: by hand, with missing labels, balanced."""

import math

import pytest
import torch

from modmoe.multitask import UncertaintyWeighting, multitask_loss, task_losses

TASKS = {"price": "regression", "click": "binary"}
NAN = math.nan
OUTPUTS = {"price": torch.tensor([1.0, 2.0]), "click": torch.tensor([0.0, 5.0])}
TARGETS = {"price": torch.tensor([0.0, NAN]), "click": torch.tensor([1.0, NAN])}


def test_losses_by_hand_without_the_missing_labels():
    losses = task_losses(OUTPUTS, TARGETS, TASKS)
    assert losses["price"].item() == pytest.approx(1.0)  # (1 - 0)^2, the second has no label
    assert losses["click"].item() == pytest.approx(math.log(2))  # -log sigmoid(0)
    assert multitask_loss(OUTPUTS, TARGETS, TASKS).item() == pytest.approx(1 + math.log(2))
    weighted = multitask_loss(OUTPUTS, TARGETS, TASKS, {"price": 2.0, "click": 0.5})
    assert weighted.item() == pytest.approx(2 + math.log(2) / 2)


def test_balance_by_a_function():
    largest = multitask_loss(OUTPUTS, TARGETS, TASKS, lambda losses: torch.stack(list(losses.values())).max())
    assert largest.item() == pytest.approx(1.0)


def test_uncertainty_weighting_by_hand():
    balance = UncertaintyWeighting(TASKS)
    losses = {"price": torch.tensor(3.0), "click": torch.tensor(2.0)}
    assert balance(losses).item() == pytest.approx(3 / 2 + 2)  # s = 0
    with torch.no_grad():
        balance.log_variance["price"].fill_(math.log(2))
        balance.log_variance["click"].fill_(math.log(4))
    # price: 1/2 * 1/2 * 3 + log(2) / 2; click: 1/4 * 2 + log(4) / 2
    assert balance(losses).item() == pytest.approx(0.75 + math.log(2) / 2 + 0.5 + math.log(2))
    assert balance({"click": losses["click"]}).item() == pytest.approx(0.5 + math.log(2))
    balance.add_task("buy", "binary")
    assert balance({"buy": torch.tensor(1.0)}).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="'buy' is balanced already"):
        balance.add_task("buy", "binary")
    with pytest.raises(ValueError, match="at least one task"):
        UncertaintyWeighting({})


def test_uncertainty_weighting_settles_where_the_gradient_vanishes():
    balance = UncertaintyWeighting({"price": "regression"})
    optimizer = torch.optim.SGD(balance.parameters(), 0.5)
    for _ in range(100):
        optimizer.zero_grad()
        balance({"price": torch.tensor(4.0)}).backward()
        optimizer.step()
    # d/ds (exp(-s) L / 2 + s / 2) = 0 at exp(s) = L: the variance is the loss
    assert balance.log_variance["price"].exp().item() == pytest.approx(4.0, rel=1e-3)


def test_gradcheck():
    outputs = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in TASKS]
    targets = {"price": torch.tensor([1.0, NAN, 2.0, 0.5, NAN]), "click": torch.tensor([1.0, 0.0, NAN, NAN, 1.0])}

    def function(*values):
        return multitask_loss(dict(zip(TASKS, values, strict=True)), targets, TASKS)

    assert torch.autograd.gradcheck(function, outputs)


def test_a_missing_label_gives_no_gradient_at_all():
    output = torch.tensor([1.0, NAN], requires_grad=True)  # not even what is computed there matters
    multitask_loss({"price": output}, {"price": torch.tensor([0.0, NAN])}, {"price": "regression"}).backward()
    assert output.grad.tolist() == [2.0, 0.0]


def test_a_task_without_labels_in_a_batch_is_left_out():
    targets = {"price": TARGETS["price"], "click": torch.full((2,), NAN)}
    assert list(task_losses(OUTPUTS, targets, TASKS)) == ["price"]
    assert multitask_loss(OUTPUTS, targets, TASKS, UncertaintyWeighting(TASKS)).item() == pytest.approx(0.5)


def test_bad_input():
    with pytest.raises(ValueError, match="no task of \\['price', 'click'\\] has a label"):
        task_losses(OUTPUTS, dict.fromkeys(TASKS, torch.full((2,), NAN)), TASKS)
    with pytest.raises(ValueError, match="'click' needs an output and a target"):
        task_losses(OUTPUTS, {"price": TARGETS["price"]}, TASKS)
    with pytest.raises(ValueError, match="\\(2, 1\\) and \\(2,\\)"):
        task_losses({**OUTPUTS, "price": torch.zeros(2, 1)}, TARGETS, TASKS)
    with pytest.raises(ValueError, match="binary task 'click' must lie in"):
        task_losses(OUTPUTS, {**TARGETS, "click": torch.tensor([2.0, 0.0])}, TASKS)
    with pytest.raises(ValueError, match="no weight for \\['click'\\]"):
        multitask_loss(OUTPUTS, TARGETS, TASKS, {"price": 1.0})
