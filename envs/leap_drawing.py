"""One row of LeapTerrain as a picture: the course from the side, the last leap as a dotted arc."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .canvas import BLUE, FAINT, GREEN, INK, ORANGE, RED, SOIL, Canvas, Color

if TYPE_CHECKING:
    from .leap_world import LeapWorld

METER = 75.0  # pixels
BEHIND = 3.0  # m shown behind the body
NAMES = ("open ground", "gap", "wall", "step")


def draw_leap(canvas: Canvas, world: LeapWorld, row: int) -> None:
    width, height = canvas.size
    x, y = float(world.x[row]), float(world.y[row])
    left = x - BEHIND
    # Where height 0 is drawn: a standing body keeps its place, a fallen one is below its take-off.
    level = height * 0.55 + METER * (float(world.takeoff[row, 1]) if world.fell[row] else y)

    def at(px: float, py: float) -> tuple[float, float]:
        return (px - left) * METER, level - py * METER

    draw_ground(canvas, world, row, left, at)
    draw_arc(canvas, world, row, at)
    draw_body(canvas, at(x, y), RED if world.fell[row] else BLUE)

    gravity, strength, drag = world.body[row]
    canvas.text(f"{min(x, world.course):.1f} m of {world.course:g}", (16, 12), size=18)
    canvas.text(f"leap {world.leaps[row]}   {NAMES[world.terrain()[row]]}", (16, 38), GREEN)
    canvas.text(f"gravity {gravity:.1f}   strength {strength:.2f}   drag {drag:.2f}", (width - 16, 12), align="right")
    if world.fell[row]:
        canvas.text("fell", (width - 16, 38), RED, size=18, align="right")


def draw_ground(canvas: Canvas, world: LeapWorld, row: int, left: float, at) -> None:
    width, height = canvas.size
    first, last = int(left / world.cell) - 1, int((left + width / METER) / world.cell) + 2
    cells = np.clip(np.arange(first, last), 0, world.heights.shape[1] - 1)
    heights = world.heights[row, cells]
    edges = np.flatnonzero(np.diff(heights)) + 1
    for start, stop in zip([0, *edges], [*edges, len(heights)], strict=True):
        x1, top = at((first + start) * world.cell, float(heights[start]))
        x2, _ = at((first + stop) * world.cell, 0.0)
        top = min(max(top, -10.0), height + 10.0)
        canvas.polygon([(x1, top), (x2, top), (x2, height), (x1, height)], SOIL)
        canvas.line((x1, top), (x2, top), INK, 2.0)
    for meter in range(max(0, int(left)), int(left + width / METER) + 1):
        px, _ = at(meter, 0.0)
        canvas.line((px, height - 12), (px, height), FAINT, 1.5)
        canvas.text(f"{meter}", (px + 4, height - 16), FAINT, size=11)
    if left < world.course < left + width / METER:
        px, _ = at(world.course, 0.0)
        canvas.line((px, 70), (px, height), GREEN, 3.0)
        canvas.text("finish", (px + 6, 70), GREEN)


def draw_arc(canvas: Canvas, world: LeapWorld, row: int, at) -> None:
    x, y, vx, vy = world.takeoff[row]
    if vx == 0.0:
        return
    xs = x + vx * world.reach[row]
    ys = y + vy * world.reach[row] - world.sink[row]
    draw_body(canvas, at(float(x), float(y)), FAINT)
    for px, py in zip(xs[xs < world.x[row]], ys[xs < world.x[row]], strict=True):
        canvas.circle(at(float(px), float(py)), 2.5, ORANGE)


def draw_body(canvas: Canvas, foot: tuple[float, float], color: Color) -> None:
    x, y = foot
    canvas.line((x, y), (x - 5, y - 13), color, 5.0)
    canvas.line((x - 5, y - 13), (x, y - 24), color, 5.0)
    canvas.circle((x - 5, y - 13), 2.5, color)
    canvas.circle((x, y - 32), 12.0, color)
