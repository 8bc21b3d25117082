"""When nobody explains a task: a threshold on the evidence, calibrated on families that are known."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from scipy.special import bdtrc
from torch import Tensor

from modmoe.meta.evidence.experts import EvidenceExperts
from modmoe.meta.task_batch import TaskBatch


@dataclass(frozen=True)
class NoveltyTest:
    """A task is novel if ln p(context) lies below what all but a share of known tasks of its size reach.

    The evidence is the mixture's, which is at most ln(1 / pi_k) below the best expert's and, with a switch gate, counts
    tasks as known that switch between known experts. Sizes between calibrated ones are interpolated; below the smallest
    the line goes to 0 at size 0, above the largest it goes on with the last slope. An empty context is never novel.

    Args:
        sizes: context sizes, ascending, at least 1.
        thresholds: ln p, one for each size.
        quantile: the share of known tasks that the test calls novel.
    """

    sizes: tuple[int, ...]
    thresholds: tuple[float, ...]
    quantile: float

    def threshold(self, num_context: Tensor) -> Tensor:
        """The threshold for context sizes: int (B,) -> float64 (B,)."""
        x = torch.tensor([0, *self.sizes], dtype=torch.float64)
        y = torch.tensor([0.0, *self.thresholds], dtype=torch.float64)
        n = num_context.cpu().double()
        left = (torch.searchsorted(x, n) - 1).clamp(0, len(self.sizes) - 1)
        slope = (y[left + 1] - y[left]) / (x[left + 1] - x[left])
        return (y[left] + slope * (n - x[left])).to(num_context.device)

    @torch.no_grad()
    def is_novel(self, model: EvidenceExperts, tasks: TaskBatch, experts: Sequence[int] | None = None) -> Tensor:
        """(B,) bool: whether no expert explains a task; of known families a share ``quantile`` is."""
        return model.log_evidence(tasks, experts) < self.threshold(tasks.present.sum(1))

    def nobody_explains(
        self,
        model: EvidenceExperts,
        tasks: TaskBatch,
        experts: Sequence[int] | None = None,
        significance: float = 1e-3,
    ) -> bool:
        """Whether a batch is of a new family: too many of its tasks are novel to be chance.

        Of B known tasks with a context, Binomial(B, quantile) are called novel; the answer is True where as many as
        were found, or more, have a probability below ``significance``. Tasks without a context are left out.
        """
        num_tasks = int((tasks.present.sum(1) > 0).sum())
        num_novel = int(self.is_novel(model, tasks, experts).sum())
        # bdtrc(k, n, p) is the probability of more than k
        return num_novel > 0 and float(bdtrc(num_novel - 1, num_tasks, self.quantile)) < significance


@torch.no_grad()
def calibrate_novelty(
    model: EvidenceExperts,
    batches: Iterable[TaskBatch],
    quantile: float = 0.05,
    experts: Sequence[int] | None = None,
) -> NoveltyTest:
    """Set the thresholds on held-out tasks of the known families.

    Args:
        model: trained.
        batches: tasks that it was not trained on; tasks of equal context size are taken together, 1 / quantile of a
            size at least. Tasks without a context are left out.
        quantile: in (0, 1), the share of known tasks that the test may call novel.
        experts: the ids that count; None for all.
    Raises:
        ValueError: on a quantile outside (0, 1), no tasks, or too few tasks of a size.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must lie in (0, 1), got {quantile}")
    found: dict[int, list[Tensor]] = {}
    for tasks in batches:
        evidence, sizes = model.log_evidence(tasks, experts), tasks.present.sum(1)
        for size in sizes.unique().tolist():
            if size:
                found.setdefault(size, []).append(evidence[sizes == size].double().cpu())
    evidences = {size: torch.cat(found[size]) for size in sorted(found)}
    few = {size: len(values) for size, values in evidences.items() if len(values) * quantile < 1}
    if few or not evidences:
        raise ValueError(f"a quantile of {quantile} needs {1 / quantile:.0f} tasks of each context size, got {few}")
    thresholds = tuple(float(values.quantile(quantile)) for values in evidences.values())
    return NoveltyTest(tuple(evidences), thresholds, quantile)
