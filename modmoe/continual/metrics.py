"""What a pool did, as Avalanche metrics: give them to any EvaluationPlugin.

Routing metrics are measured over an eval stream and compare the expert that a sample goes to with the expert that was
trained on the sample's experience; experiences that have not been trained on are left out. Sizes are of the model and
optimizer as they are after an eval.
"""

from abc import abstractmethod
from typing import Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import get_metric_name

from modmoe.analysis import joint_distribution, mutual_information
from modmoe.continual.classifier import PoolClassifier
from modmoe.continual.plugin import find_classifier
from modmoe.growable import GrowableBuffer
from modmoe.growth import count_parameters
from modmoe.routing import Routing


class PoolMetric(PluginMetric[float]):
    """One number for each eval stream; the name is the class's."""

    def reset(self, **kwargs: Any) -> None:
        """Forget the last stream."""

    def before_eval(self, strategy: Any) -> None:
        self.reset()

    def after_eval(self, strategy: Any) -> Any:
        value = self.value(strategy)
        if value is None:
            return None
        name = get_metric_name(self, strategy)
        return [MetricValue(self, name, value, strategy.clock.train_iterations)]

    def result(self, **kwargs: Any) -> float | None:
        """The number itself needs the strategy, see ``value``."""
        return None

    @abstractmethod
    def value(self, strategy: Any) -> float | None:
        """The number, or None where there is none."""

    def __str__(self) -> str:
        return type(self).__name__


class RoutingMetric(PoolMetric):
    """Collects, over an eval stream, the experience and the expert of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self, **kwargs: Any) -> None:
        self.tasks: list[torch.Tensor] = []
        self.experts: list[torch.Tensor] = []
        self.owners: list[int] = []

    def after_eval_iteration(self, strategy: Any) -> None:
        classifier = require_classifier(strategy)
        routing, position = classifier.layer.routing, trained_position(classifier, strategy)
        if routing is not None and position is not None:
            chosen = routing.choices[:, 0].cpu()
            self.experts.append(chosen)
            self.tasks.append(torch.full_like(chosen, position))


class RoutingAccuracy(RoutingMetric):
    """Share of samples whose (first) expert is the one that was trained on their experience."""

    def value(self, strategy: Any) -> float | None:
        if not self.tasks:
            return None
        return float((torch.cat(self.tasks) == torch.cat(self.experts)).double().mean())


class ExpertTaskInformation(RoutingMetric):
    """Mutual information of experience and expert, divided by the entropy of the experiences: 1 is perfect."""

    def value(self, strategy: Any) -> float | None:
        if not self.tasks:
            return None
        size = require_classifier(strategy).pool.num_experts
        joint = joint_distribution(torch.cat(self.tasks), torch.cat(self.experts), size, size)
        return mutual_information(joint, normalize=True)


class OracleGap(PoolMetric):
    """Accuracy that routing each sample to its experience's expert would add. Costs a second forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self, **kwargs: Any) -> None:
        self.gained, self.seen = 0, 0

    @torch.no_grad()
    def after_eval_iteration(self, strategy: Any) -> None:
        classifier = require_classifier(strategy)
        position = trained_position(classifier, strategy)
        if position is None:
            return
        features = classifier.features(strategy.mb_x)
        experts = torch.full((len(features),), position, device=features.device)
        oracle = classifier.classify(features, Routing.assigned(experts, classifier.pool.num_experts))
        hits = (oracle.argmax(1) == strategy.mb_y).sum() - (strategy.mb_output.argmax(1) == strategy.mb_y).sum()
        self.gained, self.seen = self.gained + int(hits), self.seen + len(features)

    def value(self, strategy: Any) -> float | None:
        return self.gained / self.seen if self.seen else None


class TotalParameters(PoolMetric):
    """Parameters, frozen ones included."""

    def value(self, strategy: Any) -> float:
        return float(count_parameters(strategy.model).total)


class TrainableParameters(PoolMetric):
    """Parameters that can be trained now."""

    def value(self, strategy: Any) -> float:
        return float(count_parameters(strategy.model).trainable)


class ActiveParameters(PoolMetric):
    """Parameters that compute one sample."""

    def value(self, strategy: Any) -> float:
        return float(count_parameters(strategy.model).active)


class StatisticsBytes(PoolMetric):
    """Bytes of what is kept besides parameters: densities, prototypes, labels."""

    def value(self, strategy: Any) -> float:
        growables = [module for module in strategy.model.modules() if isinstance(module, GrowableBuffer)]
        return float(sum(t.numel() * t.element_size() for g in growables for t, _, _ in g.banks()))


class OptimizerBytes(PoolMetric):
    """Bytes of the optimizer's state."""

    def value(self, strategy: Any) -> float:
        entries = [entry for state in strategy.optimizer.state.values() for entry in state.values()]
        return float(sum(t.numel() * t.element_size() for t in entries if isinstance(t, torch.Tensor)))


def pool_metrics() -> list[PoolMetric]:
    """One of each: ``EvaluationPlugin(*pool_metrics(), ..., loggers=[...])``."""
    return [
        RoutingAccuracy(),
        ExpertTaskInformation(),
        OracleGap(),
        TotalParameters(),
        TrainableParameters(),
        ActiveParameters(),
        StatisticsBytes(),
        OptimizerBytes(),
    ]


def require_classifier(strategy: Any) -> PoolClassifier:
    """The strategy's PoolClassifier.

    Raises:
        ValueError: if there is none: other models have no notion of the right expert.
    """
    classifier = find_classifier(strategy.model)
    if classifier is None:
        raise ValueError(f"routing metrics need a PoolClassifier, the model is a {type(strategy.model).__name__}")
    return classifier


def trained_position(classifier: PoolClassifier, strategy: Any) -> int | None:
    """The position of the expert that was trained on the experience at hand, or None."""
    tasks, task = classifier.pool.tasks(), strategy.experience.current_experience
    return tasks.index(task) if task in tasks else None
