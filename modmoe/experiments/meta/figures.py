"""Figures of what models predict, as PNG pictures for the report.

Axes: B tasks, N target points, K experts (or components).
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from modmoe.analysis import Picture
from modmoe.hosts import import_host
from modmoe.meta import PointMixture, Predictive, TaskBatch
from modmoe.meta.evidence import LinearMixture, SwitchMixture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# distinct to readers with any kind of colour vision (Okabe and Ito 2008), without black and yellow
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
GREY, INK = "#B8B8B8", "#222222"
HIDDEN = (0.23, 0.44, 0.71)  # pixels that are not shown


def expert_curves(predictive: Predictive, latents_are_experts: bool = False) -> tuple[Tensor, Tensor]:
    """What each expert expects at each target, and the weight it has there.

    Args:
        predictive: with one output.
        latents_are_experts: whether the L of a PointMixture are experts with functions of their own, as RoutedMAML's
            are; else they are draws, and its K are the experts.
    Returns:
        (B, K, N), averaged over draws where there are draws of latents, and (B, N, K), adding up to 1 over K.
    Raises:
        TypeError: if the prediction is of another kind.
    """
    if isinstance(predictive, LinearMixture | SwitchMixture):
        return predictive.means[..., 0], predictive.assignment
    if not isinstance(predictive, PointMixture):
        raise TypeError(f"the experts of a {type(predictive).__name__} are not known")
    weights = predictive.log_weights.exp()
    means, gates = predictive.means[..., 0], predictive.log_gates.exp()  # (B, L, N, K)
    if latents_are_experts:
        return means[..., 0], weights.unsqueeze(1).expand(-1, means.shape[2], -1)
    return torch.einsum("bl,blnk->bkn", weights, means), torch.einsum("bl,blnk->bnk", weights, gates)


def draw_predictions(
    batch: TaskBatch,
    clean_y: Tensor,
    predictive: Predictive,
    titles: Sequence[str],
    caption: str,
    latents_are_experts: bool = False,
) -> Picture:
    """A panel for each task: its points, the truth, the prediction, each expert's curve, and who answers where.

    Args:
        batch: B tasks with D = M = 1; the targets are spread over x.
        clean_y: (B, N, 1), the truth at the targets.
        predictive: of the tasks.
        titles: one for each task.
        caption: of the picture.
        latents_are_experts: as of `expert_curves`.
    """
    curves, weights = (values.detach().cpu() for values in expert_curves(predictive, latents_are_experts))
    mean = predictive.mean[..., 0].detach().cpu()
    num_tasks, num_experts = curves.shape[:2]
    figure = _figure(3.4 * num_tasks, 3.6)
    axes = figure.subplots(2, num_tasks, squeeze=False, height_ratios=[5, 1], sharex="col")
    for task in range(num_tasks):
        order = batch.target_x[task, :, 0].argsort()
        x, truth = batch.target_x[task, order, 0], clean_y[task, order, 0]
        upper, lower = axes[:, task]
        upper.plot(x, truth, color=GREY, linewidth=4, label="truth", solid_capstyle="round")
        for expert in range(num_experts if num_experts > 1 else 0):
            strength = float(weights[task, :, expert].mean())
            colour = COLOURS[expert % len(COLOURS)]
            label = f"expert {expert}: {strength:.2f}"
            upper.plot(x, curves[task, expert, order], color=colour, alpha=0.3 + 0.7 * strength, label=label)
        upper.plot(x, mean[task, order], color=INK, linestyle="--", linewidth=1.2, label="mean")
        seen = batch.present[task]
        points = batch.context_x[task, seen, 0], batch.context_y[task, seen, 0]
        upper.scatter(*points, color=INK, s=28, zorder=5, label="context")
        spread = max(float(truth.abs().max()), float(points[1].abs().max()) if len(points[1]) else 0.0)
        upper.set_ylim(-1.5 * spread - 0.1, 1.5 * spread + 0.1)
        upper.set_title(titles[task], fontsize=9)
        upper.legend(fontsize=6, loc="upper left", framealpha=0.6)
        colours = [COLOURS[expert % len(COLOURS)] for expert in range(num_experts)]
        lower.stackplot(x, weights[task, order].T.numpy(), colors=colours, linewidth=0)
        lower.set(ylim=(0, 1), yticks=[0, 1], xlim=(float(x[0]), float(x[-1])))
        for axis in (upper, lower):
            axis.tick_params(labelsize=7)
    axes[1, 0].set_ylabel("weight", fontsize=7)
    # fixed margins, and legends in fixed corners: to let matplotlib find the best ones takes seconds
    figure.subplots_adjust(0.5 / (3.4 * num_tasks), 0.08, 1 - 0.1 / (3.4 * num_tasks), 0.93, 0.12, 0.08)
    return _png(figure, caption)


def draw_images(rows: Sequence[tuple[str, Tensor]], caption: str) -> Picture:
    """Rows of pictures of one size: (title, (B, height, width)), greys in [0, 1]; NaN is drawn in blue."""
    size = rows[0][1].shape[1:]
    columns = max(len(images) for _, images in rows)
    gap = max(1, size[1] // 8)
    step = size[0] + gap, size[1] + gap
    # one array for all, since a figure of many axes is slow to draw; what no picture covers is transparent
    canvas = np.zeros((len(rows) * step[0] - gap, columns * step[1] - gap, 4))
    for row, (_, images) in enumerate(rows):
        for column, image in enumerate(images.detach().cpu().numpy()):
            grey = np.repeat(image.clip(0, 1)[..., None], 3, 2)
            painted = np.where(np.isnan(grey), HIDDEN, grey)
            place = np.s_[row * step[0] : row * step[0] + size[0], column * step[1] : column * step[1] + size[1]]
            canvas[place] = np.concatenate([painted, np.ones((*size, 1))], 2)
    figure = _figure(0.8 * columns + 1.2, 0.8 * len(rows))
    axis = figure.add_axes((1.1 / (0.8 * columns + 1.2), 0, 0.8 * columns / (0.8 * columns + 1.2), 1))
    axis.imshow(canvas, interpolation="nearest")
    axis.set_axis_off()
    for row, (title, _) in enumerate(rows):
        axis.text(-gap, row * step[0] + size[0] / 2, title, ha="right", va="center", fontsize=8)
    return _png(figure, caption)


def _figure(width: float, height: float) -> "Figure":
    # a Figure of its own, and not pyplot's: nothing global is changed, and no display is needed
    return import_host("matplotlib.figure").Figure(figsize=(width, height), dpi=100)


def _png(figure: "Figure", caption: str) -> Picture:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Picture(file.getvalue(), caption)
