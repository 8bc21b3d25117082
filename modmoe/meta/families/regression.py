"""The five families of one-dimensional functions of MMAML, in three variants: (a), (b) and (c).

Axes: B tasks, C context points, N target points, F families.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modmoe.meta.task_batch import TaskBatch

FAMILIES = ("sine", "line", "quadratic", "tanh", "absolute")
VARIANTS = ("a", "b", "mix", "c")
X_BOUND = 5.0
BREAKPOINT_BOUND = 2.5


@dataclass(frozen=True)
class FamilyTasks:
    """Tasks, and what an oracle may know of them.

    Args:
        batch: the points, divided by the scales of the family.
        context_family: (B, C) int64, the family that made each context point; -1 where the mask says no point is.
        target_family: (B, N) int64.
        clean_y: (B, N, 1), the targets without noise, scaled as the batch is.
        breakpoint: (B,), where the family switches, scaled as x is; NaN in a task of one family.
    """

    batch: TaskBatch
    context_family: Tensor
    target_family: Tensor
    clean_y: Tensor
    breakpoint: Tensor

    def with_context(self, num_context: int) -> "FamilyTasks":
        """The same tasks and targets, with the first so many context points.

        Raises:
            ValueError: if there are fewer.
        """
        held = self.batch.context_x.shape[1]
        if not 0 <= num_context <= held:
            raise ValueError(f"the tasks hold {held} context points, asked for {num_context}")
        batch, mask = self.batch, self.batch.context_mask
        shorter = TaskBatch(
            batch.context_x[:, :num_context],
            batch.context_y[:, :num_context],
            batch.target_x,
            batch.target_y,
            None if mask is None else mask[:, :num_context],
        )
        families = self.context_family[:, :num_context]
        return FamilyTasks(shorter, families, self.target_family, self.clean_y, self.breakpoint)


class FiveFamilies:
    """Functions of x in [-5, 5] from up to five families, with noise of standard deviation .3.

    y = f(x) + .3 e, where f is one of
    sine A sin(x - p), A in [.1, 5], p in [0, pi]; line m x + b; quadratic q (x - c)^2 + b; tanh m tanh(x - c) + b;
    absolute q |x - c| + b; with m, b, c in [-3, 3] and |q| in [.02, .15] of either sign, everything uniform.

    Variant "a" draws one family a task. Variant "b" draws two, and the second holds where x is above a breakpoint in
    [-2.5, 2.5]. "mix" makes every second task one of "b". "c" is for families that come one after the other: at
    stage s a task is of ``families[s]``.

    Args:
        families: which, and in what order they come in variant "c".
        noise: standard deviation, > 0.
        x_scale, y_scale: what x and y are divided by. The default puts x into [-1, 1] and the noise at .1.
    Raises:
        ValueError: if a family is unknown or named twice, or a number is not positive.
    Source:
        Vuorio et al. 2019, Multimodal Model-Agnostic Meta-Learning, the regression tasks; the ranges are those of
        modmoe's facts on meta-learning. (b), (c) and the scales are ours.
    """

    def __init__(
        self, families: Sequence[str] = FAMILIES, noise: float = 0.3, x_scale: float = 5.0, y_scale: float = 3.0
    ):
        if unknown := [name for name in families if name not in FAMILIES]:
            raise ValueError(f"unknown family {unknown[0]!r}, choose from {', '.join(FAMILIES)}")
        if not families or len(set(families)) != len(families):
            raise ValueError(f"families are one or more different names, got {tuple(families)}")
        if not all(value > 0 for value in (noise, x_scale, y_scale)):
            raise ValueError(f"noise, x_scale and y_scale are positive, got {noise}, {x_scale}, {y_scale}")
        self.families: tuple[str, ...] = tuple(families)
        self.noise, self.x_scale, self.y_scale = noise, x_scale, y_scale

    @property
    def noise_nll(self) -> float:
        """The negative log-likelihood of a point for one who knows the function: ln(noise / y_scale sqrt(2 pi e))."""
        return math.log(self.noise / self.y_scale) + 0.5 * math.log(2 * math.pi * math.e)

    def sample(
        self,
        num_tasks: int,
        context: int | tuple[int, int],
        targets: int,
        generator: torch.Generator | None = None,
        variant: str = "mix",
        stage: int | None = None,
    ) -> FamilyTasks:
        """Draw tasks.

        Args:
            num_tasks: B, 1 or more.
            context: points in the context, 0 or more; (low, high) draws a number for each task and pads with a mask.
            targets: N, 1 or more, drawn anew: they are not the context's.
            generator: where the randomness comes from; None is torch's own.
            variant: "a", "b", "mix" or "c".
            stage: for "c", which of the families has come; None otherwise.
        Returns:
            float32 tasks with D = M = 1. Family numbers count in ``FAMILIES``, whatever ``families`` holds.
        Raises:
            ValueError: if a number or the variant is out of range, or "b" has a single family to draw from.
        """
        self._check(num_tasks, targets, variant, stage)
        low, high = context_bounds(context)
        num_points = high + targets
        x = _uniform((num_tasks, num_points), -X_BOUND, X_BOUND, generator)
        curves = _curves(num_tasks, x, generator)
        family, breakpoint = self._assign(num_tasks, x, variant, stage, generator)
        clean = curves.gather(2, family.unsqueeze(2)).squeeze(2)
        y = clean + self.noise * torch.randn(num_tasks, num_points, generator=generator)
        x, y, clean = ((values / scale).unsqueeze(2) for values, scale in self._scaled(x, y, clean))
        mask = random_mask(num_tasks, low, high, generator)
        batch = TaskBatch(x[:, :high], y[:, :high], x[:, high:], y[:, high:], mask)
        context_family = family[:, :high] if mask is None else family[:, :high].masked_fill(~mask, -1)
        return FamilyTasks(batch, context_family, family[:, high:], clean[:, high:], breakpoint / self.x_scale)

    def evaluation_sets(
        self,
        seed: int,
        num_tasks: int = 500,
        contexts: Sequence[int] = (3, 5, 10),
        targets: int = 30,
        variant: str = "mix",
        stage: int | None = None,
    ) -> dict[int, FamilyTasks]:
        """Fixed tasks to compare models on: equal for equal seeds, the same tasks and targets for every context size.

        Returns:
            Context size -> tasks; a smaller context is the beginning of a larger one.
        Raises:
            ValueError: as ``sample`` does, or if no size is given.
        """
        if not contexts:
            raise ValueError("contexts names no size")
        largest = self.sample(num_tasks, max(contexts), targets, torch.Generator().manual_seed(seed), variant, stage)
        return {size: largest.with_context(size) for size in contexts}

    def _scaled(self, x: Tensor, y: Tensor, clean: Tensor) -> list[tuple[Tensor, float]]:
        return [(x, self.x_scale), (y, self.y_scale), (clean, self.y_scale)]

    def _check(self, num_tasks: int, targets: int, variant: str, stage: int | None) -> None:
        if num_tasks < 1 or targets < 1:
            raise ValueError(f"num_tasks and targets are 1 or more, got {num_tasks} and {targets}")
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}, choose from {', '.join(VARIANTS)}")
        if variant in ("b", "mix") and len(self.families) < 2:
            raise ValueError(
                f"variant {variant!r} switches between two families, there is only {', '.join(self.families)}"
            )
        if (stage is None) == (variant == "c"):
            raise ValueError(f"variant 'c' has a stage and no other does, got {variant!r} with stage {stage}")
        if stage is not None and not 0 <= stage < len(self.families):
            raise ValueError(f"stage is one of 0 to {len(self.families) - 1}, got {stage}")

    def _assign(
        self, num_tasks: int, x: Tensor, variant: str, stage: int | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """(B, P) family numbers and (B,) breakpoints. All is always drawn, so that a seed's "a" and "b" tasks pair."""
        count = len(self.families)
        first = torch.randint(count, (num_tasks,), generator=generator)
        step = torch.randint(1, max(count, 2), (num_tasks,), generator=generator)
        breakpoint = _uniform((num_tasks,), -BREAKPOINT_BOUND, BREAKPOINT_BOUND, generator)
        switches = {"b": torch.ones(num_tasks).bool(), "mix": torch.arange(num_tasks) % 2 == 1}.get(variant)
        if switches is None:
            switches = torch.zeros(num_tasks).bool()
        if stage is not None:
            first = torch.full_like(first, stage)
        numbers = torch.tensor([FAMILIES.index(name) for name in self.families])
        second = numbers[(first + step) % count].unsqueeze(1)
        later = switches.unsqueeze(1) & (x > breakpoint.unsqueeze(1))
        return torch.where(later, second, numbers[first].unsqueeze(1)), breakpoint.masked_fill(~switches, math.nan)


