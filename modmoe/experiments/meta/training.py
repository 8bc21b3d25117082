"""How every model of these studies is trained, and where the randomness of a seed comes from."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modmoe.errors import NonFiniteError

# Seeds of generators: no two purposes of any two seeds of a study share one.
TRAINING, EVALUATION, CALIBRATION = 1_000_000, 2_000_000, 3_000_000
STREAMS = 100  # generators that one seed has for a purpose

WARM_UP = 50
LAST_RATE = 0.02  # of the learning rate
MAX_SKIPPED = 0.02  # of the iterations


class Schedule(NamedTuple):
    """How long and how fast.

    Args:
        iterations: of Adam, each on fresh tasks.
        tasks: in each of them.
        learning_rate: its maximum, after 50 iterations; then it falls by a cosine to 2% of it.
        clip: of the gradient's norm.
    """

    iterations: int
    tasks: int
    learning_rate: float
    clip: float

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * iteration / self.iterations))
        return self.learning_rate * min(1.0, (iteration + 1) / WARM_UP) * max(LAST_RATE, cosine)


def generator_of(purpose: int, seed: int, stream: int = 0) -> torch.Generator:
    """The generator of one of the ``STREAMS`` streams that a seed has for a purpose."""
    assert 0 <= stream < STREAMS
    return torch.Generator().manual_seed(STREAMS * (purpose + seed) + stream)


def fit(model: nn.Module, schedule: Schedule, loss: Callable[[int], Tensor]) -> float:
    """Minimise a loss by Adam over what of the model is trainable.

    A step whose gradient is not finite is left out.

    Args:
        model: in training mode while this runs, in evaluation mode afterwards.
        schedule: of the training.
        loss: number of the iteration -> () float, on tasks that it draws itself.
    Returns:
        Seconds of this process's CPU time, so that other programs do not count.
    Raises:
        NonFiniteError: if more than 2% of the steps were left out.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=schedule.learning_rate)
    model.train()
    skipped, start = 0, time.process_time()
    for iteration in range(schedule.iterations):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(iteration)
        optimizer.zero_grad()
        loss(iteration).backward()
        norm = nn.utils.clip_grad_norm_(parameters, schedule.clip)
        if norm.isfinite():
            optimizer.step()
        else:
            skipped += 1
    seconds = time.process_time() - start
    if skipped > MAX_SKIPPED * schedule.iterations:
        raise NonFiniteError(
            f"{skipped} of {schedule.iterations} gradients of a {type(model).__name__} were not finite"
        )
    model.eval()
    return seconds
