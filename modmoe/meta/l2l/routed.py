"""MAML over a pool of small networks: every expert adapts to the task, and those that fit it answer.

Axes: B tasks, E experts, C context points, N target points, D inputs, M outputs, S inner steps.
"""

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modmoe.errors import NonFiniteError
from modmoe.growable import Init, RowSpec
from modmoe.meta.l2l.choice import ExpertChoice, SupportPosterior, balance_loss
from modmoe.meta.l2l.networks import TaskOps
from modmoe.meta.predictive import PointMixture
from modmoe.meta.task_batch import TaskBatch
from modmoe.pool import ExpertPool
from modmoe.rows import Group

Families = Tensor | tuple[Tensor, Tensor]


class Adapted(NamedTuple):
    """All experts after the inner loop.

    Args:
        outputs: (B, E, N, M), at the targets.
        losses: (B, E), mean squared error on the context, and 0 where a task has none.
    """

    outputs: Tensor
    losses: Tensor


class StepCost(NamedTuple):
    """Of one training step: wall-clock seconds, and floating-point operations in matrix products."""

    seconds: float
    flops: int


class RoutedMAML(nn.Module):
    """p(y | x, context) = sum_e w_e(context) N(y; f(x; theta_e'), s^2), theta_e' after S steps on the context.

    theta_e^{t+1} = theta_e^t - r_{e,t} * grad L_e(theta_e^t) for each of an expert's tensors, with L_e its mean
    squared error on the context and r learned for each expert, step and tensor. The inner loop is batched over tasks
    and experts: the gradients of one summed loss are each task's own. With one expert this is MAML.

    Rates, priors, centroids and gate rows are the experts' own: they are added, frozen, saved and removed with them.
    A frozen expert's adaptation to a context is the same for ever; after ``pool.add_experts`` and the like call
    ``modmoe.sync_optimizer``.

    Args:
        pool: of experts that are made of linear maps, as ``RegressionNetwork`` and ``MLPExpert``.
        choice: who answers; None for :class:`SupportPosterior`.
        steps: S, at least 1.
        inner_rate: at which the rates start, > 0.
        second_order: differentiate through the inner gradients.
        noise_std: s, in the units of y, > 0; it takes no part in training.
        balance: in [0, 1], against collapse. It weighs ``balance_loss`` where the choice learns by gradient; a hard
            choice assigns the tasks of a training batch so that each expert's share is this part of the way from what
            it would be to 1 / E.
    Raises:
        ValueError: on an argument out of range.
    Source:
        Finn et al. 2017; rates for each step and tensor as in MAML++ (Antoniou et al. 2019).
    """

    def __init__(
        self,
        pool: ExpertPool,
        choice: ExpertChoice | None = None,
        steps: int = 5,
        inner_rate: float = 0.05,
        second_order: bool = True,
        noise_std: float = 0.1,
        balance: float = 0.0,
    ):
        super().__init__()
        if steps < 1 or not inner_rate > 0 or not noise_std > 0 or not 0 <= balance <= 1:
            raise ValueError(
                f"steps >= 1, inner_rate > 0, noise_std > 0 and balance in [0, 1] are needed, got {steps}, "
                f"{inner_rate}, {noise_std}, {balance}"
            )
        self.pool = pool
        self.choice = SupportPosterior() if choice is None else choice
        self.steps = steps
        self.second_order = second_order
        self.noise_std = noise_std
        self.balance = balance
        start = Init("constant", value=math.log(inner_rate))
        pool.declare("inner_rate", {name: RowSpec((steps,), start) for name in pool.specs("expert")})
        pool.declare("choice", self.choice.row_specs())

    def forward(self, batch: TaskBatch, families: Families | None = None) -> PointMixture:
        """Answer tasks.

        Args:
            batch: B tasks; target_y is not read. A task without context is answered by the prior and the unadapted
                experts.
            families: oracle routing. (B,) int64: the position of the expert that answers each task. Or (B, C) and
                (B, N): of each context and each target point; an expert then adapts to its own points only.
        Raises:
            ValueError: on families of another shape or range.
            NonFiniteError: if the inner loop diverges.
        """
        given, at_targets = self._check_families(batch, families)
        adapted = self.adapt(batch, given)
        stds = adapted.outputs.new_full((1, 1, 1, 1, 1), self.noise_std)
        if at_targets is not None:
            gates = _one_hot(at_targets, self.pool.num_experts, adapted.outputs).log()
            means = adapted.outputs.transpose(1, 2).unsqueeze(1)
            return PointMixture(means, stds.expand_as(means), log_gates=gates.unsqueeze(1))
        means = adapted.outputs.unsqueeze(3)
        log_weights = self._log_weights(batch, adapted.losses, families)
        if self.choice.hard and families is None:
            log_weights = _one_hot(log_weights.argmax(1), self.pool.num_experts, log_weights).log()
        return PointMixture(means, stds.expand_as(means), log_weights=log_weights)

    def loss(self, batch: TaskBatch, families: Families | None = None) -> Tensor:
        """What training minimises: () float.

        The squared error of the mixture's mean, averaged over targets and outputs, and the balance term. Where the
        choice is hard: the experts' own errors weighted by the (balanced) assignment, which takes no gradient.

        Args:
            batch: with target_y.
            families: as of :meth:`forward`.
        Raises:
            ValueError: without target_y; as :meth:`forward`.
        """
        if batch.target_y is None:
            raise ValueError("training needs target_y")
        if families is not None:
            return (self(batch, families).mean - batch.target_y).square().mean()
        adapted = self.adapt(batch)
        errors = (adapted.outputs - batch.target_y.unsqueeze(1)).square().mean((2, 3))
        log_weights = self._log_weights(batch, adapted.losses, None)
        if self.choice.hard:
            weights = balanced(log_weights.detach(), self.balance)
            if self.training:
                self.choice.observe(self.pool, "choice", batch, weights)
            return (weights * errors).sum(1).mean()
        mean = torch.einsum("be,benm->bnm", log_weights.exp(), adapted.outputs)
        return (mean - batch.target_y).square().mean() + self.balance * balance_loss(log_weights)

    def adapt(self, batch: TaskBatch, families: Tensor | None = None) -> Adapted:
        """Run the inner loop of every expert; families (B, C) as of :meth:`forward`."""
        x, y = batch.clean_context()
        weights = batch.present.to(x.dtype) / batch.present.sum(1, keepdim=True).clamp(min=1)
        weights = weights.unsqueeze(1).expand(-1, self.pool.num_experts, -1)
        if families is not None:
            weights = weights * _one_hot(families, self.pool.num_experts, x).transpose(1, 2)
        outputs: list[tuple[int, Tensor, Tensor]] = []
        for group in self.pool.groups():
            of_group = weights[:, list(group.positions)]
            at_targets, losses = self._adapt_group(group, x, y, of_group, batch.target_x)
            outputs += [(p, at_targets[:, i], losses[:, i]) for i, p in enumerate(group.positions)]
        outputs.sort(key=lambda entry: entry[0])
        adapted = Adapted(torch.stack([o for _, o, _ in outputs], 1), torch.stack([own for _, _, own in outputs], 1))
        if not bool(adapted.losses.isfinite().all()):
            raise NonFiniteError(
                "the inner loop diverged: lower inner_rate, the outer learning rate, or clip gradients"
            )
        return adapted

    def _adapt_group(self, group: Group, x: Tensor, y: Tensor, weights: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """(B, E_g, N, M) and (B, E_g): a frozen group, and all of them without gradients, leave no graph."""
        outer = torch.is_grad_enabled() and not group.frozen
        rates = self.pool.namespace("inner_rate", group.ids)
        x, y, at = x.unsqueeze(1), y.unsqueeze(1), at.unsqueeze(1)
        with torch.enable_grad():
            theta = {
                name: (tensor if outer else tensor.detach().requires_grad_()).expand(len(x), *tensor.shape)
                for name, tensor in group.tensors.items()
            }
            for step in range(self.steps):
                losses = self._errors(theta, x, y, weights)
                gradients = torch.autograd.grad(
                    losses.sum(), list(theta.values()), create_graph=outer and self.second_order
                )
                for (name, value), gradient in zip(list(theta.items()), gradients, strict=True):
                    rate = rates[name][:, step].exp().view(-1, *([1] * (value.dim() - 2)))
                    moved = value - rate * gradient
                    theta[name] = moved if outer else moved.detach().requires_grad_()
            losses = self._errors(theta, x, y, weights)
            outputs = self.pool.expert.compute(at, TaskOps(theta))
        return (outputs, losses) if outer else (outputs.detach(), losses.detach())

    def _errors(self, theta: dict[str, Tensor], x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        errors = (self.pool.expert.compute(x, TaskOps(theta)) - y).square().mean(3)
        return (errors * weights).sum(2)

    def _log_weights(self, batch: TaskBatch, losses: Tensor, families: Families | None) -> Tensor:
        if isinstance(families, Tensor):
            return _one_hot(families, self.pool.num_experts, losses).log()
        return self.choice.scores(batch, losses, self.pool.namespace("choice")).log_softmax(1)

    def _check_families(self, batch: TaskBatch, families: Families | None) -> tuple[Tensor | None, Tensor | None]:
        if families is None:
            return None, None
        shapes = ((batch.num_tasks,),)
        parts = (families,) if isinstance(families, Tensor) else families
        if not isinstance(families, Tensor):
            shapes = (tuple(batch.context_x.shape[:2]), tuple(batch.target_x.shape[:2]))
        if tuple(tuple(part.shape) for part in parts) != shapes:
            raise ValueError(f"families of shapes {shapes} are needed, got {[tuple(part.shape) for part in parts]}")
        if any(part.numel() and not 0 <= int(part.min()) <= int(part.max()) < self.pool.num_experts for part in parts):
            raise ValueError(f"families are positions of experts, in [0, {self.pool.num_experts})")
        return (None, None) if isinstance(families, Tensor) else families

    def step_cost(self, batch: TaskBatch, repeats: int = 3) -> StepCost:
        """What one training step on a batch costs; nothing is trained.

        Args:
            batch: with target_y.
            repeats: at least 1; the fastest one counts.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        was_training = self.training
        self.eval()  # centroids stay
        counter, seconds = FlopCounterMode(display=False), math.inf
        try:
            with counter:
                torch.autograd.grad(self.loss(batch), parameters, allow_unused=True)
            for _ in range(repeats):
                start = time.perf_counter()
                torch.autograd.grad(self.loss(batch), parameters, allow_unused=True)
                seconds = min(seconds, time.perf_counter() - start)
        finally:
            self.train(was_training)
        return StepCost(seconds, counter.get_total_flops())


def balanced(log_weights: Tensor, balance: float, iterations: int = 50) -> Tensor:
    """Soft assignments whose shares lie nearer to equal ones: an assignment prior over the meta batch.

    Args:
        log_weights: (B, E), normalised over E.
        balance: in [0, 1]; shares become (1 - balance) times the old ones plus balance / E.
        iterations: of Sinkhorn's scaling.
    Returns:
        (B, E), adding up to 1 over E.
    Source:
        Sinkhorn 1967, with the experts' shares as one marginal and one task each as the other.
    """
    usage = log_weights.exp().mean(0)
    target = ((1 - balance) * usage + balance / len(usage)).log()
    scaled = log_weights
    for _ in range(iterations if balance else 0):
        shares = torch.logsumexp(scaled, 0) - math.log(len(scaled))
        scaled = (scaled + target - shares).log_softmax(1)
    return scaled.exp()


def _one_hot(positions: Tensor, num_experts: int, like: Tensor) -> Tensor:
    return nn.functional.one_hot(positions, num_experts).to(like.dtype)
