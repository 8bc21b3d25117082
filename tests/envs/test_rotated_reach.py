"""RotatedReach: strides computed by hand, and that each context wants a behaviour of its own."""

import gymnasium as gym
import numpy as np
import pytest
from modmoe_envs import RotatedReach

ID = "modmoe/RotatedReach-v0"


def placed(point, goal, **options) -> RotatedReach:
    env = RotatedReach(**options)
    env.reset(seed=0)
    env.world.points[0], env.world.goals[0] = point, goal
    return env


@pytest.mark.parametrize(
    ("num_contexts", "task", "point"),
    [(3, 0, (0.2, 0.0)), (3, 1, (-0.1, 0.173205)), (3, 2, (-0.1, -0.173205)), (4, 1, (0.0, 0.2)), (4, 2, (-0.2, 0.0))],
)
def test_a_stride(num_contexts, task, point):
    # .2 (cos, sin) of 0, 120, 240 degrees; 90 and 180. The goal (.3, .4) is .5 from the origin.
    env = placed((0, 0), (0.3, 0.4), num_contexts=num_contexts, task=task)
    observation, reward, terminated, truncated, info = env.step(np.array([1, 0], np.float32))
    np.testing.assert_allclose(observation[:4], [*point, 0.3, 0.4], atol=1e-6)
    np.testing.assert_array_equal(observation[4:], np.eye(num_contexts)[task])
    assert reward == pytest.approx(-(((point[0] - 0.3) ** 2 + (point[1] - 0.4) ** 2) ** 0.5), abs=1e-6)
    assert (terminated, truncated, info["context"]) == (False, False, task)


def test_strides_are_cut_at_one_and_points_at_the_fence():
    env = placed((1.9, -1.9), (0, 0), task=0)
    observation = env.step(np.array([5, -5]))[0]
    np.testing.assert_allclose(observation[:2], [2.0, -2.0], atol=1e-6)
    env = placed((0, 0), (0, 0), task=0)
    np.testing.assert_allclose(env.step(np.array([5.0, 0.1]))[0][:2], [0.2, 0.02], atol=1e-6)


def returns(task: int, believed: int, episodes: int = 40) -> float:
    """The mean return of going straight to the goal, by one who believes in a context."""
    env, total = gym.make(ID, task=task), 0.0
    angle = 2 * np.pi * believed / 3
    back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for seed in range(episodes):
        observation, over = env.reset(seed=seed)[0], False
        while not over:
            action = back @ (observation[2:4] - observation[:2]) / 0.2
            observation, reward, _, over, _ = env.step(np.clip(action, -1, 1).astype(np.float32))
            total += reward
    return total / episodes


@pytest.mark.parametrize("task", range(3))
def test_what_is_right_in_one_context_is_wrong_in_another(task):
    assert returns(task, task) > -3
    assert returns(task, (task + 1) % 3) < -15
