"""What every neural process has in common: sizes, checks, and the two calls."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from modmoe.meta.predictive import Predictive
from modmoe.meta.processes.likelihood import CategoricalLikelihood, GaussianLikelihood, Likelihood
from modmoe.meta.task_batch import TaskBatch


class NeuralProcess(nn.Module, ABC):
    """A network that reads a set of context points and answers with a distribution over target outputs.

    Axes: B tasks, C context points, N target points, D inputs, M outputs, H hidden, S draws of the latent, K experts
    (or components).

    With ``num_classes`` it classifies: labels are one-hot vectors (M = num_classes) in the context, where they go into
    the encoder like any output, and in the targets; the decoder gives logits, and the answer is a ClassMixture. The
    classes of a task have no order, so give them new numbers in each training task.

    Args:
        in_features: D.
        out_features: M, for regression; left at 1 for classification.
        num_classes: None for regression.
    Raises:
        ValueError: on a size below 1, fewer than two classes, or num_classes beside out_features.
    """

    def __init__(self, in_features: int, out_features: int = 1, num_classes: int | None = None):
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"inputs and outputs must be at least 1, got {in_features} and {out_features}")
        if num_classes is not None and out_features != 1:
            raise ValueError(f"num_classes={num_classes} gives the outputs, leave out_features out")
        self.in_features = in_features
        self.likelihood: Likelihood = (
            GaussianLikelihood(out_features) if num_classes is None else CategoricalLikelihood(num_classes)
        )

    @abstractmethod
    def forward(self, batch: TaskBatch, num_samples: int = 32, generator: torch.Generator | None = None) -> Predictive:
        """The distribution of the target outputs, from the context alone.

        Args:
            batch: B tasks; target_y is not read.
            num_samples: S >= 1 draws of the latent; without a latent it changes nothing.
            generator: of the draws, on the parameters' device; None for torch's own. All tasks share the draws, so a
                task's answer does not depend on which others stand beside it.
        Returns:
            PointMixture, or ClassMixture where there are classes.
        Raises:
            ValueError: on sizes that are not this model's, or num_samples < 1.
        """

    @abstractmethod
    def loss(
        self,
        batch: TaskBatch,
        objective: str = "exact",
        num_samples: int = 4,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What training minimises, in nats for each target point.

        Args:
            batch: B >= 1 tasks with target_y, N >= 1.
            objective: one of ``objectives``.
            num_samples: S >= 1 draws of the latent for each task.
            generator: of the draws; None for torch's own.
        Returns:
            () float.
        Raises:
            ValueError: without targets, on an unknown objective, and as :meth:`forward`.
        """

    @property
    @abstractmethod
    def objectives(self) -> tuple[str, ...]:
        """What :meth:`loss` can minimise."""

    def check(self, batch: TaskBatch, num_samples: int) -> None:
        """Raise the ValueError that :meth:`forward` would."""
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if batch.context_x.shape[2] != self.in_features:
            raise ValueError(f"points of {self.in_features} inputs are needed, got {batch.context_x.shape[2]}")
        self.likelihood.check("context_y", batch.context_y, batch.present)

    def check_training(self, batch: TaskBatch, objective: str, num_samples: int) -> Tensor:
        """target_y, or the ValueError that :meth:`loss` would raise."""
        self.check(batch, num_samples)
        if objective not in self.objectives:
            raise ValueError(f"unknown objective '{objective}', {type(self).__name__} has {self.objectives}")
        target_y = batch.target_y
        if target_y is None or not target_y.shape[0] or not target_y.shape[1]:
            raise ValueError("a loss needs tasks with target points and their outputs (target_y)")
        self.likelihood.check("target_y", target_y)
        return target_y
