"""Progressive layered extraction: stacked levels of shared and task-specific experts."""

from collections.abc import Callable

from torch import Tensor, nn

from modmoe.experts.base import Expert
from modmoe.multitask.features import FeatureFront
from modmoe.multitask.gates import SHARED, GatedLevel
from modmoe.multitask.mixtures import check_expert
from modmoe.multitask.model import MultiTaskModel, TaskKind, Tasks
from modmoe.pool import ExpertPool


class PLE(MultiTaskModel):
    """Levels of a pool each: x_k = sum over own and shared experts, x_shared = sum over all experts, level after level.

    At the first level every expert reads the front. Above it a task's experts and gate read what the task's gate gave
    one level below, and the shared experts (and the shared gate) what the shared gate gave. The last level has no
    shared gate: nothing would read it. One level is CGC.

    Args:
        front: see MultiTaskModel, and so for tasks and tower_features.
        tasks: name -> kind.
        make_expert: the number of input features -> the expert kind of a level.
        num_shared: shared experts of a level, at least 1.
        num_own: experts of each task at a level, at least 0; 0 and one level give an MMoE.
        num_levels: at least 1.
        tower_features: hidden units of a tower.
    Raises:
        ValueError: as MMoE, or on a number out of range.
    Source:
        Tang et al. 2020, Progressive Layered Extraction (RecSys). Ours has gate biases, and experts of any kind;
        the paper's have several layers.
    """

    def __init__(
        self,
        front: FeatureFront,
        tasks: Tasks,
        make_expert: Callable[[int], Expert],
        num_shared: int,
        num_own: int,
        num_levels: int = 2,
        tower_features: int = 8,
    ):
        super().__init__(front, tasks, tower_features)
        if num_shared < 1 or num_own < 0 or num_levels < 1:
            raise ValueError(
                "num_shared and num_levels must be at least 1, num_own at least 0, "
                f"got {num_shared}, {num_levels} and {num_own}"
            )
        self.num_own = num_own
        levels: list[GatedLevel] = []
        for _ in range(num_levels):
            in_features = levels[-1].pool.expert.out_features if levels else front.out_features
            expert = make_expert(in_features)
            if not levels:
                check_expert(front, expert)
            levels.append(GatedLevel(ExpertPool(expert, num_shared), writers=tuple(tasks)))
        self.levels = nn.ModuleList(levels)
        for level in levels[:-1]:
            level.add_gate(SHARED)
        for name, kind in tasks.items():
            self.add_task(name, kind)

    def mix(self, x: Tensor) -> dict[str, Tensor]:
        below: Tensor | dict[str, Tensor] = x
        mixed: dict[str, Tensor] = {}
        for level in self.levels:
            below = mixed = level(below)
        return mixed

    def add_task(self, name: str, kind: TaskKind, num_experts: int | None = None) -> None:
        """Add a gate and experts of its own at every level, and a tower.

        The shared gates stay closed to its experts: the new task reads what the others share and does not write to
        it, so that frozen tasks predict what they did.

        Args:
            name: an identifier.
            kind: "regression" or "binary".
            num_experts: of its own at each level; None for the model's ``num_own``.
        Raises:
            ValueError: on a name that is wrong or taken, or an unknown kind.
        """
        self._check_new(name, kind)
        own = self.num_own if num_experts is None else num_experts
        for level in self.levels:
            assert isinstance(level, GatedLevel)
            level.add_gate(name)
            if own:
                level.pool.add_experts(own, task=name)
        last = self.levels[-1]
        assert isinstance(last, GatedLevel)
        self._add_tower(name, kind, last.pool.expert.out_features)
