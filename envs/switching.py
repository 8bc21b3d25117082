"""What SwitchingPendulum and SwitchingCartPole share: contexts that switch between or inside episodes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .context import ContextView, check_choice, check_options, check_task


class Switcher:
    """Which of K values a physical parameter has now.

    At a reset the context is ``task``, or drawn uniformly. Inside an episode it moves on to the next of the K, round
    and round, after every ``switch_every`` steps.

    Args:
        parameter: one of the keys of ``defaults``.
        values: K values of it; None for ``defaults[parameter]``.
        switch_every: steps between switches inside an episode; None for none.
        task: the context at every reset, or None.
        view: what is observed of it.
        defaults: the values for each parameter.
    Raises:
        ValueError: if an argument is none of what it may be.
    """

    def __init__(
        self,
        parameter: str,
        values: Sequence[float] | None,
        switch_every: int | None,
        task: int | None,
        view: ContextView,
        defaults: Mapping[str, tuple[float, ...]],
    ):
        check_choice("parameter", parameter, tuple(defaults))
        self.parameter = parameter
        self.values = tuple(map(float, defaults[parameter] if values is None else values))
        if not self.values or not all(np.isfinite(value) and value > 0 for value in self.values):
            raise ValueError(f"values must be one or more positive numbers, not {values!r}")
        if switch_every is not None and switch_every < 1:
            raise ValueError(f"switch_every must be 1 or more steps, or None, not {switch_every}")
        check_task(task, len(self.values))
        self.switch_every, self.task, self.view = switch_every, task, view
        self.context, self.steps = 0, 0

    @property
    def num_contexts(self) -> int:
        return len(self.values)

    @property
    def value(self) -> float:
        return self.values[self.context]

    def begin(self, generator: np.random.Generator, options: Mapping[str, Any] | None, known: Sequence[str]) -> None:
        """At a reset: options may have "task", and what else is ``known``."""
        task = check_options(options, ("task", *known)).get("task")
        check_task(task, self.num_contexts)
        drawn = int(generator.integers(self.num_contexts))  # always, so that a seed gives the same start in every task
        chosen = self.task if task is None else task
        self.context, self.steps = drawn if chosen is None else int(chosen), 0

    def count_step(self) -> None:
        """After a step: switch if it is time."""
        self.steps += 1
        if self.switch_every is not None and self.steps % self.switch_every == 0:
            self.context = (self.context + 1) % self.num_contexts

    def extend(self, observation: NDArray[Any], generator: np.random.Generator) -> NDArray[np.float32]:
        """(D,) -> (D + K,): the context as one of K behind it."""
        context = self.view(np.eye(self.num_contexts)[[self.context]], [generator])[0]
        return np.concatenate([observation, context], dtype=np.float32)

    def info(self) -> dict[str, Any]:
        return {"context": self.context, self.parameter: self.value}

    def describe(self) -> str:
        return f"{self.parameter} {self.value:g}"
