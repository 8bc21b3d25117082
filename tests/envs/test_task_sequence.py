"""TaskSequence: whose turn it is, equal seeds, evaluation that disturbs nothing."""

import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from modmoe_envs import RotatedReach, TaskSequence, held_out_seeds
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

ID = "modmoe/RotatedReach-v0"
EAST = np.array([1.0, 0.0], np.float32)


def sequence(steps: int | None = None, **options) -> TaskSequence:
    return TaskSequence.of_contexts(ID, 3, steps, **options)


def test_both_checkers_pass():
    env = sequence()
    check_env(env, skip_render_check=True)  # it has no spec to make the other render modes from
    check_env_for_sb3(env)


def test_a_set_task_holds_from_the_next_reset_on():
    env = sequence()
    _, info = env.reset(seed=0)
    assert (info["task"], info["context"]) == (0, 0)
    env.set_task(2)
    info = env.step(EAST)[4]
    assert (info["task"], info["context"]) == (0, 0)
    _, info = env.reset()
    assert (info["task"], info["context"]) == (2, 2)
    assert env.step(EAST)[4]["task"] == 2


def test_steps_switch_the_task():
    # 30 steps a task, episodes of 20: ends after steps 20, 30 (cut), 50, 60 (cut), and then 80, 100: the last stays.
    env = sequence(30)
    env.reset(seed=0)
    ends, tasks = [], []
    for step in range(1, 101):
        *_, terminated, truncated, info = env.step(EAST)
        tasks.append(info["task"])
        if truncated:
            assert not terminated
            ends.append(step)
            env.reset()
    assert ends == [20, 30, 50, 60, 80, 100]
    assert tasks == [0] * 30 + [1] * 30 + [2] * 40


def test_a_task_is_the_plain_environment_under_the_same_seed():
    for task in range(3):
        env, plain = sequence(), gym.make(ID, task=task)
        env.set_task(task)
        np.testing.assert_array_equal(env.reset(seed=5)[0], plain.reset(seed=5)[0])
        np.testing.assert_array_equal(env.step(EAST)[0], plain.step(EAST)[0])
        np.testing.assert_array_equal(env.reset()[0], plain.reset()[0])


def run(env: gym.Env, seed: int | None) -> list:
    seen = [env.reset(seed=seed)]
    for _ in range(50):
        seen.append(env.step(EAST))
        if seen[-1][3]:
            seen.append(env.reset())
    return seen


def test_seeded_sequences_are_equal():
    np.testing.assert_equal(run(sequence(15), 3), run(sequence(15), 3))
    starts = [step[0][:4] for step in run(sequence(15), 3) if len(step) == 2]
    assert len(np.unique(starts, axis=0)) == len(starts) == 4  # each task has starts of its own


def test_a_copy_goes_on_as_the_original():
    env = sequence(15)
    run(env, 3)
    other = pickle.loads(pickle.dumps(env))
    np.testing.assert_equal(run(other, None), run(env, None))


def east(observation: np.ndarray) -> np.ndarray:
    return EAST


def test_evaluate_by_hand():
    # Task 0 walks east, task 1 at 120 degrees, task 2 at 240: each episode is summed step by step.
    expected = np.zeros((3, 2))
    for task in range(3):
        way = 0.2 * np.array([np.cos(2 * np.pi * task / 3), np.sin(2 * np.pi * task / 3)])
        for episode, seed in enumerate((7, 8)):
            start = gym.make(ID, task=task).reset(seed=seed)[0].astype(float)
            point, goal = start[:2], start[2:4]
            for _ in range(20):
                point = np.clip(point + way, -2, 2)
                expected[task, episode] -= np.linalg.norm(point - goal)
    env = sequence()
    np.testing.assert_allclose(env.episode_returns(east, 2, (7, 8)), expected, atol=1e-4)
    np.testing.assert_allclose(env.evaluate(east, 2, (7, 8)), expected.mean(1), atol=1e-4)
    np.testing.assert_array_equal(env.evaluate(east, 2), env.evaluate(east, 2, held_out_seeds(2)))


