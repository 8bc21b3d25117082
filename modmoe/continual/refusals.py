"""What ExpertPoolPlugin refuses, before anything of a model or an optimizer has changed."""

from collections.abc import Sequence
from typing import Any

from avalanche.benchmarks.scenarios.online import OnlineCLExperience
from avalanche.training.plugins import GDumbPlugin, LwFPlugin, RWalkPlugin, SynapticIntelligencePlugin

from modmoe.continual.classifier import PoolClassifier
from modmoe.continual.novelty import GrowthRule
from modmoe.layer import MoELayer

NO_REGULARISER = "Frozen experts need no regulariser; for the shared parts use EWCPlugin or MASPlugin"
REFUSED = {
    SynapticIntelligencePlugin: (
        "its importance is exactly 0 on the CPU (it compares a tensor with itself)",
        NO_REGULARISER,
    ),
    RWalkPlugin: ("it keeps a fixed list of parameters and fails on any new one", NO_REGULARISER),
    GDumbPlugin: (
        "it puts the untrained first model back before every experience, and the experts are lost with the old one",
        "Frozen experts need no samples; for the shared parts use ReplayPlugin",
    ),
}


def check_strategy(
    strategy: Any, classifier: PoolClassifier | None, growth: GrowthRule | None, submodules: Sequence[str]
) -> None:
    """Refuse what would break later, whatever the data are.

    Args:
        strategy: Avalanche's, before training.
        classifier: the PoolClassifier in its model, or None.
        growth: the plugin's rule, or None.
        submodules: names that the model has to have.
    Raises:
        ValueError: on a model without MoELayers, a plugin of ``REFUSED``, or a rule without a PoolClassifier.
        AttributeError: on an unknown submodule.
    """
    model = strategy.model
    if not any(isinstance(module, MoELayer) for module in model.modules()):
        raise ValueError(
            f"ExpertPoolPlugin needs a model with MoELayers (or a modmoe.continual.PoolClassifier), "
            f"{type(model).__name__} has none"
        )
    for plugin in strategy.plugins:
        for refused, (reason, advice) in REFUSED.items():
            if isinstance(plugin, refused):
                raise ValueError(f"{refused.__name__} cannot be used beside ExpertPoolPlugin: {reason}. {advice}")
    for name in submodules:
        model.get_submodule(name)
    if growth is not None and classifier is None:
        raise ValueError("a growth rule needs a PoolClassifier: other models have no gate that knows new data")


def check_experience(strategy: Any, classifier: PoolClassifier | None, growth: GrowthRule | None) -> None:
    """Refuse data that cannot be learned; arguments as in :func:`check_strategy`.

    Raises:
        ValueError: on an empty experience, LwF without task labels, an online stream whose boundaries nobody tells,
            or parts of a task for a gate that takes a task at once.
    """
    experience = strategy.experience
    if len(experience.dataset) == 0:
        raise ValueError(f"experience {strategy.clock.train_exp_counter} is empty")
    needs_labels = any(isinstance(plugin, LwFPlugin) for plugin in strategy.plugins)
    if needs_labels and not hasattr(experience.dataset, "targets_task_labels"):
        raise ValueError(
            "LwFPlugin reads task labels, which this stream's datasets lack: make them with Avalanche's "
            "as_taskaware_classification_dataset (modmoe.continual.streams.to_benchmark(..., task_labels=True))"
        )
    if growth is None and getattr(experience, "access_task_boundaries", None) is False:
        raise ValueError(
            "an online stream without task boundaries needs a rule that says when to grow: "
            "ExpertPoolPlugin(growth=...), or split the stream with access_task_boundaries=True"
        )
    if classifier is not None and isinstance(experience, OnlineCLExperience) and not classifier.gate_streams:
        raise ValueError(
            f"{type(classifier.layer.router).__name__} is fitted to all of a task's data at once: "
            "an online stream needs GaussianRouter or PrototypeRouter"
        )
