"""Frozen heads, newest first: a gate that breaks a stick between the newest expert's classes and all older ones."""

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.gating.base import at_least_float32
from modmoe.gating.classwise import DENSITY, ClasswiseRouter, PartOfRows
from modmoe.gating.fitted import FittedRouter, sum_by_owner
from modmoe.growable import GrowableBuffer, RowSpec
from modmoe.pool import ExpertPool
from modmoe.rows import Rows


class StickRouter(FittedRouter):
    """p(expert t | x) = P_t(own) prod_{s > t} P_s(older), with P_s = softmax(sharpness * head_s(x)).

    head_s is a ridge regression from [x, 1] to the one-hot classes seen up to expert s, solved from second moments and
    stored as rows of expert s, frozen with it. "own" are the classes that s has observed, "older" those of the experts
    before it; an expert that knows no older class has P(older) = 1.

    Scores are kept in a form that growth does not change. Dividing all p(t | x) by prod_s P_s(older), the same for
    every t, leaves

        score(t) = log P_t(own) - sum_{s <= t} log P_s(older),

    which reads the rows of t and of the experts before it only. Weights and choices are the same.

    **Shared state.** The Gram matrix of [x, 1] and its products with the one-hot classes are *running state of the
    router*: they add up what every expert observed and cannot be told apart again. They serve the heads that are yet
    to be solved; no frozen score reads them. They hold no sample, but nothing about them belongs to one expert:
    ``pool.remove`` leaves a removed expert's classes in them, and ``freeze_shared`` ends observing.

    Only the newest expert may observe, and no class that another has observed. Every :meth:`settle` solves one system
    of size D + 1; where D is in the thousands and data come in many small parts, observe with ``settle=False`` and
    settle once, before the expert is frozen.

    Args:
        in_features: D, with the density's slice.
        num_classes: labels are in [0, num_classes).
        sharpness: of the softmax; fixed before the stream.
        ridge: added to the diagonal of the Gram matrix; fixed before the stream.
        density: a gate fitted class by class, whose class scores are added to those of the same classes; its rows
            live beside this gate's, their names prefixed with ``density_``. Only ``class_score`` of it is read: its
            own in_features, top_k and selection play no part in routing.
        density_weight: of the density's scores; fixed before the stream.
        density_slice: (start, stop), the columns of x that the density reads; the heads then read the others. None:
            both read all.
        top_k: see FittedRouter.
    Raises:
        ValueError: if num_classes is below 1, sharpness or ridge not positive, density_weight negative, or the
            density does not fit its slice.
    """

    shared_parts = ("gram", "moments", "class_counts")
    gram: Tensor
    moments: Tensor
    class_counts: Tensor
    shared_frozen: Tensor
    unsettled: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        sharpness: float = 12.0,
        ridge: float = 100.0,
        density: ClasswiseRouter | None = None,
        density_weight: float = 0.01,
        density_slice: tuple[int, int] | None = None,
        top_k: int = 1,
    ):
        super().__init__(in_features, top_k)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if sharpness <= 0 or ridge <= 0 or density_weight < 0:
            raise ValueError(
                "sharpness and ridge must be positive, density_weight not negative, "
                f"got {sharpness}, {ridge} and {density_weight}"
            )
        start, stop = density_slice or (0, in_features)
        if density is None and density_slice is not None:
            raise ValueError("density_slice without a density")
        if density is not None and not density.per_class:
            raise ValueError("a density of whole experts has no score of a class: per_class=True is needed")
        if not 0 <= start < stop <= in_features or (density is not None and density.in_features != stop - start):
            raise ValueError(
                f"a density over the columns {start} to {stop} of {in_features} features has to take {stop - start}"
                + ("" if density is None else f", it takes {density.in_features}")
            )
        num_head = in_features - (stop - start) if density_slice else in_features
        if num_head < 1:
            raise ValueError(f"the density's slice {density_slice} leaves no feature to the heads")
        self.num_classes = num_classes
        self.sharpness = sharpness
        self.ridge = ridge
        self.density = density
        self.density_weight = density_weight
        self.density_slice = density_slice
        self.streaming = density is None or density.streaming
        self.register_buffer("gram", torch.zeros(num_head + 1, num_head + 1))
        self.register_buffer("moments", torch.zeros(num_head + 1, num_classes))
        self.register_buffer("class_counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("shared_frozen", torch.tensor(False))
        self.register_buffer("unsettled", torch.tensor(-1))  # the expert whose head has not been solved anew yet

    def row_specs(self) -> dict[str, RowSpec]:
        density = {} if self.density is None else self.density.row_specs()
        return {
            "label": RowSpec((), trainable=False, count=0, dtype=torch.int64),  # each class seen up to this expert
            "own": RowSpec((), trainable=False, count=0, dtype=torch.bool),
            "weight": RowSpec((len(self.gram),), trainable=False, count=0),
            **{DENSITY + name: spec for name, spec in density.items()},
        }

    def freeze_shared(self, frozen: bool = True) -> None:
        """End (or resume) observing: the shared moments are not written any more."""
        self.shared_frozen.fill_(frozen)

    # -- scoring -------------------------------------------------------------------------------------------------------

    def class_log_joint(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Log-probability of each class, but for a term that all share; with w times the density's class score."""
        scores, labels, _ = self._class_scores(at_least_float32(x), rows)
        return scores, labels

    def class_owner(self, rows: Rows) -> Tensor:
        return rows.owner("label")[rows["own"]]

    def score(self, x: Tensor, rows: Rows) -> Tensor:
        x = at_least_float32(x)
        scores, _, owner = self._class_scores(x, rows)
        return sum_by_owner(scores, owner, len(rows.ids), x)

    def _class_scores(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (T, R) of the classes that experts own, the classes (R,) and the positions of their owners (R,)."""
        labels, own, weight, owner = rows["label"], rows["own"], rows["weight"].to(x.dtype), rows.owner("label")
        inputs = self._head_input(x)
        scores = x.new_zeros(len(x), len(labels))
        log_older = x.new_zeros(len(x), 1)
        # a newer head has more classes: their number gives the order in which the experts were fitted
        for position in owner.bincount(minlength=len(rows.ids)).argsort(stable=True).tolist():
            places = (owner == position).nonzero().squeeze(1)
            if len(places) == 0:
                continue
            log_probs = (self.sharpness * F.linear(inputs, weight[places])).log_softmax(1)
            mine = own[places]
            if not mine.all():
                log_older = log_older + log_probs[:, ~mine].logsumexp(1, keepdim=True)
            scores = scores.index_copy(1, places[mine], log_probs[:, mine] - log_older)
        scores, labels, owner = scores[:, own], labels[own], owner[own]
        if self.density is None or len(labels) == 0:
            return scores, labels, owner
        part = PartOfRows(rows, DENSITY)
        density_scores = self.density.class_score(self._density_input(x), part)
        same = (owner.unsqueeze(1) == part.owner("label")) & (labels.unsqueeze(1) == part["label"])
        return scores + self.density_weight * density_scores[:, same.int().argmax(1)], labels, owner

    def _head_input(self, x: Tensor) -> Tensor:
        """(T, D') the columns that the heads read, and a constant 1."""
        if self.density_slice is not None:
            start, stop = self.density_slice
            x = torch.cat([x[:, :start], x[:, stop:]], 1)
        return F.pad(x, (0, 1), value=1.0)

    def _density_input(self, x: Tensor) -> Tensor:
        return x if self.density_slice is None else x[:, slice(*self.density_slice)]

    # -- fitting -------------------------------------------------------------------------------------------------------

    def updated_rows(self, old: dict[str, Tensor], x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        classes, sizes = labels.unique(return_counts=True)
        self._check_observation(old, classes)
        inputs = self._head_input(x).to(self.gram.dtype)
        targets = F.one_hot(labels, self.num_classes).to(inputs.dtype)
        new = {name: tensor for name, tensor in old.items() if name.startswith(DENSITY)}
        if self.density is not None:
            stripped = {name.removeprefix(DENSITY): tensor for name, tensor in new.items()}
            fitted = self.density.updated_rows(stripped, self._density_input(x), labels)
            new = {DENSITY + name: tensor for name, tensor in fitted.items()}
        # rows keep their order: the older classes are known at the first call, later ones are the expert's own
        first = (self.class_counts > 0).nonzero().squeeze(1)
        known = old["label"] if len(old["label"]) else first
        fresh = classes[~torch.isin(classes, known)]
        seen = torch.cat([known, fresh])
        own = torch.cat([old["own"] if len(old["own"]) else torch.zeros_like(first, dtype=torch.bool), fresh >= 0])
        weight = F.pad(old["weight"], (0, 0, 0, len(seen) - len(old["weight"])))  # solved in settle
        # in place: the Gram matrix may be the largest tensor around
        self.gram.addmm_(inputs.T, inputs)
        self.moments.addmm_(inputs.T, targets)
        self.class_counts.index_add_(0, classes, sizes)
        return {"label": seen, "own": own, "weight": weight, **new}

    def observe(
        self,
        pool: ExpertPool,
        namespace: str,
        expert_id: int,
        x: Tensor,
        labels: Tensor | None = None,
        settle: bool = True,
    ) -> None:
        """As FittedRouter.observe.

        Raises:
            ValueError: besides, where another expert's observations wait for :meth:`settle`.
        """
        waiting = int(self.unsettled)
        if waiting in pool.ids and waiting != expert_id:
            raise ValueError(f"expert {waiting} has not been settled: its head would miss what it observed last")
        before = int(self.class_counts.sum())
        super().observe(pool, namespace, expert_id, x, labels, settle=False)
        if int(self.class_counts.sum()) > before:
            self.unsettled.fill_(expert_id)
        if settle:
            self.settle(pool, namespace, expert_id)

    @torch.no_grad()
    def settle(self, pool: ExpertPool, namespace: str, expert_id: int) -> None:
        if int(self.unsettled) != expert_id:
            return
        if pool.record(expert_id).frozen:
            raise ValueError(f"expert {expert_id} was frozen before it was settled: unfreeze it, settle, and freeze")
        seen = pool.growable(namespace, "label").stack([expert_id])
        growable = pool.growable(namespace, "weight")
        assert isinstance(growable, GrowableBuffer)
        growable.write(expert_id, self._solve(seen))
        self.unsettled.fill_(-1)

    def _solve(self, classes: Tensor) -> Tensor:
        """(len(classes), D' + 1): the ridge regression to the one-hot classes from all that was observed."""
        diagonal = self.ridge * torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)
        return torch.cholesky_solve(self.moments[:, classes], torch.linalg.cholesky(self.gram + diagonal)).T

    @torch.no_grad()
    def ridge_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The baseline without stick: one ridge regression over all classes, from the shared moments as they are now.

        It is what streaming in any order, sample by sample, would give; no row is read or written.

        Args:
            x: (T, D).
        Returns:
            scores (T, R), of which the highest wins, and the class of each, (R,) int64.
        """
        classes = (self.class_counts > 0).nonzero().squeeze(1)
        return F.linear(self._head_input(at_least_float32(x)), self._solve(classes)), classes

    def _check_observation(self, old: dict[str, Tensor], classes: Tensor) -> None:
        if self.shared_frozen:
            raise ValueError("the router's shared moments are frozen: nothing can be observed")
        if classes.min() < 0 or classes.max() >= self.num_classes:
            raise ValueError(f"labels in [0, {self.num_classes}) are needed, got {classes.tolist()}")
        known = old["label"]
        if len(known) and len(known) != int((self.class_counts > 0).sum()):
            raise ValueError("only the expert that observed last may observe more: the heads of newer ones are solved")
        taken = known[~old["own"]] if len(known) else (self.class_counts > 0).nonzero().squeeze(1)
        others = classes[torch.isin(classes, taken)]
        if len(others):
            raise ValueError(
                f"the classes {others.tolist()} belong to other experts: this gate tells experts by classes"
            )
