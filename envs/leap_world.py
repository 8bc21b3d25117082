"""The rules of LeapTerrain for n episodes at once: bodies, courses, ballistic leaps.

Axes: n rows (episodes), m leaps, T instants of a flight, C cells of a course, O obstacles of a course.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from .canvas import Canvas
from .context import CONTEXT_BOUND, ContextView, check_choice, check_options
from .leap_drawing import draw_leap
from .world import Generators, Info, World

Floats = NDArray[np.float64]

TERRAINS = ("mixed", "gap", "wall", "step")
KINDS = ("gap", "wall", "step")  # info["terrain"] is 0 on open ground, else 1 + the index of the obstacle's kind

# Fixed before any learner ran on this task. Uniform ranges; the sizes are fractions of what the body can do.
GRAVITY = (7.0, 14.0)  # m/s^2
STRENGTH = (0.85, 1.15)  # of the nominal take-off speed
DRAG = (0.0, 0.4)  # 1/s, linear
GAP = (0.25, 0.75)  # of the body's greatest range
WALL = (0.25, 0.7)  # of its greatest apex
STEP = (0.1, 0.35)  # m, up or down
FLAT = (2.0, 4.5)  # m between obstacles
MAX_RANGE, MAX_APEX = 3.2, 0.9  # m; an obstacle is never made for a greater range or apex than this
BODY_RANGES = np.transpose([GRAVITY, STRENGTH, DRAG])
PLAIN_BODY = (9.81, 1.0, 0.0)  # gravity, strength and drag where hardened=False

START, FIRST_OBSTACLE = 0.5, 3.0  # m
CELL = 0.05  # m
WALL_CELLS, MIN_GAP_CELLS = 4, 4
GAP_DEPTH = 2.0  # m
SIGHT, NUM_HEIGHTS = 4.0, 40
NOTICE = 1.5  # m before an obstacle from which on it counts as the terrain at hand
RUN_OUT = 12.0  # m of course behind the finish: the longest leap and what is seen from its landing
FLIGHT = np.arange(1, 91) * 0.02  # s after take-off
STUB, FALL, HARD_LANDING = 0.03, 1.2, 4.9  # m a foot may hit below an edge, m of fall, m/s per unit of strength


class Landing(NamedTuple):
    """Where m leaps ended: positions (m), whether the body fell, and the reward."""

    x: Floats
    y: Floats
    fell: NDArray[np.bool_]
    reward: Floats


class LeapWorld(World):
    """n bodies, each on a course of its own. See ``LeapTerrain`` for what the arguments mean."""

    size: ClassVar[tuple[int, int]] = (800, 400)
    context_size: ClassVar[int] = 3
    cell: ClassVar[float] = CELL

    def __init__(self, num_rows: int, terrain: str, hardened: bool, course: float, view: ContextView):
        super().__init__(num_rows)
        check_choice("terrain", terrain, TERRAINS)
        if not course > FIRST_OBSTACLE:
            raise ValueError(f"course must be longer than {FIRST_OBSTACLE} m, not {course}")
        self.kinds = np.array(range(len(KINDS)) if terrain == "mixed" else [KINDS.index(terrain)])
        self.hardened, self.course, self.view = hardened, float(course), view
        bound = np.full(NUM_HEIGHTS + self.context_size, 2.0, np.float32)
        bound[NUM_HEIGHTS:] = CONTEXT_BOUND
        self.observation_space = spaces.Box(-bound, bound)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.ahead = np.linspace(0.02, SIGHT, NUM_HEIGHTS)

        n, num_cells = num_rows, round((course + RUN_OUT) / CELL)
        self.num_obstacles = int((course + RUN_OUT - FIRST_OBSTACLE) / FLAT[0]) + 1
        self.body = np.zeros((n, 3))  # gravity, strength, drag
        self.reach = np.zeros((n, len(FLIGHT)))  # x(t) = v_x * reach(t)
        self.sink = np.zeros((n, len(FLIGHT)))  # y(t) = v_y * reach(t) - sink(t)
        self.heights = np.zeros((n, num_cells))
        self.obstacles = np.zeros((n, 3, self.num_obstacles))  # noticed from, end, 1 + kind
        self.x, self.y = np.zeros(n), np.zeros(n)
        self.takeoff = np.zeros((n, 4))  # x, y, v_x, v_y of the last leap, for drawing
        self.leaps, self.fell = np.zeros(n, np.int64), np.zeros(n, np.bool_)

    def begin(self, rows: NDArray[Any], generators: Generators, options: Mapping[str, Any] | None) -> None:
        check_options(options, ())
        drawn = np.stack([generator.random(3 + 4 * self.num_obstacles) for generator in generators])
        low, high = BODY_RANGES
        self.body[rows] = low + (high - low) * drawn[:, :3] if self.hardened else PLAIN_BODY
        self.reach[rows], self.sink[rows] = flight(self.body[rows, 0], self.body[rows, 2])
        self._lay(rows, *drawn[:, 3:].reshape(len(rows), 4, self.num_obstacles).transpose(1, 0, 2))
        self.x[rows], self.y[rows] = START, self.heights[rows, int(START / CELL)]
        self.takeoff[rows] = START, 0.0, 0.0, 0.0
        self.leaps[rows], self.fell[rows] = 0, False

    def _lay(self, rows: NDArray[Any], kind: Floats, size: Floats, sign: Floats, flat: Floats) -> None:
        """Make courses of (r, O) random numbers in [0, 1): flats and obstacles in turn."""
        kinds = self.kinds[(kind * len(self.kinds)).astype(np.intp)]
        gap, wall, step = (kinds == index for index in range(len(KINDS)))
        greatest_range, apex = reach_of(self.body[rows, 1], self.reach[rows], self.sink[rows])
        gap_cells = np.maximum(MIN_GAP_CELLS, ((GAP[0] + (GAP[1] - GAP[0]) * size) * greatest_range / CELL).astype(int))
        wall_height = (WALL[0] + (WALL[1] - WALL[0]) * size) * apex
        step_height = np.where(sign < 0.5, -1.0, 1.0) * (STEP[0] + (STEP[1] - STEP[0]) * size)
        ground = np.cumsum(step * step_height, 1)  # behind each obstacle

        # A first flat, then (obstacle, flat) for each; a step is an obstacle without length.
        num_cells, count = self.heights.shape[1], self.num_obstacles
        lengths = np.full((len(rows), 2 * count + 1), round(FIRST_OBSTACLE / CELL))
        lengths[:, 1::2] = gap * gap_cells + wall * WALL_CELLS
        lengths[:, 2::2] = (FLAT[0] + (FLAT[1] - FLAT[0]) * flat) / CELL
        levels = np.zeros(lengths.shape)
        levels[:, 2::2] = ground
        levels[:, 1::2] = ground - gap * GAP_DEPTH + wall * wall_height
        ends = np.cumsum(lengths, 1)
        self.obstacles[rows] = np.stack([ends[:, 0:-1:2] * CELL - NOTICE, ends[:, 1::2] * CELL, 1 + kinds], 1)
        lengths = np.diff(np.minimum(ends, num_cells), axis=1, prepend=0)  # cut where the course is full
        self.heights[rows] = np.repeat(levels.ravel(), lengths.ravel()).reshape(len(rows), num_cells)

    def leap(self, rows: NDArray[Any], x: Floats, y: Floats, actions: NDArray[Any]) -> Landing:
        """m leaps that change nothing: rows (m,), take-off positions (m,), actions (m, 2) in [-1, 1].

        The leap ends at the first instant at which the body is in the ground, or after 1.8 s.
        """
        vx, vy = takeoff_speed(actions, self.body[rows, 1])
        reach = self.reach[rows]
        xs = x[:, None] + vx[:, None] * reach
        ys = y[:, None] + vy[:, None] * reach - self.sink[rows]
        ground = self._ground(rows, xs)
        hit = ys <= ground
        hit[:, -1] = True
        last, each = hit.argmax(1), np.arange(len(rows))
        y_before = np.where(last > 0, ys[each, last - 1], y)
        landing_x, landing_y = xs[each, last], ground[each, last]
        gravity, strength, drag = self.body[rows].T
        speed = vy * np.exp(-drag * FLIGHT[last]) - gravity * reach[each, last]
        fell = (landing_y > y_before + STUB) | (landing_y < y - FALL) | (speed < -HARD_LANDING * strength)
        mean_speed = (landing_x - x) / (FLIGHT[last] + 0.15)
        reward = np.where(fell, 0.0, np.exp(-0.5 * (mean_speed - 2.0) ** 2) - 0.02 * vy)
        return Landing(landing_x, landing_y, fell, reward)

    def _ground(self, rows: NDArray[Any], xs: Floats) -> Floats:
        """Heights under xs (m, ·) on the courses of rows (m,)."""
        cells = np.minimum((xs / CELL).astype(np.intp), self.heights.shape[1] - 1)
        return self.heights.ravel().take(cells + (rows * self.heights.shape[1])[:, None])

    def advance(self, actions: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        self.takeoff = np.stack([self.x, self.y, *takeoff_speed(actions, self.body[:, 1])], 1)
        landing = self.leap(np.arange(self.num_rows), self.x, self.y, actions)
        self.x, self.y, self.fell = landing.x, landing.y, landing.fell
        self.leaps += 1
        # The finish truncates: nothing observed tells where the course ends.
        return landing.reward, landing.fell.copy(), self.x >= self.course

    def context(self, rows: NDArray[Any]) -> Floats:
        """(r, 3): gravity, strength and drag, each on [-1, 1]."""
        low, high = BODY_RANGES
        return 2 * (self.body[rows] - low) / (high - low) - 1 if self.hardened else np.zeros((len(rows), 3))

    def observe(self, rows: NDArray[Any], generators: Generators) -> NDArray[np.float32]:
        heights = self._ground(rows, self.x[rows, None] + self.ahead) - self.y[rows, None]
        context = self.view(self.context(rows), generators)
        return np.concatenate([np.clip(heights, -2.0, 2.0).astype(np.float32), context], 1)

    def terrain(self) -> NDArray[np.int64]:
        """(n,): the kind of the next obstacle, 0 while it is more than 1.5 m away."""
        noticed, end, kind = self.obstacles.transpose(1, 0, 2)
        following = (end > self.x[:, None]).argmax(1)
        each = np.arange(self.num_rows)
        near = noticed[each, following] <= self.x
        return np.where(near, kind[each, following], 0).astype(np.int64)

    def info(self) -> Info:
        return {
            "context": self.body.astype(np.float32),
            "distance": np.minimum(self.x, self.course),
            "terrain": self.terrain(),
        }

    def draw(self, canvas: Canvas, row: int) -> None:
        draw_leap(canvas, self, row)


def takeoff_speed(actions: NDArray[Any], strength: Floats) -> tuple[Floats, Floats]:
    """(m, 2) actions -> horizontal and vertical speed in m/s: (2 + 1.5 a_0) s and (2.2 + 1.7 a_1) s."""
    return (2.0 + 1.5 * actions[:, 0]) * strength, (2.2 + 1.7 * actions[:, 1]) * strength


def flight(gravity: Floats, drag: Floats) -> tuple[Floats, Floats]:
    """(m,) bodies -> reach(t) = (1 - e^(-dt))/d and sink(t) = g (t - reach(t))/d, (m, T): v' = -d v - (0, g) solved."""
    drag = np.maximum(drag, 1e-6)[:, None]
    reach = -np.expm1(-drag * FLIGHT) / drag
    return reach, gravity[:, None] * (FLIGHT - reach) / drag


def reach_of(strength: Floats, reach: Floats, sink: Floats) -> tuple[Floats, Floats]:
    """Range and apex over level ground of the strongest leap, (m, 1) each, at most 3.2 m and 0.9 m."""
    vx, vy = takeoff_speed(np.ones((len(strength), 2)), strength)
    rise = vy[:, None] * reach - sink
    landed = rise <= 0
    landed[:, -1] = True
    far = vx * reach[np.arange(len(strength)), landed.argmax(1)]
    return np.minimum(far, MAX_RANGE)[:, None], np.minimum(rise.max(1), MAX_APEX)[:, None]
