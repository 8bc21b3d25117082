"""Two regression tasks whose relatedness is a number."""

import math
from collections.abc import Sequence

import torch

from modmoe.multitask.data import MultiTaskData
from modmoe.multitask.model import TaskKind

FREQUENCIES = (1.0, 2.0)


def synthetic_tasks(
    rho: float,
    num_samples: Sequence[int],
    num_features: int = 100,
    scale: float = 1.0,
    noise_std: float = 0.1,
    frequencies: Sequence[float] = FREQUENCIES,
    seed: int = 0,
) -> list[MultiTaskData]:
    """Draw two tasks and data sets of them: y_k = w_k . x + sum_i sin(a_i w_k . x + b_i) + noise.

    w_1 = c u_1 and w_2 = c (rho u_1 + sqrt(1 - rho^2) u_2) with orthonormal u, so that rho is their cosine;
    x ~ N(0, I); the phases b_i are uniform in [0, 2 pi) and, as the a_i, the same for both tasks.

    Args:
        rho: in [-1, 1]; 1 for tasks that differ by their noise only.
        num_samples: of each data set.
        num_features: d, at least 2.
        scale: c.
        noise_std: of the noise, at least 0.
        frequencies: the a_i.
        seed: fixes tasks and data.
    Returns:
        One for each entry of num_samples, with the tasks "task_0" and "task_1" and dense features only.
    Raises:
        ValueError: on a number out of range.
    Source:
        Ma et al. 2018 (MMoE), the synthetic data generation. The paper leaves c, a and b open; its noise is N(0, 0.01),
        read here as a variance.
    """
    if not -1 <= rho <= 1 or num_features < 2 or noise_std < 0:
        raise ValueError(
            "rho must lie in [-1, 1], num_features be at least 2 and noise_std not negative, "
            f"got {rho}, {num_features} and {noise_std}"
        )
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(num_features, 2, generator=generator, dtype=torch.float64)).Q
    weights = scale * torch.stack([u[:, 0], rho * u[:, 0] + math.sqrt(1 - rho**2) * u[:, 1]])
    phases = 2 * math.pi * torch.rand(len(frequencies), generator=generator, dtype=torch.float64)
    waves = torch.tensor(list(frequencies), dtype=torch.float64)
    sets = []
    for count in num_samples:
        x = torch.randn(count, num_features, generator=generator, dtype=torch.float64)
        z = x @ weights.T
        y = z + torch.sin(z.unsqueeze(2) * waves + phases).sum(2)
        y = (y + noise_std * torch.randn(y.shape, generator=generator, dtype=torch.float64)).float()
        tasks: dict[str, TaskKind] = {f"task_{k}": "regression" for k in range(2)}
        sets.append(MultiTaskData(x.float(), None, {name: y[:, k] for k, name in enumerate(tasks)}, tasks))
    return sets
