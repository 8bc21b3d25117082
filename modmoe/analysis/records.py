"""What a run leaves behind, as plain numbers: one record per method and seed, and summaries over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import stdtrit


@dataclass
class Matrix:
    """A labelled table of numbers; NaN stands for "not measured".

    Args:
        values: (rows, columns) numbers, kept as float64.
        row_label: what a row is, for instance ``"after task"``.
        column_label: what a column is, for instance ``"task"``.
        row_names: one name per row.
        column_names: one name per column.
    Raises:
        ValueError: if values is not two-dimensional or a list of names has the wrong length.
    """

    values: np.ndarray
    row_label: str
    column_label: str
    row_names: list[str]
    column_names: list[str]

    def __post_init__(self) -> None:
        self.values = np.asarray(self.values, dtype=np.float64)
        if self.values.ndim != 2:
            raise ValueError(f"a Matrix needs 2-D values, got shape {self.values.shape}")
        self.row_names = [str(name) for name in self.row_names]
        self.column_names = [str(name) for name in self.column_names]
        rows, columns = self.values.shape
        if len(self.row_names) != rows:
            raise ValueError(f"values have {rows} rows but row_names has {len(self.row_names)} names")
        if len(self.column_names) != columns:
            raise ValueError(f"values have {columns} columns but column_names has {len(self.column_names)} names")


KINDS = {b"\x89PNG": "image/png", b"GIF8": "image/gif"}


@dataclass
class Picture:
    """A drawing or a film of what a method does.

    Args:
        data: a PNG or GIF file.
        caption: what is to be seen, in one sentence.
    Raises:
        ValueError: if the data are of another kind.
    """

    data: bytes
    caption: str = ""

    def __post_init__(self) -> None:
        if self.data[:4] not in KINDS:
            raise ValueError(f"a Picture is a PNG or a GIF file, these bytes start with {self.data[:4]!r}")

    @property
    def kind(self) -> str:
        """The media type."""
        return KINDS[self.data[:4]]


@dataclass
class MethodRecord:
    """What one method gives for one seed.

    Args:
        metrics: final numbers; a metric split by a condition is named ``metric/condition``.
        matrices: title -> Matrix, for instance ``"accuracy"`` (rows: after task i, columns: task j) and
            ``"routing"`` (rows: task, columns: expert).
        series: name -> one number per step, for instance ``"num_experts"`` after each task.
        about: one sentence on what the method is, for the report.
        pictures: title -> Picture; the report shows those of the first seed.
    """

    metrics: dict[str, float]
    matrices: dict[str, Matrix] = field(default_factory=dict)
    series: dict[str, list[float]] = field(default_factory=dict)
    about: str = ""
    pictures: dict[str, Picture] = field(default_factory=dict)


def summarise(per_seed: list[dict[str, MethodRecord]]) -> dict[str, dict[str, dict]]:
    """Collect every metric over the seeds: mean = sum over seeds / number of seeds.

    JSON knows no NaN or infinity, so a non-finite number becomes None (``null``); the mean is None as soon
    as one seed's number is.

    Args:
        per_seed: for each seed, method name -> record; every seed holds the same methods and metrics.
    Returns:
        ``{METHOD: {METRIC: {"mean": x, "seeds": [..]}}}``, in the order of the first seed.
    Raises:
        ValueError: if there is no seed, or a method or metric is missing in some seed (it is named).
    """
    _check_same_names(per_seed)
    summary: dict[str, dict[str, dict]] = {}
    for method, first in per_seed[0].items():
        summary[method] = {}
        for metric in first.metrics:
            numbers = [float(records[method].metrics[metric]) for records in per_seed]
            mean = math.fsum(numbers) / len(numbers) if all(map(math.isfinite, numbers)) else math.nan
            summary[method][metric] = {
                "mean": _finite(mean),
                "seeds": [_finite(number) for number in numbers],
            }
    return summary


def mean_matrices(per_seed: list[dict[str, MethodRecord]]) -> dict[str, dict[str, Matrix]]:
    """Average every matrix over the seeds, element by element (a NaN in one seed gives NaN).

    Runs may grow to different sizes: where a matrix's shape differs between seeds, or some seed lacks it,
    the first seed's matrix is taken as it is.

    Args:
        per_seed: for each seed, method name -> record.
    Returns:
        ``{METHOD: {TITLE: Matrix}}`` with the labels of the first seed.
    Raises:
        ValueError: if there is no seed, or a method or metric is missing in some seed (it is named).
    """
    _check_same_names(per_seed)
    means: dict[str, dict[str, Matrix]] = {}
    for method, record in per_seed[0].items():
        means[method] = {}
        for title, first in record.matrices.items():
            found = [records[method].matrices.get(title) for records in per_seed]
            values = [matrix.values for matrix in found if matrix is not None]
            alike = len(values) == len(per_seed) and all(v.shape == first.values.shape for v in values)
            mean = np.mean(np.stack(values), axis=0) if alike else first.values.copy()
            means[method][title] = Matrix(
                mean, first.row_label, first.column_label, first.row_names, first.column_names
            )
    return means


def half_width(seeds: Sequence[float | None]) -> float | None:
    """Half of the 95% confidence interval of the mean: t(0.975, n - 1) * s / sqrt(n).

    Args:
        seeds: n numbers, one per seed; s is their sample standard deviation.
    Returns:
        The half-width, or None for fewer than two seeds or a number that is None.
    """
    numbers = [float(number) for number in seeds if number is not None]
    n = len(numbers)
    if n < 2 or n < len(seeds):
        return None
    return float(stdtrit(n - 1, 0.975)) * float(np.std(numbers, ddof=1)) / math.sqrt(n)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _check_same_names(per_seed: list[dict[str, MethodRecord]]) -> None:
    if not per_seed:
        raise ValueError("there is no seed to summarise")
    methods = {method: None for records in per_seed for method in records}
    for seed, records in enumerate(per_seed):
        for method in methods:
            if method not in records:
                raise ValueError(f"method '{method}' is missing in seed number {seed}")
    for method in methods:
        metrics = {metric: None for records in per_seed for metric in records[method].metrics}
        for seed, records in enumerate(per_seed):
            for metric in metrics:
                if metric not in records[method].metrics:
                    raise ValueError(f"metric '{metric}' of method '{method}' is missing in seed number {seed}")
