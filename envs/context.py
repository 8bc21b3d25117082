"""What an agent is told of the context it is in: the truth, nothing, or the truth under noise."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONTEXTS = ("visible", "hidden", "noisy")
CONTEXT_BOUND = 2.0  # observed context entries lie in [-2, 2] in every mode, so that a policy fits all three


class ContextView:
    """The observed context: c (visible), 0 (hidden) or clip(c + noise * N(0, 1), -2, 2), drawn anew at each step.

    Args:
        mode: "visible", "hidden" or "noisy". The length is the same in all three.
        noise: standard deviation of the noise; used by "noisy" only.
    Raises:
        ValueError: if the mode is unknown or the noise negative.
    """

    def __init__(self, mode: str, noise: float):
        check_choice("context", mode, CONTEXTS)
        if not noise >= 0:
            raise ValueError(f"context_noise must be 0 or more, not {noise}")
        self.mode = mode
        self.noise = noise

    def __call__(self, values: NDArray[Any], generators: Sequence[np.random.Generator]) -> NDArray[np.float32]:
        """(n, C) true entries and n generators -> (n, C) observed entries."""
        if self.mode == "hidden":
            return np.zeros(values.shape, np.float32)
        if self.mode == "noisy":
            drawn = np.stack([generator.standard_normal(values.shape[1]) for generator in generators])
            values = np.clip(values + self.noise * drawn, -CONTEXT_BOUND, CONTEXT_BOUND)
        return values.astype(np.float32)


def check_choice(name: str, value: object, known: Collection[object]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}")


def check_task(task: object, num_tasks: int) -> None:
    """None stands for a task drawn at every reset."""
    if task is None or (isinstance(task, int | np.integer) and not isinstance(task, bool) and 0 <= task < num_tasks):
        return
    raise ValueError(f"task must be None or one of 0 to {num_tasks - 1}, not {task!r}")


def check_options(options: Mapping[str, Any] | None, known: Collection[str]) -> Mapping[str, Any]:
    """The options of a reset; a misspelt one is refused, because ignoring it would change an experiment silently."""
    options = options or {}
    for name in options:
        if name not in known:
            raise ValueError(f"unknown reset option {name!r}; known: {', '.join(map(repr, known)) or 'none'}")
    return options
