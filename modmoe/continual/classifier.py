"""A classifier that grows: backbone, pool of experts, gate, and head rows that the experts own."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modmoe.experts.base import Expert
from modmoe.gating.fitted import FittedRouter
from modmoe.growable import Init, RowSpec
from modmoe.layer import MoELayer
from modmoe.pool import ExpertPool
from modmoe.routing import Routing
from modmoe.rows import Task

UNKNOWN = -100.0  # the log-probability of a class that no expert in question has a head row for

HEAD = "head"


class PoolClassifier(nn.Module):
    """log p(c | x) = log sum_e p(e | x) p(c | e, x): a gate over experts, each a classifier of its own classes.

    In training mode every sample is computed by the expert that is being trained; in eval mode by the experts that
    the gate chooses for it. Everything that an expert learned is its own (MLP, head rows, density), so freezing it
    keeps its answers for ever; the backbone is the only part that experts share.

    Args:
        expert: the expert kind; its output feeds the head rows.
        router: a gate that is fitted to data.
        num_classes: width of the output.
        backbone: x -> features, flattened to (B, in_features); None for the flattened input itself.
        freeze_backbone: freeze it now, normalisation statistics too. Otherwise call :meth:`freeze_backbone`
            before the second task, or later experts change what earlier ones see.
    Raises:
        ValueError: on num_classes < 1, or a gate that is trained by gradient.
    """

    backbone_frozen: Tensor

    def __init__(
        self,
        expert: Expert,
        router: FittedRouter,
        num_classes: int,
        backbone: nn.Module | None = None,
        freeze_backbone: bool = True,
    ):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not isinstance(router, FittedRouter):
            raise ValueError(
                f"{type(router).__name__} is trained by gradient and would forget; "
                "use one that is fitted to data: GaussianRouter or PrototypeRouter"
            )
        self.num_classes = num_classes
        self.backbone = nn.Identity() if backbone is None else backbone
        self.layer = MoELayer(ExpertPool(expert), router)
        self.layer.pool.declare(
            HEAD,
            {
                "weight": RowSpec((expert.out_features,), Init("uniform", expert.out_features), count=0),
                "bias": RowSpec((), count=0),
                "label": RowSpec((), trainable=False, count=0, dtype=torch.int64),
            },
            preserving="tie",
        )
        self.training_id = self.pool.ids[0]
        self.register_buffer("backbone_frozen", torch.tensor(False))
        self.register_load_state_dict_post_hook(_after_load)
        if freeze_backbone:
            self.freeze_backbone()

    @property
    def gate_streams(self) -> bool:
        """Whether the gate takes its data in parts; otherwise :meth:`observe` is called once with all of a task's."""
        assert isinstance(self.layer.router, FittedRouter)
        return self.layer.router.streaming

    @property
    def pool(self) -> ExpertPool:
        return self.layer.pool

    # -- computing -------------------------------------------------------------------------------------

    def features(self, x: Tensor) -> Tensor:
        """What gate and experts read: (B, ...) -> (B, in_features)."""
        return self.backbone(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Class log-probabilities.

        Args:
            x: (B, ...).
        Returns:
            (B, num_classes); ``UNKNOWN`` for classes that none of the sample's experts knows.
        """
        if not self.classes_of():  # nothing has been learned; the backbone may not be fitted either
            return self.pool.growable(HEAD, "weight").like.new_full((len(x), self.num_classes), UNKNOWN)
        features = self.features(x)
        if self.training:
            position = self.pool.ids.index(self.training_id)
            experts = torch.full((len(x),), position, device=features.device)
            routing = Routing.assigned(experts, self.pool.num_experts, features.dtype)
        else:
            routing = self.layer.route(features)
        return self.classify(features, routing)

    def classify(self, features: Tensor, routing: Routing) -> Tensor:
        """The class log-probabilities under a given routing, for instance an oracle's; see :meth:`forward`."""
        rows = self.pool.namespace(HEAD)
        labels, owner = rows["label"], rows.owner("label")
        num_rows = len(labels)
        if num_rows == 0:
            return features.new_full((routing.num_tokens, self.num_classes), UNKNOWN)
        outputs = self.layer.compute(features, routing)  # (N, F)
        scores = F.linear(outputs, rows["weight"], rows["bias"])  # (N, R)
        own = owner == routing.expert_index.unsqueeze(1)
        has_rows = own.any(1, keepdim=True)
        scores = torch.where(own, scores, -torch.inf)
        scores = torch.where(has_rows, scores, 0.0)  # an expert without classes: no NaN, masked below
        joint = scores.log_softmax(1) + routing.weight.log().unsqueeze(1)
        joint = torch.where(own & (routing.weight > 0).unsqueeze(1), joint, -torch.inf)
        # log-sum over a token's experts and over rows with the same label, in the probability domain
        top = joint.detach().amax(1).clamp(min=UNKNOWN)
        peak = top.new_full((routing.num_tokens,), UNKNOWN).scatter_reduce(0, routing.token_index, top, "amax")
        mass = (joint - peak[routing.token_index].unsqueeze(1)).exp()
        cell = routing.token_index.unsqueeze(1) * self.num_classes + labels
        total = mass.new_zeros(routing.num_tokens * self.num_classes).index_add(0, cell.flatten(), mass.flatten())
        total = total.view(-1, self.num_classes)
        known = total > 0
        log_total = torch.where(known, total, 1.0).log() + peak.unsqueeze(1)
        return torch.where(known, log_total, UNKNOWN)

    # -- growing ---------------------------------------------------------------------------------------

    def begin_task(self, classes: Iterable[int], task: Task | None = None) -> int:
        """Make ready the expert that learns the next task: the first one while it has no classes, or else a new one.

        Args:
            classes: the class ids of the task, each in [0, num_classes).
            task: its name in the pool's book.
        Returns:
            The expert's id.
        Raises:
            ValueError: on no class, or one outside the range; nothing is changed then.
        """
        wanted = self._check_classes(classes)
        unused = [i for i in self.pool.ids if i not in self.classes_of() and i not in self.pool.frozen_ids]
        expert_id = unused[0] if unused else self.pool.add_experts(1, task=task)[0]
        if unused and task is not None:
            self.pool.assign_task(expert_id, task)
        self.add_classes(expert_id, wanted)
        self.training_id = expert_id
        return expert_id

    def add_classes(self, expert_id: int, classes: Iterable[int]) -> None:
        """Give a live expert head rows for the classes that it does not have yet; ValueError as in begin_task."""
        wanted = self._check_classes(classes)
        new = [label for label in wanted if label not in self.classes_of().get(expert_id, [])]
        if not new:
            return
        head = {name: self.pool.growable(HEAD, name) for name in ("weight", "bias")}
        specs = self.pool.specs(HEAD)
        values = {name: specs[name].draw(len(new), {}, growable.like) for name, growable in head.items()}
        self.pool.add_rows(HEAD, expert_id, {**values, "label": torch.tensor(new)})

    def _check_classes(self, classes: Iterable[int]) -> list[int]:
        wanted = sorted(set(classes))
        if not wanted or wanted[0] < 0 or wanted[-1] >= self.num_classes:
            raise ValueError(f"class ids in [0, {self.num_classes}) are needed, got {wanted}")
        return wanted

    def fit_backbone(self, x: Tensor) -> None:
        """Fit a backbone that learns from the first task's inputs, such as PatchFeatures; nothing if it is fitted."""
        if any(not module.fitted for module in self.backbone.modules() if hasattr(module, "fitted")):
            self.backbone.fit(x)  # type: ignore[operator]  # what has ``fitted`` can be fitted

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless the backbone makes features of the right size of x (B, ...)."""
        features = self.extract(x)
        needed = self.pool.expert.in_features
        if features.shape[1] != needed:
            raise ValueError(
                f"the experts need {needed} features, inputs of shape {tuple(x.shape[1:])} give {features.shape[1]}"
            )

    def classes_of(self) -> dict[int, list[int]]:
        """The classes of each expert that has any, by expert id."""
        rows = self.pool.namespace(HEAD)
        found: dict[int, list[int]] = {}
        for position, label in zip(rows.owner("label").tolist(), rows["label"].tolist(), strict=True):
            found.setdefault(self.pool.ids[position], []).append(label)
        return found

    @torch.no_grad()
    def extract(self, x: Tensor) -> Tensor:
        """The features as the gate sees them: backbone in eval mode, no gradient, nothing changed."""
        was_training = self.backbone.training
        self.backbone.eval()
        features = self.features(x)
        self.backbone.train(was_training)
        return features

    def observe(self, expert_id: int, x: Tensor, labels: Tensor, settle: bool = True) -> None:
        """Fit the gate's statistics of one expert to its data; x as in :meth:`forward`, see FittedRouter.observe."""
        self.layer.observe(expert_id, self.extract(x), labels, settle)

    def settle_gate(self, expert_id: int) -> None:
        """Do what ``observe(settle=False)`` put off; see FittedRouter.settle."""
        self.layer.settle(expert_id)

    def freeze_backbone(self) -> None:
        """Freeze the shared backbone: weights, and normalisation statistics whatever mode the model is put into."""
        self.backbone_frozen.fill_(True)
        self.backbone.requires_grad_(False)
        self.backbone.eval()

    def train(self, mode: bool = True) -> "PoolClassifier":
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.eval()
        return self


def _after_load(module: nn.Module, _incompatible: object) -> None:
    assert isinstance(module, PoolClassifier)
    live = [expert_id for expert_id in module.pool.ids if expert_id not in module.pool.frozen_ids]
    module.training_id = (live or module.pool.ids)[-1]
    if module.backbone_frozen:
        module.freeze_backbone()


def task_positions(pool: ExpertPool, tasks: Sequence[Task]) -> Tensor:
    """The position of the (first) expert of each task: where an oracle would route.

    Args:
        pool: with experts that have tasks.
        tasks: one for each sample.
    Returns:
        (len(tasks),) int64.
    Raises:
        ValueError: if a task has no expert.
    """
    owners = pool.tasks()
    missing = sorted({str(task) for task in tasks if task not in owners})
    if missing:
        raise ValueError(f"no expert belongs to task {missing}, the pool has {owners}")
    return torch.tensor([owners.index(task) for task in tasks], dtype=torch.int64)
