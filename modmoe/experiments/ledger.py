"""What a method got right, task after task."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from modmoe.analysis import Matrix, MethodRecord, joint_distribution, mutual_information
from modmoe.continual.streams import TaskData


class Ledger:
    """Accuracy on all test data after each task, collected while one method learns.

    Args:
        tasks: the stream.
    """

    def __init__(self, tasks: Sequence[TaskData]):
        self.num_tasks = len(tasks)
        self.x = torch.cat([task.test_x for task in tasks])
        self.y = torch.cat([task.test_y for task in tasks])
        self.task = torch.cat([torch.full((len(task.test_y),), i) for i, task in enumerate(tasks)])
        self.rows: list[list[float]] = []
        self.accuracy = 0.0
        self.seconds = 0.0

    def add(self, predictions: Tensor) -> None:
        """Take the class predictions (n,) for all test data after one more task."""
        hit = (predictions == self.y).double()
        self.rows.append([float(hit[self.task == i].mean()) for i in range(self.num_tasks)])
        self.accuracy = float(hit.mean())

    def record(self, parameters: int, **metrics: float) -> MethodRecord:
        """The record of a method that learned the tasks in sequence, or all at once (one row).

        Args:
            parameters: all numbers that it keeps, statistics included.
            metrics: put between accuracy and forgetting.
        """
        names = [f"task {i}" for i in range(self.num_tasks)]
        values = np.array(self.rows)
        in_sequence = len(values) > 1
        # how far each earlier task has fallen from its best; one row has no earlier task
        forgetting = float((values[:-1].max(0) - values[-1])[:-1].mean()) if in_sequence else 0.0
        after = [f"after {i}" for i in range(len(values))] if in_sequence else ["all at once"]
        series = {f"accuracy/task_{j}": [row[j] for row in self.rows] for j in range(len(names))}
        if in_sequence:
            series["accuracy/seen"] = [float(np.mean(row[: i + 1])) for i, row in enumerate(self.rows)]
        numbers = {"forgetting": forgetting, "parameters": float(parameters), "seconds": self.seconds}
        return MethodRecord(
            metrics={"accuracy": self.accuracy, **metrics, **numbers},
            matrices={"accuracy": Matrix(values, "trained", "tested on", after, names)},
            series=series,
        )

    def routing_metrics(self, chosen: Tensor, right: Tensor) -> dict[str, float]:
        """How well experts tell tasks apart.

        Args:
            chosen: (n,) the expert position of each test sample.
            right: (n, E) bool, the experts that learned the sample's task (or its class).
        """
        joint = joint_distribution(self.task, chosen, self.num_tasks, right.shape[1])
        return {
            "routing_accuracy": float(right.gather(1, chosen.unsqueeze(1)).double().mean()),
            "mutual_information": mutual_information(joint, normalize=True),
        }
