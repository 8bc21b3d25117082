"""PointGoals: strides and rewards computed by hand, where goals lie, and goals that are set."""

import gymnasium as gym
import numpy as np
import pytest
from modmoe_envs import PointGoals, PointGoalsVector

ID = "modmoe/PointGoals-v0"


def placed(point, goal, **options) -> PointGoals:
    env = PointGoals(**options)
    env.reset(seed=0, options={"goal": goal})
    env.world.points[0] = point
    return env


def test_a_stride():
    # .2 (1, -.5) from (.1, .3) is (.3, .2); the goal (.3, 1.2) is 1 above it
    env = placed((0.1, 0.3), (0.3, 1.2))
    observation, reward, terminated, truncated, info = env.step(np.array([1, -0.5], np.float32))
    np.testing.assert_allclose(observation, [0.3, 0.2, 0.3, 1.2], atol=1e-6)
    assert reward == pytest.approx(-1.0, abs=1e-6)
    assert (terminated, truncated) == (False, False)
    np.testing.assert_array_equal(info["goal"], [0.3, 1.2])


def test_strides_are_cut_at_one_and_points_at_the_fence():
    np.testing.assert_allclose(placed((1.9, -1.9), (0, 0)).step(np.array([5, -5]))[0][:2], [2, -2], atol=1e-6)
    np.testing.assert_allclose(placed((0, 0), (0, 0)).step(np.array([5, 0.1]))[0][:2], [0.2, 0.02], atol=1e-6)


def test_goals_lie_evenly_in_their_discs():
    env = PointGoalsVector(6000, num_contexts=4, context="hidden")
    observations, info = env.reset(seed=0)
    assert (observations[:, 2:] == 0).all()
    assert (np.abs(observations[:, :2]) <= 0.5).all()
    angle = np.pi / 2 * info["context"]
    offset = info["goal"] - 1.2 * np.stack([np.cos(angle), np.sin(angle)], 1)
    far = np.hypot(*offset.T)
    assert far.max() <= 0.3 + 1e-9
    # uniform in a disc: r^2 / .09 is uniform in [0, 1], so its mean is 1/2 with deviation 1 / sqrt(12)
    assert abs((far**2 / 0.09).mean() - 0.5) < 4 / (12 * 6000) ** 0.5
    # each coordinate has the variance .09 / 4
    assert (np.abs(offset.mean(0)) < 4 * 0.15 / 6000**0.5).all()
    assert np.abs(np.bincount(info["context"]) - 1500).max() < 4 * (6000 * 3 / 16) ** 0.5


def test_goals_that_are_set():
    env = gym.make(ID)
    # the middles of three groups stand at 0, 120 and 240 degrees
    for goal, group in (((1.2, 0.1), 0), ((-0.5, 1.0), 1), ((-0.5, -1.0), 2)):
        observation, info = env.reset(options={"goal": goal})
        np.testing.assert_allclose(observation[2:], goal, atol=1e-6)
        assert info["context"] == group
    goals = np.array([[1.0, 0.0], [0.0, -1.0]])
    batched = PointGoalsVector(2)
    assert np.array_equal(batched.reset(seed=1, options={"goal": goals})[1]["goal"], goals)
    assert np.array_equal(batched.reset(options={"goal": (0.5, 0.5)})[1]["goal"], np.full((2, 2), 0.5))
    # a set goal does not move the start of a seed
    start = gym.make(ID).reset(seed=3)[0][:2]
    np.testing.assert_array_equal(gym.make(ID).reset(seed=3, options={"goal": (1, 1)})[0][:2], start)


@pytest.mark.parametrize("goal", [(1, 2, 3), (0, 2.1), (np.nan, 0), np.zeros((3, 2))])
def test_bad_goals(goal):
    with pytest.raises(ValueError, match=r"goal must be two numbers, or \(1, 2\) of them, within \[-2.0, 2.0\]"):
        PointGoals().reset(options={"goal": goal})


def test_task_and_goal_are_not_set_together():
    with pytest.raises(ValueError, match="sets the task or the goal, not both"):
        PointGoals().reset(options={"goal": (0, 0), "task": 1})


def test_who_knows_the_goal_gets_there():
    env = gym.make(ID)
    for seed in range(10):
        observation, over, rewards = env.reset(seed=seed)[0], False, []
        while not over:
            observation, reward, _, over, _ = env.step(np.clip((observation[2:] - observation[:2]) / 0.2, -1, 1))
            rewards.append(reward)
        assert rewards[-1] > -1e-5
        assert sum(rewards) > -12
