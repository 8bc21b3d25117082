"""Functions drawn from Gaussian processes, with the exact answer of one who knows the kernel.

Axes: B tasks, C context points, N target points, P = C + N.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modmoe.meta.families.regression import context_bounds, random_mask
from modmoe.meta.predictive import FunctionMixture
from modmoe.meta.task_batch import TaskBatch

KERNELS = ("rbf", "matern52", "periodic")
Range = tuple[float, float]


@dataclass(frozen=True)
class GaussianProcessTasks:
    """Tasks, and the kernel of each.

    Args:
        batch: the points.
        kernel: "rbf", "matern52" or "periodic".
        lengthscale, scale, period: (B,) float64; the period counts for "periodic" only.
        noise: standard deviation.
    """

    batch: TaskBatch
    kernel: str
    lengthscale: Tensor
    scale: Tensor
    period: Tensor
    noise: float

    def covariance(self, x: Tensor, others: Tensor) -> Tensor:
        """(B, P, 1) and (B, Q, 1) -> (B, P, Q) float64, without noise."""
        distance = (x.double() - others.double().mT).abs()
        length = self.lengthscale[:, None, None]
        if self.kernel == "rbf":
            shape = torch.exp(-0.5 * (distance / length).square())
        elif self.kernel == "matern52":
            far = math.sqrt(5) * distance / length
            shape = (1 + far + far.square() / 3) * torch.exp(-far)
        else:
            wave = torch.sin(math.pi * distance / self.period[:, None, None]) / length
            shape = torch.exp(-2 * wave.square())
        return self.scale[:, None, None].square() * shape

    def oracle(self) -> FunctionMixture:
        """The targets' exact distribution given the context, for one who knows kernel and noise.

        mean = K_nc (K_cc + s^2 I)^-1 y_c, covariance = K_nn + s^2 I - K_nc (K_cc + s^2 I)^-1 K_cn.

        Returns:
            One Gaussian function (L = 1) in float64: ``log_marginal`` and ``log_joint`` want ``target_y.double()``.
        Source:
            Rasmussen and Williams 2006, equations 2.22 to 2.24, with noise on the targets too.
        """
        batch, present = self.batch, self.batch.present
        context_x, context_y = (values.double() for values in batch.clean_context())
        both = present.unsqueeze(2) & present.unsqueeze(1)
        # a point that is not there stands by itself: it is independent of everything
        inner = self.covariance(context_x, context_x).masked_fill(~both, 0.0)
        inner = inner + torch.diag_embed(torch.where(present, self.noise**2, 1.0).double())
        cross = self.covariance(batch.target_x, context_x).masked_fill(~present.unsqueeze(1), 0.0)
        factor = torch.linalg.cholesky(inner)
        whitened = torch.linalg.solve_triangular(factor, cross.mT, upper=False)
        mean = whitened.mT @ torch.linalg.solve_triangular(factor, context_y, upper=False)
        own = self.covariance(batch.target_x, batch.target_x)
        own = own + self.noise**2 * torch.eye(own.shape[1], dtype=own.dtype)
        covariance = own - whitened.mT @ whitened
        return FunctionMixture(mean[:, None], covariance[:, None], mean.new_zeros(batch.num_tasks, 1))


class GaussianProcessFamily:
    """Functions of x in [-2, 2] from Gaussian processes whose hyper-parameters are drawn for each task.

    rbf s^2 exp(-d^2 / 2 l^2); matern52 s^2 (1 + a + a^2 / 3) exp(-a), a = sqrt(5) d / l;
    periodic s^2 exp(-2 sin^2(pi d / p) / l^2).

    Args:
        kernel: "rbf", "matern52" or "periodic".
        lengthscale, scale, period: (low, high), > 0; every task draws its own, uniformly. A pair of equal numbers fixes
            one.
        noise: standard deviation, > 0.
    Raises:
        ValueError: if the kernel is unknown or a range empty or not positive.
    Source:
        The ranges of Nguyen and Grover 2022, Transformer Neural Processes: x in [-2, 2], l in [.1, .6], s in [.1, 1],
        p in [.1, .5], noise .02. Theirs draws contexts of 3 to 46 points and targets that fill up to 50.
    """

    def __init__(
        self,
        kernel: str = "rbf",
        lengthscale: Range = (0.1, 0.6),
        scale: Range = (0.1, 1.0),
        period: Range = (0.1, 0.5),
        noise: float = 0.02,
    ):
        if kernel not in KERNELS:
            raise ValueError(f"unknown kernel {kernel!r}, choose from {', '.join(KERNELS)}")
        for name, (low, high) in (("lengthscale", lengthscale), ("scale", scale), ("period", period)):
            if not 0 < low <= high:
                raise ValueError(f"{name} is (low, high) with 0 < low <= high, got {(low, high)}")
        if not noise > 0:
            raise ValueError(f"noise is positive, got {noise}")
        self.kernel, self.noise = kernel, noise
        self.lengthscale, self.scale, self.period = lengthscale, scale, period

    def sample(
        self,
        num_tasks: int,
        context: int | tuple[int, int],
        targets: int,
        generator: torch.Generator | None = None,
    ) -> GaussianProcessTasks:
        """Draw tasks.

        Args:
            num_tasks: B, 1 or more.
            context: points in the context, 0 or more; (low, high) draws a number for each task and pads with a mask.
            targets: N, 1 or more.
            generator: where the randomness comes from; None is torch's own.
        Returns:
            float32 tasks with D = M = 1, drawn in float64.
        Raises:
            ValueError: if a number is out of range.
        """
        if num_tasks < 1 or targets < 1:
            raise ValueError(f"num_tasks and targets are 1 or more, got {num_tasks} and {targets}")
        low, high = context_bounds(context)
        num_points = high + targets

        def draw(bounds: Range, *shape: int) -> Tensor:
            uniform = torch.rand(num_tasks, *shape, generator=generator, dtype=torch.float64)
            return bounds[0] + (bounds[1] - bounds[0]) * uniform

        # rounded first, so that the covariance is that of the x which the task shows
        x = draw((-2.0, 2.0), num_points, 1).float()
        hyper = draw(self.lengthscale), draw(self.scale), draw(self.period)
        normal = torch.randn(num_tasks, num_points, 1, generator=generator, dtype=torch.float64)
        mask = random_mask(num_tasks, low, high, generator)
        empty = TaskBatch(x[:, :high], torch.zeros_like(x[:, :high]), x[:, high:], None, mask)
        tasks = GaussianProcessTasks(empty, self.kernel, *hyper, self.noise)
        noise = self.noise**2 * torch.eye(num_points, dtype=torch.float64)
        y = (torch.linalg.cholesky(tasks.covariance(x, x) + noise) @ normal).float()
        batch = TaskBatch(x[:, :high], y[:, :high], x[:, high:], y[:, high:], mask)
        return GaussianProcessTasks(batch, self.kernel, *hyper, self.noise)
