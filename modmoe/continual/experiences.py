"""What an Avalanche experience says of its task, and its data as tensors."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader


def starts_task(experience: Any) -> bool:
    """Whether a task begins with it: not for later parts in an online stream, nor where boundaries are not shown."""
    return shows_boundaries(experience) and bool(getattr(experience, "is_first_subexp", True))


def ends_task(experience: Any) -> bool:
    """Whether a task ends with it: not for earlier parts in an online stream, nor where boundaries are not shown."""
    return shows_boundaries(experience) and bool(getattr(experience, "is_last_subexp", True))


def shows_boundaries(experience: Any) -> bool:
    """Whether tasks can be told apart: in an online stream only if it was made so."""
    return getattr(experience, "access_task_boundaries", True)


def task_label(experience: Any) -> int | None:
    """Its one task label, if the stream tells tasks by labels: Avalanche gives every experience of others a 0."""
    own = set(getattr(experience, "task_labels", None) or ())
    stream = getattr(experience, "origin_stream", None) or ()
    labels = {label for other in stream for label in getattr(other, "task_labels", ())}
    return int(own.pop()) if len(own) == 1 and labels | own != {0} else None


def read_all(dataset: Any, device: Any) -> tuple[Tensor, Tensor]:
    """A whole data set: x (n, ...) and y (n,)."""
    return next(read_batches(dataset, len(dataset), device))


def read_batches(dataset: Any, batch_size: int, device: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """x (B, ...) and y (B,), in the data set's order."""
    for x, y, *_ in DataLoader(dataset, batch_size=batch_size):
        yield x.to(device), y.to(device)
