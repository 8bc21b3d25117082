"""A film of a policy in its environment, as a GIF for the report."""

import io
from collections.abc import Callable
from typing import Any

import gymnasium as gym
from PIL import Image

from modmoe.analysis import Picture

LEAST_DELAY = 20  # ms; browsers slow down what is faster


def film(
    env: gym.Env[Any, Any],
    policy: Callable[[Any], Any],
    caption: str = "",
    seed: int = 0,
    max_frames: int = 150,
    max_width: int = 360,
    fps: float | None = None,
) -> Picture:
    """Play episodes until there are enough frames, or one episode if that is shorter.

    Args:
        env: with ``render_mode="rgb_array"``.
        policy: observation -> action.
        caption: of the picture.
        seed: of the episode.
        max_frames: longest film; the episode is cut there.
        max_width: frames are shrunk to it, in pixels.
        fps: frames in a second; None for what the environment's metadata say.
    Returns:
        An animated GIF that repeats for ever; frames that equal the one before are shown longer instead.
    Raises:
        ValueError: if the environment renders in another mode.
    """
    if env.render_mode != "rgb_array":
        raise ValueError(f"a film needs render_mode='rgb_array', the environment has {env.render_mode!r}")
    observation, _ = env.reset(seed=seed)
    frames, over = [env.render()], False
    while not over and len(frames) < max_frames:
        observation, _, terminated, truncated, _ = env.step(policy(observation))
        frames.append(env.render())
        over = terminated or truncated
    images = [Image.fromarray(frame) for frame in frames]  # type: ignore[arg-type]
    width, height = images[0].size
    if width > max_width:
        images = [image.resize((max_width, round(height * max_width / width))) for image in images]
    palette = palette_of(images)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    delay = max(LEAST_DELAY, round(1000 / (fps or env.metadata.get("render_fps", 10))))
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=delay, loop=0)
    return Picture(file.getvalue(), caption)


def palette_of(images: list[Image.Image]) -> Image.Image:
    """One palette for all frames, so that colours do not flicker: of some that are spread over the film."""
    spread = images[:: max(1, len(images) // 8)]
    width, height = spread[0].size
    montage = Image.new("RGB", (width, height * len(spread)))
    for row, image in enumerate(spread):
        montage.paste(image, (0, row * height))
    return montage.quantize(128)
