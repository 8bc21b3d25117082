import io

import gymnasium as gym
import pytest
from PIL import Image

from modmoe.experiments.rl.film import film, palette_of


def turn(observation):
    return [0.2, 0.2]


def test_a_film_holds_every_frame_of_an_episode():
    # 20 steps: the first frame and one after each
    env = gym.make("modmoe_envs:modmoe/RotatedReach-v0", render_mode="rgb_array")
    picture = film(env, turn, "moves", max_width=100)
    image = Image.open(io.BytesIO(picture.data))
    assert (image.n_frames, image.size, image.info["loop"]) == (21, (100, 100), 0)
    assert image.info["duration"] == 100  # 10 frames in a second
    assert picture.caption == "moves"


def test_a_film_is_cut_at_its_length_and_refuses_other_modes():
    env = gym.make("modmoe_envs:modmoe/RotatedReach-v0", render_mode="rgb_array")
    assert Image.open(io.BytesIO(film(env, turn, max_frames=5).data)).n_frames == 5
    with pytest.raises(ValueError, match="a film needs render_mode='rgb_array', the environment has None"):
        film(gym.make("modmoe_envs:modmoe/RotatedReach-v0"), turn)


def test_every_part_of_a_film_keeps_its_colours():
    # nine tenths of the film are red, then a tenth is blue
    frames = [Image.new("RGB", (20, 20), "red")] * 18 + [Image.new("RGB", (20, 20), "blue")] * 2
    palette = palette_of(frames)
    for frame in (frames[0], frames[-1]):
        shown = frame.quantize(palette=palette, dither=Image.Dither.NONE).convert("RGB").getpixel((5, 5))
        assert max(abs(a - b) for a, b in zip(shown, frame.getpixel((5, 5)), strict=True)) <= 2
