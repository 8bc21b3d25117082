"""Read a context, and the task that it names, out of observations."""

from collections.abc import Callable
from typing import Literal

import torch
from gymnasium import spaces
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor

Observation = Tensor | dict[str, Tensor]
ContextReader = tuple[int, int] | str | Callable[[Observation], Tensor]
TaskReader = Literal["one_hot", "index"] | Callable[[Observation], Tensor]


def read_context(obs: Observation, reader: ContextReader) -> Tensor:
    """(B, C) float: the context of each observation.

    Args:
        obs: as SB3 gives it to a policy: (B, ...) or a dict of these.
        reader: see ``MoEOptions.context``.
    Raises:
        ValueError: on a range that does not lie in the observation, a key for one that is no dict, and so on.
    """
    if callable(reader):
        context = reader(obs)
    elif isinstance(reader, str):
        if not isinstance(obs, dict) or reader not in obs:
            raise ValueError(f"context='{reader}' is a key of a dict observation, got {_kind(obs)}")
        context = obs[reader]
    else:
        if isinstance(obs, dict):
            raise ValueError(f"context={reader} is a range of a flat observation, got {_kind(obs)}")
        start, stop = reader
        flat = obs.reshape(len(obs), -1)
        if not 0 <= start < stop <= flat.shape[1]:
            raise ValueError(f"context={reader} does not lie in an observation of {flat.shape[1]} numbers")
        context = flat[:, start:stop]
    return context.reshape(len(context), -1).to(torch.get_default_dtype())


def read_tasks(obs: Observation, context: ContextReader | None, reader: TaskReader) -> Tensor:
    """(B,) int64: the task of each observation."""
    source = obs if context is None else read_context(obs, context)
    if callable(reader):
        tasks = reader(source)
        if tasks.dim() != 1 or tasks.is_floating_point():
            raise ValueError(f"task_of gives (B,) integers, got {tasks.dtype} {tuple(tasks.shape)}")
        return tasks.to(torch.int64)
    assert isinstance(source, Tensor)  # MoEOptions
    if reader == "one_hot":
        return source.argmax(1)
    if reader != "index" or source.shape[1] != 1:
        raise ValueError(f"task_of is 'one_hot', 'index' (of one number) or a function, got {reader!r} of {source[:1]}")
    return source[:, 0].round().to(torch.int64)


def context_features(space: spaces.Space, reader: ContextReader) -> int:
    """C of the contexts that are read out of a space's observations."""
    example = space.sample()
    batch = {k: v[None] for k, v in example.items()} if isinstance(example, dict) else example[None]
    return read_context(obs_as_tensor(batch, torch.device("cpu")), reader).shape[1]  # type: ignore[arg-type]


def _kind(obs: Observation) -> str:
    return f"a dict of {sorted(obs)}" if isinstance(obs, dict) else f"an array of {tuple(obs.shape)}"
