"""Avalanche strategies as the experiments use them: quiet, and the baselines by name."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, GDumbPlugin, LwFPlugin, ReplayPlugin
from avalanche.training.supervised import Naive
from torch import nn

Baseline = Literal["naive", "replay", "gdumb", "ewc", "lwf", "joint"]


@contextmanager
def without_avalanche_s_warnings() -> Iterator[None]:
    """Do not show warnings from Avalanche's own code: nothing that its users can mend.

    A filter would not do: Avalanche resets the filters in order to show its deprecations.
    """
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_others(message: Any, category: Any, filename: str, *rest: Any, **options: Any) -> None:
            if "avalanche" not in filename:
                show(message, category, filename, *rest, **options)

        warnings.showwarning = show_others
        yield


def make_strategy(
    model: nn.Module, plugins: list[Any], learning_rate: float = 1e-3, batch_size: int = 32, epochs: int = 1
) -> Any:
    """Naive training with Adam and cross-entropy, without loggers: the caller measures.

    Args:
        model: class scores out.
        plugins: Avalanche plugins; they are called in this order.
        learning_rate: of Adam.
        batch_size: samples in a step.
        epochs: passes over each experience.
    """
    with without_avalanche_s_warnings():
        evaluator = EvaluationPlugin()
    return Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=learning_rate),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=batch_size,
        train_epochs=epochs,
        plugins=plugins,
        evaluator=evaluator,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def baseline_plugins(name: Baseline, memory: int = 200, ewc_lambda: float = 100.0) -> list[Any]:
    """The plugins of one of Avalanche's own methods; ``naive`` and ``joint`` have none.

    Args:
        name: the method. ``replay`` and ``gdumb`` store samples.
        memory: how many.
        ewc_lambda: weight of EWC's penalty.
    Raises:
        ValueError: on an unknown name.
    """
    match name:
        case "naive" | "joint":
            return []
        case "replay":
            return [ReplayPlugin(mem_size=memory)]
        case "gdumb":
            return [GDumbPlugin(mem_size=memory)]
        case "ewc":
            return [EWCPlugin(ewc_lambda=ewc_lambda, mode="online", decay_factor=1.0)]
        case "lwf":
            return [LwFPlugin(alpha=1, temperature=2)]
    raise ValueError(f"unknown baseline '{name}'")
