"""Experts that own a feature map and a Bayesian linear last layer, on one pool."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from modmoe.growable import GrowableParameter, Init, RowSpec
from modmoe.kernels.batched import BatchedOps
from modmoe.meta.evidence.features import FeatureMapExpert
from modmoe.meta.task_batch import TaskBatch
from modmoe.pool import ExpertPool
from modmoe.rows import Task

MIN_NOISE = 1e-4  # of the noise's variance, in squared units of y
PRIOR_SCALE = 2.0  # standard deviation of the functions of a new expert, about, in units of y


class ExpertView(NamedTuple):
    """What each of K experts says of P points of B tasks before it has seen an output.

    Args:
        features: (K, B, P, F), whitened: the prior over their weights is N(0, I).
        offset: (K, B, P, M) the mean function.
        noise: (K,) variances.
        log_prior: (K,) ln pi_k, normalised.
    """

    features: Tensor
    offset: Tensor
    noise: Tensor
    log_prior: Tensor


class EvidenceExperts(nn.Module):
    """A pool of experts f_k(x) = phi_k(x)^T w with w ~ N(w_0k, R_k R_k^T), noise s_k^2, and prior weight pi_k.

    Everything an expert owns is rows of the pool: the feature map in "expert", ``prior_mean`` w_0, ``prior_root``
    (R - R_0), ``log_noise`` ln s in "linear", ``bias`` (the logit of pi) in "gate". The prior precision is
    A = (R R^T)^-1. Nothing competes through a trained normaliser but the prior logits.

    Args:
        in_features: D.
        prior_outputs: columns of the prior mean; 1 where all outputs share one.
        num_experts: K at the start.
        hidden_features: H of the feature maps' two hidden layers.
        num_features: F.
    Raises:
        ValueError: on a size below 1.
    """

    def __init__(self, in_features: int, prior_outputs: int, num_experts: int, hidden_features: int, num_features: int):
        super().__init__()
        if prior_outputs < 1:
            raise ValueError(f"out_features must be at least 1, got {prior_outputs}")
        self.pool = ExpertPool(FeatureMapExpert(in_features, hidden_features, num_features), num_experts)
        linear = {
            "prior_mean": RowSpec((num_features, prior_outputs), Init("normal", std=0.1)),
            "prior_root": RowSpec((num_features, num_features)),
            "log_noise": RowSpec((), Init("constant", value=-1.0)),
        }
        self.pool.declare("linear", linear, preserving="tie")
        self.pool.declare("gate", {"bias": RowSpec(())}, preserving="split")

    # -- computing ---------------------------------------------------------------------------------

    def view(self, x: Tensor, experts: Sequence[int] | None = None) -> ExpertView:
        """What the experts say of points before any output is seen.

        Args:
            x: (B, P, D).
            experts: ids; None for all. Their order does not matter: experts come in the order of ``pool.ids``.
        Raises:
            ValueError: on no or unknown ids, another size or dtype of x.
        """
        ids = self.select(experts)
        like = self.pool.like
        if x.shape[-1] != self.pool.expert.in_features or x.dtype != like.dtype:
            raise ValueError(
                f"x of shape (tasks, points, {self.pool.expert.in_features}) and dtype {like.dtype} is needed, got "
                f"{tuple(x.shape)} and {x.dtype}"
            )
        rows = self.pool.namespace("linear", ids)
        phi = self._features(x.flatten(0, 1), ids)
        num_features = phi.shape[-1]
        eye = torch.eye(num_features, dtype=phi.dtype, device=phi.device)
        root = rows["prior_root"] + PRIOR_SCALE * num_features**-0.5 * eye
        mean = rows["prior_mean"]
        both = phi @ torch.cat([root, mean], -1)
        features, offset = both.unflatten(1, x.shape[:2]).split([num_features, mean.shape[-1]], -1)
        noise = (2 * rows["log_noise"]).exp() + MIN_NOISE
        log_prior = self.pool.namespace("gate", ids)["bias"].log_softmax(0)
        return ExpertView(features, offset, noise, log_prior)

    def _features(self, x: Tensor, ids: Sequence[int]) -> Tensor:
        """(K, T, F): phi of every expert at every point (T, D), one batched call for each bank of equal sizes.

        A bank is computed whole, whoever is asked for: a frozen expert's numbers are then the same to the last bit
        with and without the others.
        """
        parts, order = [], []
        for group in self.pool.groups():
            keep = [index for index, expert_id in enumerate(group.ids) if expert_id in ids]
            if keep:
                phi = self.pool.expert.compute(x, BatchedOps(group.tensors))
                parts.append(phi if len(keep) == len(group.ids) else phi[keep])
                order += [ids.index(group.ids[index]) for index in keep]
        phi = parts[0] if len(parts) == 1 else torch.cat(parts)
        return phi if order == sorted(order) else phi[torch.tensor(order, device=phi.device).argsort()]

    def select(self, experts: Sequence[int] | None) -> tuple[int, ...]:
        """Ids in pool order; ValueError on none or unknown ones."""
        if experts is None:
            return self.pool.ids
        for expert_id in experts:
            self.pool.record(expert_id)
        if not experts:
            raise ValueError("at least one expert must answer, got experts=[]")
        return tuple(expert_id for expert_id in self.pool.ids if expert_id in experts)

    def log_evidence(self, tasks: TaskBatch, experts: Sequence[int] | None = None) -> Tensor:
        """(B,): ln p(context outputs | context inputs) under the whole mixture; 0 for no context.

        Args:
            tasks: the targets do not matter.
            experts: ids; None for all.
        """
        return self(without_targets(tasks), experts).log_evidence

    def expert_evidence(self, tasks: TaskBatch, experts: Sequence[int] | None = None) -> Tensor:
        """(B, K): the same under each expert alone, without prior weights; arguments as of :meth:`log_evidence`."""
        return self(without_targets(tasks), experts).expert_evidence

    # -- growing -----------------------------------------------------------------------------------

    def grow(
        self,
        tasks: TaskBatch | int = 1,
        init: Literal["fresh", "copy", "closest"] = "fresh",
        task: Task | None = None,
    ) -> list[int]:
        """Add experts with all their rows; call :func:`modmoe.sync_optimizer` after.

        Where the others are frozen and only new tasks are seen, train the new experts alone (``model(tasks, new)``):
        through the gate their prior weight, which nothing balances, would grow without end.

        Args:
            tasks: how many; or tasks that nobody explains, for one expert.
            init: "fresh" draws new ones; "copy" repeats the newest live expert and halves its prior weight, which
                leaves every answer as it is; "closest" starts from the rows of the expert, frozen or not, with the
                highest evidence on the tasks (of sizes equal to the kind's).
            task: the name of the new experts' task for the book, or None.
        Returns:
            The new ids.
        Raises:
            ValueError: on "closest" without tasks, a copy of a frozen expert or a number below 1; nothing is changed.
        """
        if init != "closest":
            return self.pool.add_experts(tasks if isinstance(tasks, int) else 1, init, task)
        if isinstance(tasks, int):
            raise ValueError("init='closest' needs the tasks (a TaskBatch) that it should be close to")
        with torch.no_grad():
            source = self.pool.ids[int(self.expert_evidence(tasks).sum(0).argmax())]
        new = self.pool.add_experts(1, "fresh", task, None, **self.pool.record(source).sizes)
        self._copy_rows(source, new[0])
        return new

    @torch.no_grad()
    def _copy_rows(self, source: int, target: int) -> None:
        """Write an expert's rows over those of a live one; the prior weight stays the new expert's own."""
        for name, values in self.pool.expert_state(source).items():
            namespace, _, row = name.partition(".")
            growable = cast(GrowableParameter, self.pool.growable(namespace, row))
            for tensor, rows in growable.live() if namespace != "gate" else ():
                for index, entry in enumerate(rows):
                    if entry.owner == target:
                        tensor[index] = values[0]

    def freeze(self, ids: Sequence[int] | None = None) -> None:
        """Freeze experts exactly; without ids all of them, and the parts that all share."""
        self.pool.freeze(ids)
        if ids is None:
            for name, parameter in self.named_parameters():
                if not name.startswith("pool."):
                    parameter.requires_grad_(False)
                    parameter.grad = None  # an optimizer would still apply what is left there

    def unfreeze(self, ids: Sequence[int]) -> None:
        """Make experts trainable again."""
        self.pool.unfreeze(ids)

    def remove(self, ids: Sequence[int]) -> None:
        """Remove experts with all their rows; ValueError on an unknown id, or if none would be left."""
        self.pool.remove(ids)


def without_targets(tasks: TaskBatch) -> TaskBatch:
    """The contexts alone."""
    return TaskBatch(tasks.context_x, tasks.context_y, tasks.target_x[:, :0], None, tasks.context_mask)
