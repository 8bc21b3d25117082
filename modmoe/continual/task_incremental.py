"""Task-incremental use: Avalanche hands the task label of each test sample to the model, and no gate has to guess."""

from typing import Any

import torch
from avalanche.models import MultiTaskModule
from torch import Tensor

from modmoe.continual.classifier import PoolClassifier
from modmoe.rows import Task


class TaskPool(MultiTaskModule):
    """log p(c | x, task): a PoolClassifier whose samples go to the experts of their own task.

    In eval mode experts of other tasks are masked; where several are left, the gate chooses among them. In training
    mode every sample goes to the expert in training, a replayed sample of an earlier task too. It is trained like the
    classifier itself, with ExpertPoolPlugin, on streams with task labels.

    Args:
        classifier: may be trained already; its pool's book says which expert belongs to which task.
    """

    def __init__(self, classifier: PoolClassifier):
        super().__init__()
        self.classifier = classifier

    @property
    def tasks(self) -> list[Task]:
        """The task labels that some expert belongs to, in the order of their first experts."""
        return list(dict.fromkeys(task for task in self.classifier.pool.tasks() if task is not None))

    def adaptation(self, experience: Any) -> None:
        """Nothing: ExpertPoolPlugin grows the pool, and Avalanche adapts in evaluations, too.

        Avalanche's own looks at classes that experiences of `task_incremental_benchmark` do not have.
        """

    def forward(self, x: Tensor, task_labels: Tensor | int | None) -> Any:
        """Class log-probabilities.

        Args:
            x: (B, ...).
            task_labels: (B,) integers, or one for all samples; None for each known task in turn.
        Returns:
            (B, num_classes) as of `PoolClassifier.forward`; for None a dictionary of these by task.
        Raises:
            ValueError: in eval mode, or where one label is given for all samples, if no expert belongs to a label.
        """
        if task_labels is None:
            return self.forward_all_tasks(x)
        if isinstance(task_labels, int):
            return self.forward_single_task(x, task_labels)
        if self.training:
            return self.classifier(x)
        return self._of_tasks(x, task_labels)

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        """What the experts of one task say, in training mode as well; see :meth:`forward`."""
        return self._of_tasks(x, torch.full((len(x),), task_label))

    def forward_all_tasks(self, x: Tensor) -> dict[Any, Tensor]:
        """What the experts of each known task say, by task."""
        return {task: self._of_tasks(x, [task] * len(x)) for task in self.tasks}

    def _of_tasks(self, x: Tensor, task_labels: Tensor | list[Task]) -> Tensor:
        labels = task_labels.tolist() if isinstance(task_labels, Tensor) else task_labels
        unknown = sorted({label for label in labels if label not in self.tasks}, key=str)
        if unknown:  # an expert without a task would take them: for the layer it is open to all
            raise ValueError(f"no expert belongs to task {unknown}, known are {self.tasks}")
        features = self.classifier.features(x)
        return self.classifier.classify(features, self.classifier.layer.route(features, task_ids=labels))