def context_bounds(context: int | tuple[int, int]) -> tuple[int, int]:
    """The least and the largest number of context points.

    Raises:
        ValueError: if they are negative or the wrong way round.
    """
    low, high = (context, context) if isinstance(context, int) else context
    if not 0 <= low <= high:
        raise ValueError(f"context is a number of points or (low, high) with 0 <= low <= high, got {context}")
    return low, high


def random_mask(num_tasks: int, low: int, high: int, generator: torch.Generator | None) -> Tensor | None:
    """(B, high) bool: in each task the first low to high points, uniformly many; None where low equals high."""
    if low == high:
        return None
    sizes = torch.randint(low, high + 1, (num_tasks, 1), generator=generator)
    return torch.arange(high) < sizes


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator | None) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _curves(num_tasks: int, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B, P) -> (B, P, F): one function of every family for each task."""

    def draw(low: float, high: float) -> Tensor:
        return _uniform((num_tasks, 1), low, high, generator)

    def draw_flat() -> Tensor:
        sign = 2.0 * torch.randint(2, (num_tasks, 1), generator=generator) - 1.0
        return sign * draw(0.02, 0.15)

    return torch.stack(
        [
            draw(0.1, 5.0) * torch.sin(x - draw(0.0, math.pi)),
            draw(-3.0, 3.0) * x + draw(-3.0, 3.0),
            draw_flat() * (x - draw(-3.0, 3.0)).square() + draw(-3.0, 3.0),
            draw(-3.0, 3.0) * torch.tanh(x - draw(-3.0, 3.0)) + draw(-3.0, 3.0),
            draw_flat() * (x - draw(-3.0, 3.0)).abs() + draw(-3.0, 3.0),
        ],
        2,
    )
