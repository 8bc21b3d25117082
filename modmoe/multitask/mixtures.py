"""Mixtures over one pool: a gate for each task (MMoE), or one gate for all of them."""

from torch import Tensor

from modmoe.experts.base import Expert
from modmoe.gating.token_choice import DenseRouter
from modmoe.layer import MoELayer
from modmoe.multitask.features import FeatureFront
from modmoe.multitask.gates import GatedLevel
from modmoe.multitask.model import MultiTaskModel, TaskKind, Tasks
from modmoe.pool import ExpertPool
from modmoe.rows import Growth


class MMoE(MultiTaskModel):
    """y_k = tower_k(sum_e softmax(W^k x + b^k)_e f_e(x)): shared experts, a gate and a tower for each task.

    Args:
        front: see MultiTaskModel, and so for tasks and tower_features.
        tasks: name -> kind.
        expert: the expert kind; it takes ``front.out_features``.
        num_experts: how many that all tasks share, at least 1.
        tower_features: hidden units of a tower.
    Raises:
        ValueError: as MultiTaskModel; or if the expert takes another number of features.
    Source:
        Ma et al. 2018, Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts.
        Ours has gate biases.
    """

    def __init__(self, front: FeatureFront, tasks: Tasks, expert: Expert, num_experts: int, tower_features: int = 8):
        super().__init__(front, tasks, tower_features)
        check_expert(front, expert)
        self.level = GatedLevel(ExpertPool(expert, num_experts))
        for name, kind in tasks.items():
            self.add_task(name, kind)

    @property
    def pool(self) -> ExpertPool:
        return self.level.pool

    def mix(self, x: Tensor) -> dict[str, Tensor]:
        return self.level(x)

    def add_task(self, name: str, kind: TaskKind, num_experts: int = 0) -> None:
        """Add a gate, a tower, and experts that only this task uses.

        Args:
            name: an identifier.
            kind: "regression" or "binary".
            num_experts: how many of its own.
        Raises:
            ValueError: on a name that is wrong or taken, or an unknown kind.
        """
        self._check_new(name, kind)
        self.level.add_gate(name)
        self._add_tower(name, kind, self.pool.expert.out_features)
        if num_experts:
            self.pool.add_experts(num_experts, task=name)


class OneGateMoE(MultiTaskModel):
    """y_k = tower_k(sum_e softmax(W x + b)_e f_e(x)): the experts of MMoE under one gate, so one mixture for all tasks.

    Args:
        front: see MMoE, and so for the rest.
        tasks: name -> kind.
        expert: the expert kind.
        num_experts: how many.
        tower_features: hidden units of a tower.
    Raises:
        ValueError: as MMoE.
    Source:
        Ma et al. 2018, who call it OMoE.
    """

    def __init__(self, front: FeatureFront, tasks: Tasks, expert: Expert, num_experts: int, tower_features: int = 8):
        super().__init__(front, tasks, tower_features)
        check_expert(front, expert)
        self.layer = MoELayer(ExpertPool(expert, num_experts), DenseRouter(expert.in_features))
        for name, kind in tasks.items():
            self.add_task(name, kind)

    @property
    def pool(self) -> ExpertPool:
        return self.layer.pool

    def mix(self, x: Tensor) -> dict[str, Tensor]:
        mixed: Tensor = self.layer(x)
        return dict.fromkeys(self.tasks, mixed)

    def add_task(self, name: str, kind: TaskKind) -> None:
        """Add a tower; see MMoE."""
        self._check_new(name, kind)
        self._add_tower(name, kind, self.pool.expert.out_features)

    def add_experts(self, n: int = 1, init: Growth = "fresh", task: str | None = None) -> dict[str, list[int]]:
        """As of MultiTaskModel, for all tasks.

        Raises:
            ValueError: if a task is named, whose experts the one gate could not keep from the others.
        """
        if task is not None:
            raise ValueError(f"one gate opens every expert to all tasks: add experts without the task '{task}'")
        return super().add_experts(n, init)


def check_expert(front: FeatureFront, expert: Expert) -> None:
    """Raise ValueError unless the expert reads what the front gives."""
    if expert.in_features != front.out_features:
        raise ValueError(f"the front gives {front.out_features} features, {expert} takes {expert.in_features}")
