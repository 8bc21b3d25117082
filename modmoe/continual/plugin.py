"""The Avalanche plugin: a new expert for each experience, the old ones frozen."""

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch.utils.data import DataLoader

from modmoe.continual.classifier import UNKNOWN, PoolClassifier
from modmoe.optim import sync_optimizer


class ExpertPoolPlugin(SupervisedPlugin):
    """Grow a PoolClassifier over a stream.

    Before each experience a new expert with head rows for its classes; logits of other classes masked in training;
    after it the gate is fitted to the experience's data (one pass, nothing is stored), the expert is frozen, and the
    optimizer follows. Evaluation changes nothing. In Avalanche's order of hooks:

    - before_train_dataset_adaptation: grow (Avalanche then puts the new tensors into the optimizer);
    - before_training_exp: ``sync_optimizer``, which takes retired tensors out;
    - after_forward: mask;
    - after_training_exp: fit the gate, freeze, ``sync_optimizer``.

    Args:
        mask_logits: mask the logits of classes outside the current experience in training.
        fit_batch_size: samples in one step of fitting the gate.
    Raises:
        ValueError: before the first step, if the strategy's model is not a PoolClassifier.
    """

    def __init__(self, mask_logits: bool = True, fit_batch_size: int = 1024):
        super().__init__()
        self.mask_logits = mask_logits
        self.fit_batch_size = fit_batch_size
        self._classes: list[int] = []

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse models that it cannot grow."""
        if not isinstance(strategy.model, PoolClassifier):
            raise ValueError(
                f"ExpertPoolPlugin grows a modmoe.continual.PoolClassifier, this model is a "
                f"{type(strategy.model).__name__}"
            )

    def before_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Grow: one expert, with the classes that the experience's data holds."""
        targets = torch.as_tensor(list(strategy.experience.dataset.targets))
        if len(targets) == 0:
            raise ValueError(f"experience {strategy.experience.current_experience} is empty")
        self._classes = targets.unique().tolist()
        strategy.model.begin_task(self._classes, task=int(strategy.clock.train_exp_counter))

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Bring the optimizer in line with the grown pool."""
        sync_optimizer(strategy.optimizer, strategy.model)

    def after_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Mask logits outside the experience's classes."""
        if self.mask_logits:
            closed = torch.ones(strategy.mb_output.shape[1], dtype=torch.bool, device=strategy.mb_output.device)
            closed[self._classes] = False
            strategy.mb_output = strategy.mb_output.masked_fill(closed, UNKNOWN)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Fit the gate of the expert that has just been trained, and freeze it with all that it owns."""
        model = strategy.model
        loader = DataLoader(strategy.experience.dataset, batch_size=self.fit_batch_size)
        for x, y, *_ in loader:
            model.observe(model.training_id, x.to(strategy.device), y.to(strategy.device))
        model.pool.freeze([model.training_id])
        sync_optimizer(strategy.optimizer, model)
