"""Make a pool smaller again: prune experts that are not chosen, make one of two that say the same.

Growth without task boundaries errs on the side of too many experts: a false alarm of the growth rule gives one task
to two of them, and each takes a place under the pool's cap.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from modmoe.continual.classifier import HEAD, PoolClassifier
from modmoe.continual.experiences import read_batches
from modmoe.continual.plugin import find_classifier
from modmoe.conversion.edit import expert_rows, mean_rows, underused
from modmoe.gating.classwise import join_rows
from modmoe.gating.fitted import FittedRouter
from modmoe.optim import sync_optimizer
from modmoe.routing import Routing

COMPARED_AT_ONCE = 4096  # samples, by ConsolidationPlugin


class RedundantPair(NamedTuple):
    """Two experts that say the same: ``keep`` has observed more samples (or as many, and is older)."""

    keep: int
    drop: int
    agreement: float


@torch.no_grad()
def measure_usage(classifier: PoolClassifier, x: Tensor) -> dict[int, int]:
    """How many samples the gate gives to each expert; counts of several parts of the data may be added up.

    Args:
        classifier: the model.
        x: (n, ...), of everything that the experts are there for: on one task's data the others' are idle.
    Returns:
        Expert id -> number of samples, of which each counts for top_k experts.
    """
    load = classifier.layer.route(classifier.extract(x)).load.tolist()
    return dict(zip(classifier.pool.ids, load, strict=True))


def prune_experts(
    classifier: PoolClassifier,
    usage: Mapping[int, float],
    min_share: float = 0.01,
    keep: Collection[int] = (),
    lose_classes: bool = False,
) -> list[int]:
    """Remove the experts e with usage_e / sum_i usage_i < min_share, the least used first, with all that they own.

    Never removed: the expert that is being trained, the last one, and (unless ``lose_classes``) one that owns a class
    which nobody else who stays owns. Nothing that the others own changes. Call ``sync_optimizer`` after.

    Args:
        classifier: the model.
        usage: a number >= 0 for every expert id, see :func:`measure_usage`.
        min_share: in [0, 1].
        keep: ids that are not removed either.
        lose_classes: remove also the only owner of a class.
    Returns:
        The removed ids, in the order of removal.
    Raises:
        ValueError: if usage does not name every expert (and no other), is negative or nowhere positive, if min_share
            is outside [0, 1], or on an unknown id to keep; nothing is changed then.
    """
    pool = classifier.pool
    for expert_id in keep:
        pool.record(expert_id)
    classes = classifier.classes_of()

    def may_leave(expert_id: int, left: Sequence[int]) -> bool:
        if expert_id in keep or expert_id == classifier.training_id:
            return False
        others = {label for other in left if other != expert_id for label in classes.get(other, [])}
        return lose_classes or set(classes.get(expert_id, [])) <= others

    removed = underused(pool.ids, usage, min_share, may_leave)
    if removed:
        classifier.layer.remove(removed)
    return removed


def redundant_experts(classifier: PoolClassifier, x: Tensor, min_agreement: float = 0.9) -> list[RedundantPair]:
    """The pairs of experts a, b with the same classes and mean over x of sum_c min(p_a(c | x), p_b(c | x)) >= minimum.

    This agreement is 1 minus the mean total variation distance. It says nothing of inputs unlike x: where x comes from
    the data of one expert only, the other is the one to keep.

    Args:
        classifier: the model.
        x: (n, ...), n > 0.
        min_agreement: in (0, 1].
    Returns:
        The pairs, those that agree most first. Merging one makes ids of others unknown: ask again after it.
    Raises:
        ValueError: on no data, or min_agreement outside (0, 1].
    """
    _check_agreement(min_agreement)
    if len(x) == 0:
        raise ValueError("agreement is measured on data, x is empty")
    pairs = []
    for (older, newer), agreement in _agreements(classifier, x).items():
        if agreement >= min_agreement:
            fewer = _num_observed(classifier, older) < _num_observed(classifier, newer)
            keep, drop = (newer, older) if fewer else (older, newer)
            pairs.append(RedundantPair(keep, drop, agreement))
    return sorted(pairs, key=lambda pair: -pair.agreement)


@torch.no_grad()
def merge_experts(
    classifier: PoolClassifier, keep: int, drop: int, weights: Literal["keep", "average"] = "keep"
) -> int:
    """Make one new expert of two, and remove both.

    The gate's rows are those of an expert that has observed what both have, which not every gate can tell
    (``FittedRouter.mergeable``); of classes that only one has observed, any class-wise gate takes the rows over. The
    new expert is frozen if both were, is the one in training if one of them was, and belongs to the task of both or,
    where they differ, to none: it is open to every task. It has no optimizer state: call ``sync_optimizer`` after.

    Args:
        classifier: the model.
        keep: an expert id.
        drop: another one.
        weights: "keep" takes the expert and head rows of ``keep``, which has to own every class of ``drop``. "average"
            takes (n_keep w_keep + n_drop w_drop) / (n_keep + n_drop), with n the samples that the gate observed, and
            the head rows of both by label: only for experts trained from the same start, whose hidden units agree.
    Returns:
        The new expert's id.
    Raises:
        ValueError: where merging would destroy a function (no class in common, or "keep" and a class that ``keep``
            does not own), the gate cannot tell the rows, "average" meets different sizes or no counts, the pool has
            other namespaces, or while a third expert is in training and the new one would be live; nothing is changed
            then.
    """
    layer, pool = classifier.layer, classifier.pool
    mine, theirs = pool.record(keep), pool.record(drop)
    _check_merge(classifier, keep, drop, weights)
    assert isinstance(layer.router, FittedRouter)
    rows = layer.router.merged_rows(expert_rows(pool, layer.namespace, keep), expert_rows(pool, layer.namespace, drop))
    expert, head = expert_rows(pool, "expert", keep), expert_rows(pool, HEAD, keep)
    if weights == "average":
        counts = _num_observed(classifier, keep), _num_observed(classifier, drop)
        if not sum(counts):
            raise ValueError(f"the gate has observed neither {keep} nor {drop}: no counts to weigh their average by")
        share = counts[0] / sum(counts)
        expert = mean_rows(expert, expert_rows(pool, "expert", drop), share)
        head = join_rows(
            head,
            expert_rows(pool, HEAD, drop),
            lambda a, b: mean_rows({name: a[name] for name in ("weight", "bias")}, b, share),
        )

    # every refusal is behind us: from here on the pool changes
    task = mine.task if mine.task == theirs.task else None
    (merged,) = pool.add_experts(1, "fresh", task, None, **mine.sizes)
    for name, value in expert.items():
        pool.growable("expert", name).stack([merged]).copy_(value)  # its bank itself: it is its only row
    pool.add_rows(HEAD, merged, head)
    pool.add_rows(layer.namespace, merged, rows)
    if mine.frozen and theirs.frozen:
        pool.freeze([merged])
    if classifier.training_id in (keep, drop):
        classifier.training_id = merged
    layer.remove([keep, drop])
    return merged


def _check_merge(classifier: PoolClassifier, keep: int, drop: int, weights: str) -> None:
    pool, training = classifier.pool, classifier.training_id
    if keep == drop:
        raise ValueError(f"two experts are needed, got {keep} twice")
    if weights not in ("keep", "average"):
        raise ValueError(f"weights is 'keep' or 'average', got {weights!r}")
    stays_live = not (pool.record(keep).frozen and pool.record(drop).frozen)
    if stays_live and training in pool.ids and training not in (keep, drop, *pool.frozen_ids):
        raise ValueError(
            f"expert {training} is in training, and a model that is loaded goes on with its newest live expert, which "
            "the merged one would be: freeze it, or these two, first"
        )
    others = sorted(set(pool.namespaces) - {"expert", HEAD, classifier.layer.namespace})
    if others:
        raise ValueError(f"nothing says how the rows of {others} are merged")
    classes = [set(classifier.classes_of().get(expert_id, [])) for expert_id in (keep, drop)]
    if not classes[0] & classes[1]:
        raise ValueError(f"experts {keep} and {drop} have no class in common: merging would destroy one's function")
    missing = sorted(classes[1] - classes[0])
    if weights == "keep" and missing:
        raise ValueError(f"expert {keep} does not own the classes {missing} of expert {drop}: they would be lost")
    sizes = [pool.record(expert_id).sizes for expert_id in (keep, drop)]
    if weights == "average" and sizes[0] != sizes[1]:
        raise ValueError(f"experts of sizes {sizes[0]} and {sizes[1]} have no average")


def _num_observed(classifier: PoolClassifier, expert_id: int) -> float:
    """Samples that the gate has counted of an expert; 0 where it counts none."""
    rows = classifier.pool.namespace(classifier.layer.namespace, [expert_id])
    return float(rows["count"].sum()) if "count" in rows else 0.0


@torch.no_grad()
def _agreements(classifier: PoolClassifier, x: Tensor, with_expert: int | None = None) -> dict[tuple[int, int], float]:
    """(older, newer) -> agreement of pairs with the same classes, see :func:`redundant_experts`; None for all pairs."""
    pool, classes, features = classifier.pool, classifier.classes_of(), classifier.extract(x)
    pairs = [
        (a, b)
        for a, b in combinations(classes, 2)
        if set(classes[a]) == set(classes[b]) and with_expert in (None, a, b)
    ]
    probs: dict[int, Tensor] = {}
    for expert_id in {expert_id for pair in pairs for expert_id in pair}:
        position = torch.full((len(x),), pool.ids.index(expert_id), device=features.device)
        routing = Routing.assigned(position, pool.num_experts, features.dtype)
        probs[expert_id] = classifier.classify(features, routing).exp()
    return {(a, b): float(torch.minimum(probs[a], probs[b]).sum(1).mean()) for a, b in pairs}


def _check_agreement(min_agreement: float) -> None:
    if not 0 < min_agreement <= 1:
        raise ValueError(f"min_agreement must be in (0, 1], got {min_agreement}")


class ConsolidationPlugin(SupervisedPlugin):
    """Undo false alarms: merge the expert that has just learned into an older one that says the same of its data.

    After a call of ``strategy.train`` the expert in training is compared with each older one of the same classes on
    the experience's data, see :func:`redundant_experts`. Small parts of an online stream are added up to
    ``min_samples``; only sums are kept. If the one that agrees most agrees enough, the two are merged and the
    optimizer is brought in line; a place under ``max_experts`` is free again. The older one's weights stay, whoever
    has seen more: it is known to be right on its own data, which are not at hand. Nothing is pruned: that an expert
    is not chosen for the data at hand says nothing of its own.

    Args:
        min_agreement: in (0, 1], see :func:`redundant_experts`.
        min_samples: a comparison is made on at least so many.
    Raises:
        ValueError: on an argument out of range; before the first training step, on a model without PoolClassifier or
            a gate that cannot merge.
    """

    def __init__(self, min_agreement: float = 0.9, min_samples: int = 200):
        super().__init__()
        _check_agreement(min_agreement)
        if min_samples < 1:
            raise ValueError(f"min_samples must be at least 1, got {min_samples}")
        self.min_agreement, self.min_samples = min_agreement, min_samples
        self._watched = -1  # the expert that is compared, and what its gate had counted last
        self._observed = 0.0
        self._start_comparison()

    def _start_comparison(self) -> None:
        self._num_samples = 0
        self._sums: dict[int, float] = {}  # older expert -> sum of its agreement with the watched one

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse what could not be merged later."""
        classifier = find_classifier(strategy.model)
        router = None if classifier is None else classifier.layer.router
        if not (isinstance(router, FittedRouter) and router.mergeable):
            found = type(strategy.model if router is None else router).__name__
            raise ValueError(f"a PoolClassifier is needed, with a gate whose rows can be merged: {found} cannot merge")

    def after_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Compare and merge."""
        classifier = find_classifier(strategy.model)
        assert classifier is not None
        newest = classifier.training_id
        if newest != self._watched:
            self._watched, self._observed = newest, 0.0
            self._start_comparison()
        observed = _num_observed(classifier, newest)
        if observed == self._observed:
            return  # a part that is held back: nobody has learned it
        self._observed = observed
        for x, _ in read_batches(strategy.experience.dataset, COMPARED_AT_ONCE, strategy.device):
            self._num_samples += len(x)
            for pair, agreement in _agreements(classifier, x, with_expert=newest).items():
                self._sums[min(pair)] = self._sums.get(min(pair), 0.0) + agreement * len(x)
        if self._num_samples < self.min_samples:
            return
        classes = {i: set(owned) for i, owned in classifier.classes_of().items()}  # those of now may be others
        candidates = [i for i in self._sums if classes.get(i) == classes[newest]]
        older = max(candidates, key=lambda i: self._sums[i], default=None)
        if older is not None and self._sums[older] >= self.min_agreement * self._num_samples:
            merge_experts(classifier, keep=older, drop=newest)
            sync_optimizer(strategy.optimizer, strategy.model)
        self._start_comparison()
