"""Which expert answers a task: by support loss, by its posterior, by clusters, by a learned gate.

Axes: B tasks, E experts, C context points, S inner steps.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from modmoe.growable import GrowableBuffer, Init, RowSpec
from modmoe.meta.task_batch import TaskBatch
from modmoe.pool import ExpertPool
from modmoe.rows import Rows


class ExpertChoice(ABC):
    """(context, support losses, rows) -> weights of the experts; it declares rows of its own, which grow with them.

    Attributes:
        hard: one expert answers in evaluation; in training experts learn by their weights, and not their mixture.
    """

    hard: bool = False

    @abstractmethod
    def row_specs(self) -> dict[str, RowSpec]:
        """The rows that it needs of each expert."""

    @abstractmethod
    def scores(self, batch: TaskBatch, losses: Tensor, rows: Rows) -> Tensor:
        """Unnormalised log-weights, each from its own expert's loss and rows alone.

        Args:
            batch: its context only is read.
            losses: (B, E), the mean squared error of each adapted expert on the context.
            rows: of this choice.
        Returns:
            (B, E).
        """

    def observe(self, pool: ExpertPool, namespace: str, batch: TaskBatch, weights: Tensor) -> None:  # noqa: B027
        """Take a training batch into what is not learned by gradient; nothing by default.

        Args:
            pool: the experts.
            namespace: of this choice's rows.
            batch: the tasks.
            weights: (B, E), how the tasks were assigned.
        """


class SupportPosterior(ExpertChoice):
    """w_e = softmax_e(ln pi_e - n / (2 s_e^2) L_e): the experts' posterior if the context had Gaussian noise s_e.

    L_e is the adapted expert's own loss, so this is the likelihood at its best fit and no evidence: it does not count
    how far the expert had to move.

    Args:
        noise_std: at which s starts; learned, > 0.
        hard: the expert of the largest weight answers alone.
    Raises:
        ValueError: if noise_std is not above 0.
    """

    def __init__(self, noise_std: float = 0.37, hard: bool = False):
        if not noise_std > 0:
            raise ValueError(f"noise_std must be above 0, got {noise_std}")
        self.noise_std = noise_std
        self.hard = hard

    def row_specs(self) -> dict[str, RowSpec]:
        start = float(torch.tensor(self.noise_std).log())
        return {"log_prior": RowSpec(()), "log_noise": RowSpec((), Init("constant", value=start))}

    def scores(self, batch: TaskBatch, losses: Tensor, rows: Rows) -> Tensor:
        precision = (-2 * rows["log_noise"]).exp()
        counts = batch.present.sum(1, keepdim=True).to(losses.dtype)
        return rows["log_prior"] - 0.5 * counts * losses * precision


class NearestCentroid(ExpertChoice):
    """Each expert has a centroid among the tasks' least-squares fits, and serves the tasks that are nearest to it.

    A task's context is fitted by ridge regression on fixed radial features; its embedding are the fit's values at the
    features' centres, whatever the number of points. Centroids follow their tasks as in mini-batch K-means, and never
    move once their expert is frozen.

    Args:
        in_features: D.
        out_features: M.
        num_centres: of the radial features, drawn uniformly in [-1, 1]^D; evenly spread where D = 1.
        ridge: > 0.
        width: of a feature, in units of x.
        momentum: in (0, 1], the part of the way that a centroid goes to its tasks' mean in one step.
    Raises:
        ValueError: on a ridge, width or momentum out of range.
    Source:
        MixER (arXiv 2502.05335) clusters contexts that are learned with the experts, and fits a linear gate to the
        clusters by least squares; here the context is what least squares find, and the nearest centroid is the gate.
    """

    hard = True

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        num_centres: int = 16,
        ridge: float = 0.1,
        width: float = 0.3,
        momentum: float = 0.05,
    ):
        if ridge <= 0 or width <= 0 or not 0 < momentum <= 1:
            raise ValueError(f"ridge > 0, width > 0 and momentum in (0, 1] are needed: {ridge}, {width}, {momentum}")
        self.out_features = out_features
        self.ridge, self.width, self.momentum = ridge, width, momentum
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(num_centres, in_features, generator=generator) * 2 - 1
        self.centres = torch.linspace(-1, 1, num_centres).unsqueeze(1) if in_features == 1 else drawn

    def row_specs(self) -> dict[str, RowSpec]:
        size = len(self.centres) * self.out_features
        return {"centroid": RowSpec((size,), Init("normal", std=0.5), trainable=False)}

    def features(self, x: Tensor) -> Tensor:
        """(B, C, D) -> (B, C, F)."""
        centres = self.centres.to(x.device, x.dtype)
        return (-(torch.cdist(x, centres.expand(len(x), -1, -1)) / self.width).square() / 2).exp()

    @torch.no_grad()
    def embed(self, batch: TaskBatch) -> Tensor:
        """(B, F M): phi(centres) W with W the ridge solution, which is the kernel form's K_* (K + ridge I)^-1 y."""
        x, y = batch.clean_context()
        present = batch.present.unsqueeze(2).to(x.dtype)
        phi = self.features(x) * present
        identity = torch.eye(phi.shape[1], dtype=x.dtype, device=x.device)
        solved = torch.linalg.solve(phi @ phi.transpose(1, 2) + self.ridge * identity, y * present)
        at_centres = self.features(self.centres.to(x).unsqueeze(0))
        return (at_centres @ phi.transpose(1, 2) @ solved).flatten(1)

    def scores(self, batch: TaskBatch, losses: Tensor, rows: Rows) -> Tensor:
        return -torch.cdist(self.embed(batch), rows["centroid"].to(losses.dtype)).square() / 2

    @torch.no_grad()
    def observe(self, pool: ExpertPool, namespace: str, batch: TaskBatch, weights: Tensor) -> None:
        growable = pool.growable(namespace, "centroid")
        assert isinstance(growable, GrowableBuffer)
        embedded = self.embed(batch)
        chosen = weights.argmax(1)
        for position, expert_id in enumerate(pool.ids):
            mine = embedded[chosen == position]
            if len(mine) and not pool.record(expert_id).frozen:
                old = growable.stack([expert_id])
                growable.write(expert_id, old + self.momentum * (mine.mean(0, keepdim=True) - old).to(old.dtype))


