"""The Avalanche plugin: grow before new data, fit and freeze after it, and keep the optimizer right."""

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.benchmarks.scenarios.online import OnlineCLExperience
from avalanche.training.plugins import EWCPlugin, LwFPlugin, RWalkPlugin, SupervisedPlugin, SynapticIntelligencePlugin
from avalanche.training.utils import ParamData
from torch import Tensor, nn
from torch.utils.data import DataLoader

from modmoe.continual.classifier import PoolClassifier
from modmoe.continual.novelty import Decision, GrowthRule
from modmoe.growth import freeze, grow, pools
from modmoe.layer import MoELayer
from modmoe.optim import sync_optimizer

REFUSED = {
    SynapticIntelligencePlugin: "its importance is exactly 0 on the CPU (it compares a tensor with itself)",
    RWalkPlugin: "it keeps a fixed list of parameters and fails on any new one",
}
MASKED = -1e4  # a logit that no softmax sees; finite, so that a loss on a masked target stays finite


class ExpertPoolPlugin(SupervisedPlugin):
    """Grow a model over a stream: any model that contains MoELayers, or a PoolClassifier (also wrapped or nested).

    The first task is learned by the experts that are there. Before every later one each pool grows; after a task its
    experts are frozen with all that they own. A PoolClassifier gets one expert and its head rows for a task, and its
    gate is fitted to the task's data in one pass, and a backbone such as PatchFeatures to the first experience's
    inputs; nothing is stored. In any other model the parts outside the pools
    (backbone, head) stay as trainable as they were, unless ``freeze_after_first`` names them. Evaluation changes
    nothing. In Avalanche's order of hooks:

    - before_train_dataset_adaptation: grow (Avalanche then puts the new tensors into the optimizer);
    - before_training_exp: ``sync_optimizer``, which takes retired tensors out;
    - after_forward: mask the logits of classes that are neither in the experience nor in the batch;
    - after_training_exp: fit the gate;
    - after_training, or when the next experience begins: freeze a finished task's experts, ``sync_optimizer``. Not
      sooner, because plugins such as EWC look at the trainable parameters in after_training_exp.

    A task is an experience, or in an online stream that shows its boundaries, the experience that its parts come from.
    In an online stream without boundaries a ``growth`` rule says when a task begins.

    Args:
        num_experts: how many experts each pool of a model that is not a PoolClassifier grows by.
        growth: when to grow; None for every task. It needs a PoolClassifier.
        max_experts: a rule's wish to grow beyond this is not granted: the newest expert learns on. None: no limit.
        mask_logits: mask as above.
        freeze_after_first: names of submodules to freeze after the first task, normalisation statistics too.
        fit_batch_size: samples in one step of fitting the gate; some gates solve a large system in each step.
    Raises:
        ValueError: before the first training step, on a model without MoELayers, a plugin that breaks on a growing
            model, an unknown submodule, an online stream without boundaries and rule, or an empty experience.
    """

    def __init__(
        self,
        num_experts: int = 1,
        growth: GrowthRule | None = None,
        max_experts: int | None = None,
        mask_logits: bool = True,
        freeze_after_first: Sequence[str] = (),
        fit_batch_size: int = 65536,
    ):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        self.num_experts = num_experts
        if max_experts is not None and (max_experts < 1 or growth is None):
            raise ValueError(f"max_experts limits a growth rule and is at least 1, got {max_experts} with {growth}")
        self.growth = growth
        self.max_experts = max_experts
        self.mask_logits = mask_logits
        self.freeze_after_first = tuple(freeze_after_first)
        self.fit_batch_size = fit_batch_size
        self.num_tasks = 0
        self._classes: list[int] = []
        self._finished = False  # a task is over, and its experts are not frozen yet
        self._decision: Decision = "train"
        self._held: list[Any] = []  # data sets of parts that nobody has learned yet
        self._frozen_modules: list[nn.Module] = []
        self._masks = False  # whether this experience's logits need a mask
        self._closed: Tensor | None = None  # (C,) classes outside the experience

    def state(self) -> dict[str, Any]:
        """What it has to remember between experiences, as JSON can hold it."""
        return {"num_tasks": self.num_tasks, "frozen_modules": bool(self._frozen_modules)}

    def load_state(self, state: dict[str, Any], model: nn.Module) -> None:
        """Take over what :meth:`state` gave, for a model that has been loaded."""
        self.num_tasks = state["num_tasks"]
        if state["frozen_modules"]:
            self._freeze_modules(model)

    # -- hooks -----------------------------------------------------------------------------------------

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse what would break later."""
        model = strategy.model
        if not any(isinstance(module, MoELayer) for module in model.modules()):
            raise ValueError(
                f"ExpertPoolPlugin needs a model with MoELayers (or a modmoe.continual.PoolClassifier), "
                f"{type(model).__name__} has none"
            )
        for plugin in strategy.plugins:
            for refused, reason in REFUSED.items():
                if isinstance(plugin, refused):
                    raise ValueError(
                        f"{refused.__name__} cannot be used beside ExpertPoolPlugin: {reason}. Frozen experts need no "
                        "regulariser; for the shared parts use EWCPlugin or MASPlugin"
                    )
        for name in self.freeze_after_first:
            model.get_submodule(name)
        if self.growth is not None and find_classifier(model) is None:
            raise ValueError("a growth rule needs a PoolClassifier: other models have no gate that knows new data")

    def before_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Grow if a task begins; otherwise make room for classes that only now appear."""
        self._freeze_finished(strategy)
        experience, classifier = strategy.experience, find_classifier(strategy.model)
        dataset = experience.dataset
        if len(dataset) == 0:
            raise ValueError(f"experience {strategy.clock.train_exp_counter} is empty")
        if any(isinstance(p, LwFPlugin) for p in strategy.plugins) and not hasattr(dataset, "targets_task_labels"):
            raise ValueError(
                "LwFPlugin reads task labels, which this stream's datasets lack: make them with Avalanche's "
                "as_taskaware_classification_dataset (modmoe.continual.streams.to_benchmark(..., task_labels=True))"
            )
        self._classes = sorted({int(target) for target in dataset.targets})
        if self.growth is None and getattr(experience, "access_task_boundaries", None) is False:
            raise ValueError(
                "an online stream without task boundaries needs a rule that says when to grow: "
                "ExpertPoolPlugin(growth=...), or split the stream with access_task_boundaries=True"
            )
        if classifier is not None:
            if isinstance(experience, OnlineCLExperience) and not classifier.gate_streams:
                raise ValueError(
                    f"{type(classifier.layer.router).__name__} is fitted to all of a task's data at once: "
                    "an online stream needs GaussianRouter or PrototypeRouter"
                )
            if self.num_tasks == 0:
                classifier.fit_backbone(next(_batches(dataset, len(dataset), strategy.device))[0])
            classifier.check_input(torch.as_tensor(dataset[0][0])[None].to(strategy.device))
        if self.growth is not None and classifier is not None and self.num_tasks:
            self._decision = self._decide(dataset, classifier, strategy)
            if self._decision == "grow":
                self._finished = True
                self._freeze_finished(strategy)
        if self._decision == "hold":
            return
        self._classes = sorted({*self._classes, *(int(t) for held in self._held for t in held.targets)})
        if self.num_tasks == 0 or self._decision == "grow" or self._starts_task(experience):
            self._begin_task(strategy, classifier)
        elif classifier is not None:
            classifier.add_classes(classifier.training_id, self._classes)

    def after_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Learn what was held, too."""
        if self._held and self._decision != "hold":
            for held in self._held:
                strategy.adapted_dataset = strategy.adapted_dataset.concat(held)

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Train on nothing while a part is held."""
        if self._decision == "hold":
            strategy.stop_training()

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Bring the optimizer in line with the grown pools."""
        sync_optimizer(strategy.optimizer, strategy.model)
        classifier = find_classifier(strategy.model)
        # a PoolClassifier says UNKNOWN of classes that its expert does not own: nothing is left to mask
        owned = [] if classifier is None else classifier.classes_of().get(classifier.training_id, [])
        self._masks = self.mask_logits and not (owned and set(owned) <= set(self._classes))
        self._closed = None
        for plugin in strategy.plugins:
            if isinstance(plugin, EWCPlugin) and plugin.mode == "online":
                align_importances(plugin, strategy.model)

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Keep frozen modules in eval mode: Avalanche puts the whole model into training mode again and again."""
        for module in self._frozen_modules:
            module.eval()

    def after_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Mask logits of classes that are neither in the experience nor (replayed) in the batch."""
        output = strategy.mb_output
        if not self._masks or not isinstance(output, Tensor):
            return
        if self._closed is None or self._closed.shape != output.shape[1:] or self._closed.device != output.device:
            self._closed = torch.ones(output.shape[1], dtype=torch.bool, device=output.device)
            self._closed[self._classes] = False
        strategy.mb_output = output.masked_fill(self._closed.index_fill(0, strategy.mb_y, False), MASKED)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Fit the gate."""
        classifier = find_classifier(strategy.model)
        if self._decision == "hold":
            self._held.append(strategy.experience.dataset)
        elif classifier is not None:
            for dataset in (*self._held, strategy.experience.dataset):
                self._fit_gate(dataset, classifier, strategy.device)
            self._held = []
        self._decision = "train"
        self._finished = self.growth is None and bool(getattr(strategy.experience, "is_last_subexp", True))

    def after_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Freeze what has been learned."""
        self._freeze_finished(strategy)

    # -- tasks -----------------------------------------------------------------------------------------

    def _starts_task(self, experience: Any) -> bool:
        return self.growth is None and bool(getattr(experience, "is_first_subexp", True))

    def _decide(self, dataset: Any, classifier: PoolClassifier, strategy: Any) -> Decision:
        assert self.growth is not None
        x, y = next(_batches(dataset, len(dataset), strategy.device))
        decision = self.growth.decide(classifier, x, y)
        full = self.max_experts is not None and classifier.pool.num_experts >= self.max_experts
        return "train" if decision == "grow" and full else decision

    def _begin_task(self, strategy: Any, classifier: PoolClassifier | None) -> None:
        task = self.num_tasks
        labels = getattr(strategy.experience, "task_labels", None)
        if labels and len(set(labels)) == 1 and has_task_labels(strategy):
            task = int(labels[0])
        if classifier is not None:
            classifier.begin_task(self._classes, task=task)
        elif self.num_tasks:
            grow(strategy.model, self.num_experts, task=task)
        self.num_tasks += 1

    def _freeze_finished(self, strategy: Any) -> None:
        if not self._finished:
            return
        self._finished = False
        model, classifier = strategy.model, find_classifier(strategy.model)
        if classifier is not None:
            classifier.pool.freeze([classifier.training_id])
        else:
            freeze(model, {name: pool.ids for name, pool in pools(model).items()})
        if not self._frozen_modules:
            self._freeze_modules(model)
        sync_optimizer(strategy.optimizer, model)

    def _freeze_modules(self, model: nn.Module) -> None:
        self._frozen_modules = [model.get_submodule(name) for name in self.freeze_after_first]
        for module in self._frozen_modules:
            module.requires_grad_(False).eval()

    def _fit_gate(self, dataset: Any, classifier: PoolClassifier, device: Any) -> None:
        size = self.fit_batch_size if classifier.gate_streams else len(dataset)
        for x, y in _batches(dataset, size, device):
            classifier.observe(classifier.training_id, x, y)


@torch.no_grad()
def align_importances(plugin: EWCPlugin, model: nn.Module) -> None:
    """Give online EWC's importances the model's present names: it walks both in step, and fails where they differ.

    A retired tensor's importance is dropped with it; a new tensor starts with none.
    """
    for experience, old in plugin.importances.items():
        plugin.importances[experience] = {
            name: old[name] if name in old else ParamData(name, parameter.shape, device=parameter.device)
            for name, parameter in model.named_parameters()
        }


def find_classifier(model: nn.Module) -> PoolClassifier | None:
    """The PoolClassifier in a (wrapped) model, or None."""
    return next((module for module in model.modules() if isinstance(module, PoolClassifier)), None)


def has_task_labels(strategy: Any) -> bool:
    """Whether the stream tells tasks apart by their labels, instead of giving every experience the label 0."""
    stream = getattr(strategy.experience, "origin_stream", None)
    if stream is None:
        return False
    return len({label for experience in stream for label in getattr(experience, "task_labels", [])}) > 1


def _batches(dataset: Any, batch_size: int, device: Any) -> Any:
    for x, y, *_ in DataLoader(dataset, batch_size=batch_size):
        yield x.to(device), y.to(device)
