"""Train a model on several tasks, predict, and score."""

import math

import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from modmoe.multitask.data import MultiTaskData
from modmoe.multitask.losses import Balance, multitask_loss
from modmoe.optim import sync_optimizer


def fit(
    model: nn.Module,
    data: MultiTaskData,
    epochs: int = 1,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    balance: Balance | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> None:
    """Train with Adam on shuffled batches; every task in every batch.

    The learning rate stays for half of the steps and falls linearly to 0 in the rest.

    Args:
        model: (dense, categorical) -> {task: (B,)}.
        data: its tasks are trained.
        epochs: passes over the data.
        batch_size: samples in a step.
        learning_rate: of Adam.
        balance: see :func:`multitask_loss`; the parameters of a module are trained besides.
        optimizer: continued in place of a new Adam, after syncing it with the model; its learning rates stay.
        seed: of the order of the samples.
    """
    num_steps = epochs * math.ceil(len(data) / batch_size)
    schedule = None
    if optimizer is None:
        extra = list(balance.parameters()) if isinstance(balance, nn.Module) else []
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trainable + extra, learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / num_steps)))
    else:
        sync_optimizer(optimizer, model)
    generator = torch.Generator().manual_seed(seed)
    labelled = ~torch.stack([data.targets[name].isnan() for name in data.tasks]).all(0)
    model.train()
    for _ in range(epochs):
        for batch in data.batches(batch_size, generator):
            if not labelled[batch].any():
                continue  # a batch in which nobody has a label teaches nothing
            labels = data.labels(batch)
            optimizer.zero_grad()
            multitask_loss(model(*data.inputs(batch)), labels, data.tasks, balance).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()


@torch.no_grad()
def predict(model: nn.Module, data: MultiTaskData, batch_size: int = 8192) -> dict[str, Tensor]:
    """task -> (n,): the numbers (regression) or logits (binary) of all samples, in evaluation mode."""
    was_training = model.training
    model.eval()
    slices = [slice(start, start + batch_size) for start in range(0, len(data), batch_size)]
    parts = [model(*data.inputs(rows)) for rows in slices]
    model.train(was_training)
    return {name: torch.cat([part[name] for part in parts]) for name in data.tasks}


def mean_squared_error(outputs: Tensor, targets: Tensor) -> float:
    """Mean (y - t)^2 over the labelled samples (n,).

    Raises:
        ValueError: if none is labelled.
    """
    labelled = ~targets.isnan()
    if not labelled.any():
        raise ValueError("no sample has a label")
    return float((outputs - targets)[labelled].double().square().mean())


def area_under_curve(scores: Tensor, targets: Tensor) -> float:
    """The area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    (sum of the positives' ranks - P (P + 1) / 2) / (P N), with the mean rank for ties.

    Args:
        scores: (n,) float, of any scale.
        targets: (n,) float, 0 or 1, or NaN where a label is missing.
    Returns:
        A number in [0, 1].
    Raises:
        ValueError: unless both classes are there.
    Source:
        Mann and Whitney 1947.
    """
    scores, targets = scores.detach().double().cpu(), targets.cpu()
    labelled = ~targets.isnan()
    positive = targets[labelled] > 0.5
    P, N = int(positive.sum()), int((~positive).sum())
    if P == 0 or N == 0:
        raise ValueError(f"the area under the curve needs both classes, got {P} positives and {N} negatives")
    ranks = torch.from_numpy(rankdata(scores[labelled].numpy()))
    return float((ranks[positive].sum() - P * (P + 1) / 2) / (P * N))
