"""What a sequence of tasks did to a learner, read from its evaluation matrix.

P[i, j] is the performance on task j after training on tasks 0 to i, both counted from 0, T tasks in all. Row i is what
``TaskSequence.evaluate`` gives then. Higher must be better.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def average_performance(matrix: ArrayLike) -> float:
    """mean_j P[T-1, j].

    Source:
        Lopez-Paz and Ranzato 2017, ACC; Wołczyk et al. 2021, P(T).
    """
    return float(square(matrix)[-1].mean())


def forgetting_by_task(matrix: ArrayLike) -> Floats:
    """F_j = P[j, j] - P[T-1, j]: what was lost between the end of task j's training and the end of all.

    Args:
        matrix: (T, T).
    Returns:
        (T,); the last entry is 0, a negative one is a gain.
    Source:
        Wołczyk et al. 2021 (Continual World), F_i. Chaudhry et al. 2018 take the maximum over rows for the first term.
    """
    performance = square(matrix)
    return performance.diagonal() - performance[-1]


def forgetting(matrix: ArrayLike) -> float:
    """F = mean_j F_j over all T tasks, the last, which cannot be forgotten, included.

    Source:
        Wołczyk et al. 2021. Where T > 1, this is -(T-1)/T times ``backward_transfer``.
    """
    return float(forgetting_by_task(matrix).mean())


def backward_transfer(matrix: ArrayLike) -> float:
    """BWT = 1/(T-1) sum_{j<T-1} (P[T-1, j] - P[j, j]); negative means forgetting.

    Raises:
        ValueError: if there are fewer than two tasks.
    Source:
        Lopez-Paz and Ranzato 2017 (GEM), BWT.
    """
    performance = several(matrix)
    return float((performance[-1] - performance.diagonal())[:-1].mean())


def forward_transfer(matrix: ArrayLike, baseline: ArrayLike) -> float:
    """FWT = 1/(T-1) sum_{j>0} (P[j-1, j] - b_j): what earlier tasks gave task j before it was trained.

    Args:
        matrix: (T, T).
        baseline: (T,) performance of the untrained learner; b_0 is not used.
    Raises:
        ValueError: if there are fewer than two tasks, or not as many baselines as tasks.
    Source:
        Lopez-Paz and Ranzato 2017 (GEM), FWT.
    """
    performance = several(matrix)
    untrained = np.asarray(baseline, np.float64)
    if untrained.shape != (len(performance),):
        raise ValueError(f"baseline must have shape ({len(performance)},), one number a task, not {untrained.shape}")
    return float((performance.diagonal(1) - untrained[1:]).mean())


def learning_transfer(curve: Sequence[float], baseline_curve: Sequence[float], best: float = 1.0) -> float:
    """FT = (AUC - AUC_b) / (best - AUC_b): how much faster a task was learned than from scratch.

    AUC is the mean height of the curve by the trapezoidal rule. 1 means perfect from the start, 0 no help.

    Args:
        curve: performance on the task at equally spaced times while it was trained in the sequence, start and end
            included.
        baseline_curve: the same for a learner that was trained on this task alone.
        best: the greatest performance there is. The paper's is a success rate, so 1; for returns pass the oracle's.
    Raises:
        ValueError: if a curve has fewer than two points, or the baseline is as good as the best.
    Source:
        Wołczyk et al. 2021 (Continual World), FT_i; the mean over tasks is theirs.
    """
    area, baseline = mean_height(curve), mean_height(baseline_curve)
    if not baseline < best:
        raise ValueError(f"the baseline's area {baseline:g} must be below best={best:g}")
    return (area - baseline) / (best - baseline)


def mean_height(curve: Sequence[float]) -> float:
    heights = np.asarray(curve, np.float64)
    if heights.ndim != 1 or len(heights) < 2:
        raise ValueError(f"a curve must be two or more numbers, not an array of shape {heights.shape}")
    return float(((heights[1:] + heights[:-1]) / 2).mean())


def square(matrix: ArrayLike) -> Floats:
    performance = np.asarray(matrix, np.float64)
    if performance.ndim != 2 or performance.shape[0] != performance.shape[1] or len(performance) == 0:
        raise ValueError(f"matrix must be (T, T), tasks trained by tasks evaluated, not {performance.shape}")
    return performance


def several(matrix: ArrayLike) -> Floats:
    performance = square(matrix)
    if len(performance) < 2:
        raise ValueError("transfer needs two tasks at least")
    return performance
