"""The Avalanche plugin: grow before new data, fit and freeze after it, and keep the optimizer right."""

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.training.plugins import EWCPlugin, SupervisedPlugin
from torch import Tensor, nn

from modmoe.continual.alignment import align_importances, list_all_parameters
from modmoe.continual.classifier import PoolClassifier
from modmoe.continual.experiences import ends_task, read_all, read_batches, starts_task, task_label
from modmoe.continual.novelty import Decision, GrowthRule
from modmoe.continual.refusals import check_experience, check_strategy
from modmoe.errors import CheckpointError
from modmoe.growth import freeze, grow, pools
from modmoe.optim import sync_optimizer

MASKED = -1e4  # a logit that no softmax sees; finite, so that a loss on a masked target stays finite


class ExpertPoolPlugin(SupervisedPlugin):
    """Grow a model over a stream: any model that contains MoELayers, or a PoolClassifier (also wrapped or nested).

    The first task is learned by the experts that are there. Before every later one each pool grows; after a task its
    experts are frozen with all that they own. A PoolClassifier gets one expert and its head rows for a task, and its
    gate is fitted to the task's data in one pass, and a backbone such as PatchFeatures to the first inputs; nothing
    is stored. In any other model the parts outside the pools (backbone, head) stay as trainable as they were, unless
    ``freeze_after_first`` names them. Evaluation changes nothing. In Avalanche's order of hooks:

    - before_train_dataset_adaptation: grow, and list the new tensors in the optimizer;
    - before_training_exp: ``sync_optimizer``, which takes out what Avalanche has put back (retired and frozen ones);
    - after_forward: mask the logits of classes that are neither in the experience nor in the batch;
    - after_training_exp: fit the gate;
    - after_training, or when the next task begins: settle the gate, freeze a finished task's experts,
      ``sync_optimizer``. Not sooner, because plugins such as EWC look at the trainable parameters in
      after_training_exp.

    A task is an experience, or in an online stream that shows its boundaries, the experience that its parts come from.
    In an online stream without boundaries a ``growth`` rule says when a task begins.

    An optimizer may have several parameter groups: a new expert's tensors join the group that holds, or last held, the
    tensors of their kind, or else the first. Avalanche lists every parameter, whatever was chosen when the optimizer
    was made; what ``requires_grad=False`` excludes is taken out again, so choose by that.

    Args:
        num_experts: how many experts each pool of a model that is not a PoolClassifier grows by.
        growth: when to grow; None for every task. It needs a PoolClassifier.
        max_experts: a rule's wish to grow beyond this is not granted: the newest expert learns on. None: no limit.
        backbone_samples: in an online stream, the number of samples that an unfitted backbone is fitted to: parts are
            held back until there are so many (or the first task is over, where that is known), and learned together.
            What is held when a stream ends is not learned. None: the first part.
        mask_logits: mask as above.
        freeze_after_first: names of submodules to freeze after the first task, normalisation statistics too.
        fit_batch_size: samples in one step of fitting the gate; some gates solve a large system in each step.
    Raises:
        ValueError: on bad arguments, and before the first training step what `modmoe.continual.refusals` lists.
    """

    def __init__(
        self,
        num_experts: int = 1,
        growth: GrowthRule | None = None,
        max_experts: int | None = None,
        backbone_samples: int | None = None,
        mask_logits: bool = True,
        freeze_after_first: Sequence[str] = (),
        fit_batch_size: int = 65536,
    ):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        if max_experts is not None and (max_experts < 1 or growth is None):
            raise ValueError(f"max_experts limits a growth rule and is at least 1, got {max_experts} with {growth}")
        if backbone_samples is not None and backbone_samples < 1:
            raise ValueError(f"backbone_samples must be at least 1, got {backbone_samples}")
        self.num_experts = num_experts
        self.growth = growth
        self.max_experts = max_experts
        self.backbone_samples = backbone_samples
        self.mask_logits = mask_logits
        self.freeze_after_first = tuple(freeze_after_first)
        self.fit_batch_size = fit_batch_size
        self.num_tasks = 0
        self._classes: list[int] = []
        self._finished = False  # a task is over, and its experts are not frozen yet
        self._unsettled = False  # the gate has observed what its scores do not show yet
        self._decision: Decision = "train"
        self._held: list[Any] = []  # data sets of parts that nobody has learned yet
        self._frozen_modules: list[nn.Module] = []
        self._masks = False  # whether this experience's logits need a mask
        self._closed: Tensor | None = None  # (C,) classes outside the experience

    @property
    def num_held(self) -> int:
        """Parts of the stream that are held back: nobody has learned them yet."""
        return len(self._held)

    def state(self) -> dict[str, Any]:
        """What it has to remember between experiences, as a checkpoint's ``extra`` can hold it."""
        return {
            "num_tasks": self.num_tasks,
            "frozen_modules": bool(self._frozen_modules),
            "rule": None if self.growth is None else type(self.growth).__name__,
            "rule_state": None if self.growth is None else self.growth.state(),
        }

    def load_state(self, state: dict[str, Any], model: nn.Module) -> None:
        """Take over what :meth:`state` gave, for a model that has been loaded.

        Raises:
            CheckpointError: if the state was saved with another growth rule.
        """
        rule = None if self.growth is None else type(self.growth).__name__
        if rule != state["rule"]:
            raise CheckpointError(f"the stream was saved with the growth rule {state['rule']}, this plugin has {rule}")
        if self.growth is not None:
            self.growth.load_state(state["rule_state"])
        self.num_tasks = state["num_tasks"]
        if state["frozen_modules"]:
            self._freeze_modules(model)

    # -- hooks -----------------------------------------------------------------------------------------

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse what would break later."""
        check_strategy(strategy, find_classifier(strategy.model), self.growth, self.freeze_after_first)

    def before_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Grow if a task begins; otherwise make room for classes that only now appear."""
        self._freeze_finished(strategy)
        experience, classifier = strategy.experience, find_classifier(strategy.model)
        check_experience(strategy, classifier, self.growth)
        datasets = (*self._held, experience.dataset)
        self._classes = sorted({int(target) for dataset in datasets for target in dataset.targets})
        self._decision = self._decide(experience, classifier, strategy.device)
        if self._decision == "grow":
            # whether or not anybody said that the task before is over
            self._finished = self.num_tasks > 0
            self._freeze_finished(strategy)
            self._begin_task(strategy, classifier)
        elif self._decision == "train" and classifier is not None:
            classifier.add_classes(classifier.training_id, self._classes)
        list_all_parameters(strategy.optimizer, strategy.model)

    def after_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Learn what was held, too."""
        if self._decision != "hold":
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
        if self._decision == "hold":
            self._held.append(strategy.experience.dataset)
        else:
            self._fit_gate((*self._held, strategy.experience.dataset), strategy)
            self._held = []
        self._decision = "train"
        self._finished = self.growth is None and ends_task(strategy.experience)
        if self._finished:
            self._settle_gate(strategy.model)

    def before_eval(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Settle the gate: an eval may come in the midst of training."""
        self._settle_gate(strategy.model)

    def after_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Settle the gate and freeze what has been learned."""
        self._settle_gate(strategy.model)
        self._freeze_finished(strategy)

    # -- tasks -----------------------------------------------------------------------------------------

    def _decide(self, experience: Any, classifier: PoolClassifier | None, device: Any) -> Decision:
        """Whether the experience begins a task ("grow"), belongs to the present one or is to be held back."""
        begins = self.num_tasks == 0 or (self.growth is None and starts_task(experience))
        if classifier is None:
            return "grow" if begins else "train"
        datasets = (*self._held, experience.dataset)
        if not (self.num_tasks or is_fitted(classifier.backbone)):
            enough = self.backbone_samples is None or sum(map(len, datasets)) >= self.backbone_samples
            if not (enough or ends_task(experience)):
                return "hold"
            classifier.fit_backbone(torch.cat([read_all(dataset, device)[0] for dataset in datasets]))
        classifier.check_input(torch.as_tensor(experience.dataset[0][0])[None].to(device))
        # an expert that somebody has removed or frozen learns no more
        begins = begins or classifier.training_id not in set(classifier.pool.ids) - set(classifier.pool.frozen_ids)
        if self.growth is None:
            return "grow" if begins else "train"
        if self.num_tasks == 0:
            for dataset in datasets:  # the rule has to know what the first task looks like
                self.growth.decide(classifier, *read_all(dataset, device))
            return "grow"
        decision = self.growth.decide(classifier, *read_all(experience.dataset, device))
        if decision == "train" and begins:
            decision = "grow"
        full = self.max_experts is not None and classifier.pool.num_experts >= self.max_experts
        return "train" if decision == "grow" and full else decision

    def _begin_task(self, strategy: Any, classifier: PoolClassifier | None) -> None:
        label = task_label(strategy.experience)
        task = self.num_tasks if label is None else label
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
            self._settle_gate(model)
            classifier.pool.freeze([i for i in classifier.pool.ids if i == classifier.training_id])
        else:
            freeze(model, {name: pool.ids for name, pool in pools(model).items()})
        if not self._frozen_modules:
            self._freeze_modules(model)
        sync_optimizer(strategy.optimizer, model)

    def _freeze_modules(self, model: nn.Module) -> None:
        self._frozen_modules = [model.get_submodule(name) for name in self.freeze_after_first]
        for module in self._frozen_modules:
            module.requires_grad_(False).eval()

    # -- the gate --------------------------------------------------------------------------------------

    def _fit_gate(self, datasets: Sequence[Any], strategy: Any) -> None:
        classifier = find_classifier(strategy.model)
        if classifier is None:
            return
        for dataset in datasets:
            size = self.fit_batch_size if classifier.gate_streams else len(dataset)
            for x, y in read_batches(dataset, size, strategy.device):
                # some gates solve a large system to settle: once for all of these, not for each part of a stream
                classifier.observe(classifier.training_id, x, y, settle=False)
        self._unsettled = True

    def _settle_gate(self, model: nn.Module) -> None:
        if self._unsettled:
            classifier = find_classifier(model)
            assert classifier is not None
            classifier.settle_gate(classifier.training_id)
            self._unsettled = False


def find_classifier(model: nn.Module) -> PoolClassifier | None:
    """The PoolClassifier in a (wrapped) model, or None."""
    return next((module for module in model.modules() if isinstance(module, PoolClassifier)), None)


def is_fitted(backbone: nn.Module) -> bool:
    """Whether every part of a backbone that learns from inputs, such as PatchFeatures, has done so."""
    return all(module.fitted for module in backbone.modules() if hasattr(module, "fitted"))
