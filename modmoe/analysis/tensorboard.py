"""Write TensorBoard events: what a method gave for one seed, and how evenly a layer uses its experts."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from modmoe.analysis.records import Matrix, MethodRecord
from modmoe.analysis.usage import usage_metrics
from modmoe.hosts import import_host
from modmoe.routing import Routing

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


def write_events(directory: str | Path, record: MethodRecord) -> None:
    """Write a record: series and final metrics as scalars, matrices as heat-map images.

    A series gets its own tag with its index as the step; a metric is written once under ``final/<metric>``.
    Non-finite numbers are skipped, for TensorBoard cannot draw them.

    Args:
        directory: folder of the events; made if needed.
        record: what one method gave for one seed.
    Raises:
        MissingExtraError: if there is a matrix to draw and matplotlib is not installed.
    """
    # Imported here: it costs seconds, and reading or summarising records does not need it.
    from torch.utils.tensorboard.writer import SummaryWriter

    with SummaryWriter(log_dir=str(directory)) as writer:
        for name, numbers in record.series.items():
            for step, number in enumerate(numbers):
                if math.isfinite(number):
                    writer.add_scalar(name, number, global_step=step)
        for metric, number in record.metrics.items():
            if math.isfinite(number):
                writer.add_scalar(f"final/{metric}", number, global_step=0)
        for title, matrix in record.matrices.items():
            if matrix.values.size:
                writer.add_figure(title, _figure(title, matrix), global_step=0, close=True)


def write_usage(
    writer: "SummaryWriter", routing: Routing, step: int, tag: str = "usage", tasks: Tensor | None = None
) -> None:
    """Write the numbers of :func:`modmoe.analysis.usage_metrics` as scalars ``<tag>/<metric>``.

    Args:
        writer: where to; it is left open.
        routing: of one layer.
        step: of the training.
        tag: one for each layer.
        tasks: see usage_metrics.
    Raises:
        ValueError: as usage_metrics.
    """
    for name, number in usage_metrics(routing, tasks).items():
        writer.add_scalar(f"{tag}/{name}", number, global_step=step)


def _figure(title: str, matrix: Matrix) -> Any:
    # A Figure of its own, not pyplot's: a training script's current figure stays as it is.
    figure_module = import_host("matplotlib.figure")
    rows, columns = matrix.values.shape
    figure = figure_module.Figure(
        figsize=(min(2.0 + 0.6 * columns, 16.0), min(1.6 + 0.5 * rows, 16.0)), layout="constrained"
    )
    axes = figure.add_subplot()
    finite = np.isfinite(matrix.values)
    shown = np.ma.masked_array(np.where(finite, matrix.values, 0.0), mask=~finite)
    within_unit = bool(np.all((matrix.values[finite] >= 0) & (matrix.values[finite] <= 1)))
    limits = {"vmin": 0.0, "vmax": 1.0} if within_unit else {}
    image = axes.imshow(shown, cmap="Blues", aspect="auto", **limits)
    axes.set_title(title)
    axes.set_xlabel(matrix.column_label)
    axes.set_ylabel(matrix.row_label)
    axes.set_xticks(range(columns), matrix.column_names, rotation=45 if columns > 8 else 0)
    axes.set_yticks(range(rows), matrix.row_names)
    for row, column in np.argwhere(finite):
        number = matrix.values[row, column]
        colour = "white" if image.norm(number) > 0.55 else "black"
        axes.text(column, row, f"{number:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes)
    return figure
