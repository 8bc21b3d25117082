"""What every multi-task model has in common: a front, towers, and tasks that can be added and frozen."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from modmoe.growth import freeze, grow
from modmoe.multitask.features import FeatureFront
from modmoe.multitask.gates import SHARED
from modmoe.pool import ExpertPool
from modmoe.rows import Growth

TaskKind = Literal["regression", "binary"]
Tasks = Mapping[str, TaskKind]


class MultiTaskModel(nn.Module, ABC):
    """Front -> one vector for each task (what the subclasses differ in) -> one tower for each task.

    Args:
        front: puts the columns of a table together.
        tasks: name -> "regression" or "binary". A name is an identifier, and not "shared".
        tower_features: hidden units of a tower: Linear, ReLU, Linear to one number.
    Raises:
        ValueError: on a wrong name or kind, no task, or a size below 1.
    """

    def __init__(self, front: FeatureFront, tasks: Tasks, tower_features: int = 8):
        super().__init__()
        if not tasks:
            raise ValueError("a model needs at least one task")
        if tower_features < 1:
            raise ValueError(f"tower_features must be at least 1, got {tower_features}")
        for name, kind in tasks.items():
            check_task(name, kind)
        self.front = front
        self.tower_features = tower_features
        self.tasks: dict[str, TaskKind] = {}
        self.towers = nn.ModuleDict()

    @abstractmethod
    def mix(self, x: Tensor) -> dict[str, Tensor]:
        """The vector that each task's tower reads: (B, D) -> task -> (B, D_out)."""

    @abstractmethod
    def add_task(self, name: str, kind: TaskKind) -> None:
        """Add a task with all that it owns."""

    def forward(self, dense: Tensor | None = None, categorical: Tensor | None = None) -> dict[str, Tensor]:
        """Predict.

        Args:
            dense: (B, num_dense) float, or None; see FeatureFront.
            categorical: (B, number of categorical features) int64, or None.
        Returns:
            task -> (B,): the number itself (regression) or the logit of 1 (binary).
        """
        mixed = self.mix(self.front(dense, categorical))
        return {name: self.towers[name](mixed[name]).squeeze(1) for name in self.tasks}

    def add_experts(self, n: int = 1, init: Growth = "fresh", task: str | None = None) -> dict[str, list[int]]:
        """Add n experts to every pool, for one task or for all; see :func:`modmoe.grow`.

        Experts for all tasks that are new change what frozen tasks predict, unless ``init`` keeps the function;
        experts of a task change only that task's predictions.

        Raises:
            ValueError: on an unknown task, where there is no pool, or as the pool raises.
        """
        if task is not None and task not in self.tasks:
            raise ValueError(f"no task '{task}', the model has {list(self.tasks)}")
        return grow(self, n, task=task, init=init)

    def freeze(self, ids: Sequence[int] | None = None) -> None:
        """Freeze experts (with their gate rows, in every pool); without ids all that the model has.

        Tasks that are added afterwards learn; what the others predict stays bit-identical then. Call
        :func:`modmoe.sync_optimizer` after.
        """
        if ids is not None or any(isinstance(module, ExpertPool) for module in self.modules()):
            freeze(self, ids)
        if ids is None:
            for part in self.plain_parts():
                part.requires_grad_(False)
                part.zero_grad(set_to_none=True)  # an optimizer would still apply what is left there

    def plain_parts(self) -> list[nn.Module]:
        """The modules that stand in no pool: what ``freeze()`` freezes besides it."""
        return [self.front, self.towers]

    def _add_tower(self, name: str, kind: TaskKind, in_features: int) -> None:
        like = next(self.towers.parameters(), None)
        tower = nn.Sequential(nn.Linear(in_features, self.tower_features), nn.ReLU(), nn.Linear(self.tower_features, 1))
        self.towers[name] = tower if like is None else tower.to(like)
        self.tasks[name] = kind

    def _check_new(self, name: str, kind: TaskKind) -> None:
        check_task(name, kind)
        if name in self.tasks:
            raise ValueError(f"the model has a task '{name}' already")


def check_task(name: str, kind: TaskKind) -> None:
    """Raise ValueError unless the name is an identifier but "shared", and the kind is known."""
    if name == SHARED or not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ValueError(f"a task's name is an identifier and not '{SHARED}', got {name!r}")
    if kind not in get_args(TaskKind):
        raise ValueError(f"task '{name}' is 'regression' or 'binary', got {kind!r}")