class LearnedGate(ExpertChoice):
    """w_e = softmax_e(g_e . h + a_e) with h = mean over the context of relu(B (x, y) + b), B fixed and random.

    The features are fixed so that an expert's score is its own row's alone, and a frozen expert's stays what it was.

    Args:
        in_features: D.
        out_features: M.
        num_features: of h.
    """

    def __init__(self, in_features: int, out_features: int = 1, num_features: int = 64):
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(in_features + out_features, num_features, generator=generator)
        self.bias = torch.randn(num_features, generator=generator)

    def row_specs(self) -> dict[str, RowSpec]:
        size = len(self.bias)
        return {"weight": RowSpec((size,), Init("uniform", size)), "bias": RowSpec(())}

    def scores(self, batch: TaskBatch, losses: Tensor, rows: Rows) -> Tensor:
        points = torch.cat(batch.clean_context(), 2)
        hidden = (points @ self.weight.to(points) + self.bias.to(points)).relu()
        present = batch.present.unsqueeze(2).to(points.dtype)
        mean = (hidden * present).sum(1) / present.sum(1).clamp(min=1)
        return mean @ rows["weight"].t() + rows["bias"]


def balance_loss(log_weights: Tensor) -> Tensor:
    """KL(uniform || u) of the experts' shares u = mean over the tasks of w: 0 where a meta batch uses all equally.

    In this direction the gradient at the score of an expert that has lost every task is still -1 / E; in the other it
    would vanish with its share, and a collapse would be final.

    Args:
        log_weights: (B, E), normalised over E.
    Returns:
        () float, without a bound.
    """
    num_tasks, num_experts = log_weights.shape
    log_usage = torch.logsumexp(log_weights, 0) - math.log(num_tasks)  # finite where the usage itself is 0 in float
    return -(log_usage + math.log(num_experts)).mean()
