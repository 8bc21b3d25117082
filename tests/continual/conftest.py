"""A small stream of Gaussian blobs and a strategy on it, for the tests of this folder."""

import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn

from modmoe.continual.streams import TaskData

D = 4


def make_blobs(num_tasks=3, n=24, same_classes=False):
    """Two classes a task, each a tight blob around its own corner; with ``same_classes`` always the classes 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(2 * num_tasks, D, generator=generator)
    tasks = []
    for task in range(num_tasks):
        blob = torch.arange(n) % 2 + 2 * task
        x = centres[blob] + 0.3 * torch.randn(n, D, generator=generator)
        y = blob % 2 if same_classes else blob
        tasks.append(TaskData(x, y, x, y))
    return tasks


def make_strategy(model, plugins, optimizer=None, epochs=1, batch_size=8, cls=Naive, evaluator=None, **kwargs):
    """A quiet Avalanche strategy."""
    return cls(
        model=model,
        optimizer=(optimizer or (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)))(model.parameters()),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=batch_size,
        train_epochs=epochs,
        plugins=plugins,
        evaluator=evaluator or EvaluationPlugin(),
        **kwargs,
    )


@pytest.fixture
def blobs():
    return make_blobs


@pytest.fixture
def strategy_of():
    return make_strategy
