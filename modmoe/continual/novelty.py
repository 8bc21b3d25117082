"""When a stream without task boundaries needs a new expert."""

from typing import Protocol

from torch import Tensor

from modmoe.continual.classifier import PoolClassifier


class GrowthRule(Protocol):
    """Decides, before a batch of new data is trained on, whether it needs a new expert."""

    def wants_expert(self, classifier: PoolClassifier, x: Tensor, y: Tensor) -> bool:
        """True if the data (x, y) belong to a new task."""
        ...


class NewClasses:
    """Grow when a class appears that no expert knows, once the current expert has ``min_classes`` of its own.

    Args:
        min_classes: an expert takes in new classes until it has so many.
    """

    def __init__(self, min_classes: int = 1):
        if min_classes < 1:
            raise ValueError(f"min_classes must be at least 1, got {min_classes}")
        self.min_classes = min_classes

    def wants_expert(self, classifier: PoolClassifier, x: Tensor, y: Tensor) -> bool:
        known = classifier.classes_of()
        mine = known.get(classifier.training_id, [])
        everyone = {label for labels in known.values() for label in labels}
        return len(mine) >= self.min_classes and not set(y.tolist()) <= everyone