def test_episodes_at_once_equal_single_ones():
    sizes = []

    def towards_the_goal(observation: np.ndarray) -> np.ndarray:
        sizes.append(observation.shape)
        return np.clip(observation[..., 2:4] - observation[..., :2], -1, 1)

    # CartPole's episodes end one by one: what is over waits for the rest
    def lean(observation: np.ndarray) -> np.ndarray:
        return (observation[..., 2] > 0).astype(np.int64)

    single = sequence().episode_returns(towards_the_goal, 4)
    np.testing.assert_array_equal(sequence().episode_returns(towards_the_goal, 4, at_once=True), single)
    assert set(sizes) == {(7,), (4, 7)}
    poles = TaskSequence([lambda: gym.make("CartPole-v1")])
    single = poles.episode_returns(lean, 4)
    assert len(np.unique(single)) > 1
    np.testing.assert_array_equal(poles.episode_returns(lean, 4, at_once=True), single)
    np.testing.assert_array_equal(poles.evaluate(lean, 4, at_once=True), single.mean(1))


def test_evaluation_does_not_disturb_training():
    env, undisturbed = sequence(15), sequence(15)
    first = run(env, 3)
    env.step(EAST)
    row = env.evaluate(east, 3)
    np.testing.assert_equal(first, run(undisturbed, 3))
    undisturbed.step(EAST)
    np.testing.assert_equal(env.step(EAST), undisturbed.step(EAST))
    np.testing.assert_array_equal(env.evaluate(east, 3), row)


def test_renders_the_current_task():
    env = sequence(render_mode="rgb_array")
    env.set_task(1)
    env.reset(seed=0)
    plain = gym.make(ID, task=1, render_mode="rgb_array")
    plain.reset(seed=0)
    np.testing.assert_array_equal(env.render(), plain.render())
    env.close()


def test_it_is_made_by_name():
    env = gym.make("modmoe/TaskSequence-v0", env_id=ID, num_tasks=2, context="hidden", render_mode="rgb_array")
    inner = env.unwrapped
    assert isinstance(inner, TaskSequence)
    assert (inner.num_tasks, inner.steps_per_task, inner.render_mode) == (2, None, "rgb_array")
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation[4:], 0)
    limited = gym.make("modmoe/TaskSequence-v0", env_id=ID, num_tasks=3, steps_per_task=15)
    np.testing.assert_equal(run(limited, 3), run(sequence(15), 3))
    pickle.loads(pickle.dumps(env.spec))
    with pytest.raises(TypeError, match="num_tasks"):
        gym.make("modmoe/TaskSequence-v0", env_id=ID)


def test_transfer_metrics_by_hand():
    matrix = [[3.0, 1.0, 0.0], [2.0, 5.0, 1.0], [1.0, 4.0, 6.0]]
    found = sequence().transfer_metrics(matrix, [0.0, -1.0, -1.0])
    assert found == pytest.approx(
        {
            "average_performance": 11 / 3,  # 1 + 4 + 6
            "forgetting": 1.0,  # 3 - 1, 5 - 4 and 6 - 6
            "backward_transfer": -1.5,  # over the first two tasks
            "forward_transfer": 2.0,  # 1 + 1 and 1 + 1
        }
    )


def test_bad_arguments():
    with pytest.raises(ValueError, match="one task at least"):
        TaskSequence([])
    with pytest.raises(ValueError, match="steps_per_task must be 1 or more, or None, not 0"):
        sequence(0)
    with pytest.raises(ValueError, match="task 1 has observation_space"):
        TaskSequence([RotatedReach, lambda: RotatedReach(num_contexts=4)])
    with pytest.raises(ValueError, match="task 1 has render_mode rgb_array, task 0 has None"):
        TaskSequence([RotatedReach, lambda: RotatedReach(render_mode="rgb_array")])
    env = sequence()
    for task in (3, -1, None, "1"):
        with pytest.raises(ValueError, match="one of 0 to 2, not"):
            env.set_task(task)
    with pytest.raises(ValueError, match="one seed for each; got 3 and 2"):
        env.evaluate(east, 3, (1, 2))
    with pytest.raises(ValueError, match="episodes must be 1 or more"):
        env.evaluate(east, 0, ())
    with pytest.raises(ValueError, match=r"matrix must be \(3, 3\), not \(2, 2\)"):
        env.transfer_metrics(np.zeros((2, 2)), np.zeros(2))
    with pytest.raises(ValueError, match=r"baseline must have shape \(3,\)"):
        env.transfer_metrics(np.zeros((3, 3)), np.zeros(2))
