"""When a stream without task boundaries needs a new expert."""

from collections import deque
from statistics import fmean, stdev
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from modmoe.continual.classifier import PoolClassifier

Decision = Literal["train", "hold", "grow"]


class GrowthRule(Protocol):
    """Decides, before a part of a stream is trained on, what to do with it."""

    def decide(self, classifier: PoolClassifier, x: Tensor, y: Tensor) -> Decision:
        """What to do with the part's data (x, y).

        It is called for every part in turn, once each; the first task begins whatever the answer. A rule that reads
        the gate calls ``classifier.settle_gate(classifier.training_id)`` first.

        Returns:
            "train": the current expert learns it, with what was held before; "hold": keep it in a buffer, nobody
            learns it yet; "grow": a new expert learns it, with what was held before.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What it has to remember to go on with a stream, while nothing is held: JSON values and tensors."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave, in a rule with the same arguments; ValueError if they differ."""
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

    def decide(self, classifier: PoolClassifier, x: Tensor, y: Tensor) -> Decision:
        known = classifier.classes_of()
        mine = known.get(classifier.training_id, [])
        everyone = {label for labels in known.values() for label in labels}
        return "grow" if len(mine) >= self.min_classes and not set(y.tolist()) <= everyone else "train"

    def state(self) -> dict[str, Any]:
        """Nothing: the model itself holds the classes."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


class Novelty:
    """Grow when the data no longer look like the current task's.

    A Gaussian over random projections of the features is fitted to the current task as it goes on. A part of the
    stream is a breach if the mean squared Mahalanobis distance of its samples lies more than ``sigmas`` standard
    deviations above what earlier parts of the task showed, or (``new_classes``) if most of its samples are of classes
    that the current expert has not met: the density of inputs and labels together is low there, however much the
    inputs look alike. A breach is held back; ``patience`` breaches in a row are
    a new task, and the new expert learns what was held; fewer were a false alarm, and the current expert does. Parts
    should be of one size: a smaller one varies more. What is held when a stream ends is not learned.

    Args:
        num_projections: dimension of the Gaussian.
        sigmas: height of a breach.
        patience: breaches in a row that make a new task.
        warmup: samples of a task that are seen before any part of it is judged.
        history: most recent parts that a part is compared with; at least 20 are waited for.
        new_classes: see above; False looks at the inputs alone.
        seed: of the projections.
    """

    MIN_HISTORY = 20
    RIDGE = 1e-3  # added to the projections' variances

    def __init__(
        self,
        num_projections: int = 100,
        sigmas: float = 5.0,
        patience: int = 2,
        warmup: int = 1000,
        history: int = 200,
        new_classes: bool = True,
        seed: int = 0,
    ):
        if min(num_projections, patience, warmup) < 1 or sigmas <= 0 or history < self.MIN_HISTORY:
            raise ValueError(
                f"num_projections, patience and warmup must be at least 1, sigmas positive and history at least "
                f"{self.MIN_HISTORY}, got {num_projections}, {patience}, {warmup}, {sigmas} and {history}"
            )
        self.num_projections = num_projections
        self.sigmas = sigmas
        self.patience = patience
        self.warmup = warmup
        self.history = history
        self.new_classes = new_classes
        self.seed = seed
        self._projection: Tensor | None = None
        self._start_task()

    def _start_task(self) -> None:
        self._count = 0
        self._mean = torch.zeros(self.num_projections, dtype=torch.float64)
        self._scatter = torch.zeros(self.num_projections, self.num_projections, dtype=torch.float64)
        self._seen: deque[float] = deque(maxlen=self.history)
        self._held: list[Tensor] = []

    def decide(self, classifier: PoolClassifier, x: Tensor, y: Tensor) -> Decision:
        z = self._project(classifier.extract(x))
        distance = self._distance(z) if self._count >= self.warmup else None
        if distance is not None and (self._is_breach(distance) or self._is_unmet(classifier, y)):
            self._held.append(z)
            if len(self._held) < self.patience:
                return "hold"
            held = torch.cat(self._held)
            self._start_task()
            self._absorb(held)
            return "grow"
        if distance is not None:
            self._seen.append(distance)
        self._absorb(torch.cat([*self._held, z]))
        self._held = []
        return "train"

    def state(self) -> dict[str, Any]:
        """The current task's Gaussian and what its parts showed; the projections follow from the seed."""
        return {"count": self._count, "mean": self._mean, "scatter": self._scatter, "seen": list(self._seen)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave.

        Raises:
            ValueError: if it is of another number of projections.
        """
        if len(state["mean"]) != self.num_projections:
            raise ValueError(f"the state is of {len(state['mean'])} projections, this rule has {self.num_projections}")
        self._start_task()
        self._count = state["count"]
        self._mean, self._scatter = state["mean"].clone(), state["scatter"].clone()
        self._seen.extend(state["seen"])

    def _is_breach(self, distance: float) -> bool:
        enough = len(self._seen) >= self.MIN_HISTORY
        return enough and distance > fmean(self._seen) + self.sigmas * stdev(self._seen)

    def _is_unmet(self, classifier: PoolClassifier, y: Tensor) -> bool:
        """Whether the current expert has not met the classes of most samples."""
        if not self.new_classes:
            return False
        met = torch.tensor(classifier.classes_of().get(classifier.training_id, []), device=y.device)
        return bool((~torch.isin(y, met)).double().mean() > 0.5)

    def _project(self, features: Tensor) -> Tensor:
        features = features.double().cpu()
        projection = self._projection
        if projection is None:
            generator = torch.Generator().manual_seed(self.seed)
            shape = (features.shape[1], self.num_projections)
            projection = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[0] ** 0.5
            self._projection = projection
        return features @ projection

    def _distance(self, z: Tensor) -> float:
        variance = self._scatter / self._count + self.RIDGE * torch.eye(self.num_projections, dtype=torch.float64)
        lower = torch.linalg.cholesky(variance)
        whitened = torch.linalg.solve_triangular(lower, (z - self._mean).T, upper=False)
        return float(whitened.square().sum(0).mean())

    def _absorb(self, z: Tensor) -> None:
        total = self._count + len(z)
        shift = z.mean(0) - self._mean
        centred = z - z.mean(0)
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self._count * len(z) / total)
        self._mean += shift * (len(z) / total)
        self._count = total
