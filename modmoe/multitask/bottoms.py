"""The controls without experts: one bottom for all tasks, and a model for each."""

from collections.abc import Callable

from torch import Tensor, nn

from modmoe.multitask.features import FeatureFront
from modmoe.multitask.model import MultiTaskModel, TaskKind, Tasks


class SharedBottom(MultiTaskModel):
    """y_k = tower_k(relu(W x + b)): what multi-task learning was before gates (hard parameter sharing).

    Args:
        front: see MultiTaskModel, and so for tasks and tower_features.
        tasks: name -> kind.
        bottom_features: hidden units of the bottom, at least 1.
        tower_features: hidden units of a tower.
    Raises:
        ValueError: as MultiTaskModel, or on a size below 1.
    Source:
        Caruana 1997, Multitask Learning.
    """

    def __init__(self, front: FeatureFront, tasks: Tasks, bottom_features: int, tower_features: int = 8):
        super().__init__(front, tasks, tower_features)
        if bottom_features < 1:
            raise ValueError(f"bottom_features must be at least 1, got {bottom_features}")
        self.bottom_features = bottom_features
        self.bottom = nn.Sequential(nn.Linear(front.out_features, bottom_features), nn.ReLU())
        for name, kind in tasks.items():
            self.add_task(name, kind)

    def mix(self, x: Tensor) -> dict[str, Tensor]:
        mixed: Tensor = self.bottom(x)
        return dict.fromkeys(self.tasks, mixed)

    def add_task(self, name: str, kind: TaskKind) -> None:
        """Add a tower; see MMoE."""
        self._check_new(name, kind)
        self._add_tower(name, kind, self.bottom_features)

    def plain_parts(self) -> list[nn.Module]:
        return [*super().plain_parts(), self.bottom]


class SingleTask(nn.Module):
    """A model for each task that shares nothing with the others.

    Args:
        make_model: {task: kind} -> the task's own model, with a front of its own.
        tasks: name -> kind.
    Raises:
        ValueError: if there is no task, or as the models raise.
    """

    def __init__(self, make_model: Callable[[Tasks], MultiTaskModel], tasks: Tasks):
        super().__init__()
        if not tasks:
            raise ValueError("a model needs at least one task")
        self.tasks = dict(tasks)
        self.models = nn.ModuleDict({name: make_model({name: kind}) for name, kind in tasks.items()})

    def forward(self, dense: Tensor | None = None, categorical: Tensor | None = None) -> dict[str, Tensor]:
        """As of MultiTaskModel."""
        return {name: self.models[name](dense, categorical)[name] for name in self.tasks}
