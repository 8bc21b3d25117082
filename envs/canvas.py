"""Painting: flat shapes at twice the size, shrunk for smooth edges. pygame is loaded when something is painted."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.error import DependencyNotInstalled
from numpy.typing import NDArray

Color = tuple[int, int, int]
Point = tuple[float, float]

PAPER: Color = (250, 250, 247)
INK: Color = (45, 52, 64)
FAINT: Color = (205, 208, 212)
BLUE: Color = (58, 111, 176)
ORANGE: Color = (224, 122, 55)
GREEN: Color = (74, 145, 98)
RED: Color = (196, 66, 66)
SOIL: Color = (148, 132, 112)
CONTEXT_COLORS: tuple[Color, ...] = (BLUE, ORANGE, GREEN, (138, 96, 168), (190, 160, 60), (80, 160, 165))
SCALE = 2


class Canvas:
    """A picture in pixels, x to the right and y down. It holds no picture when it is pickled or copied.

    Args:
        size: width and height of a frame.
    """

    def __init__(self, size: tuple[int, int]):
        self.size = size
        self._picture: Any = None
        self._window: Any = None
        self._clock: Any = None

    def begin(self) -> None:
        """A clean sheet."""
        pygame = load_pygame()
        if self._picture is None:
            self._picture = pygame.Surface((self.size[0] * SCALE, self.size[1] * SCALE))
        self._picture.fill(PAPER)

    def polygon(self, points: Sequence[Point], color: Color) -> None:
        load_pygame().draw.polygon(self._picture, color, [(x * SCALE, y * SCALE) for x, y in points])

    def line(self, start: Point, end: Point, color: Color, width: float = 1.0) -> None:
        """With square ends; any width."""
        (x1, y1), (x2, y2) = start, end
        length = float(np.hypot(x2 - x1, y2 - y1))
        if length > 0:
            dx, dy = (y2 - y1) / length * width / 2, (x1 - x2) / length * width / 2
            self.polygon([(x1 + dx, y1 + dy), (x2 + dx, y2 + dy), (x2 - dx, y2 - dy), (x1 - dx, y1 - dy)], color)

    def circle(self, center: Point, radius: float, color: Color, width: float = 0.0) -> None:
        """Filled where the width is 0."""
        middle = (center[0] * SCALE, center[1] * SCALE)
        load_pygame().draw.circle(self._picture, color, middle, radius * SCALE, round(width * SCALE))

    def text(self, words: str, at: Point, color: Color = INK, size: int = 16, align: str = "left") -> None:
        pygame = load_pygame()
        pygame.font.init()
        drawn = pygame.font.Font(None, round(size * 1.35 * SCALE)).render(words, True, color)
        left = at[0] * SCALE - {"left": 0.0, "center": 0.5, "right": 1.0}[align] * drawn.get_width()
        self._picture.blit(drawn, (left, at[1] * SCALE))

    def show(self, mode: str, fps: int) -> NDArray[np.uint8] | None:
        """The frame: (height, width, 3) uint8 for "rgb_array"; "human" puts it in a window and returns None."""
        pygame = load_pygame()
        frame = pygame.transform.smoothscale(self._picture, self.size)
        if mode == "rgb_array":
            return pygame.surfarray.array3d(frame).transpose(1, 0, 2).copy()
        if self._window is None:
            pygame.display.init()
            self._window = pygame.display.set_mode(self.size)
            self._clock = pygame.time.Clock()
        self._window.blit(frame, (0, 0))
        pygame.event.pump()
        self._clock.tick(fps)
        pygame.display.flip()
        return None

    def close(self) -> None:
        if self._window is not None:
            pygame = load_pygame()
            pygame.display.quit()
        self._picture = self._window = self._clock = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_picture": None, "_window": None, "_clock": None}


def load_pygame() -> Any:
    try:
        import pygame
    except ImportError as error:
        raise DependencyNotInstalled(
            'pygame is not installed, run `pip install "gymnasium[classic-control]"`'
        ) from error
    return pygame
