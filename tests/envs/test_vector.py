"""The batched environments equal single ones under SyncVectorEnv, in every autoreset mode."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from modmoe_envs import LeapTerrainVector, PointGoalsVector, RotatedReachVector

LEAP, REACH, GOALS = "modmoe/LeapTerrain-v0", "modmoe/RotatedReach-v0", "modmoe/PointGoals-v0"
CLASSES = {LEAP: LeapTerrainVector, REACH: RotatedReachVector, GOALS: PointGoalsVector}
VARIANTS = [(LEAP, {}), (LEAP, {"context": "noisy"}), (LEAP, {"hardened": False, "terrain": "gap"})]
VARIANTS += [(REACH, {}), (REACH, {"context": "noisy", "num_contexts": 5}), (REACH, {"task": 1})]
VARIANTS += [(GOALS, {}), (GOALS, {"context": "noisy", "num_contexts": 5}), (GOALS, {"task": 1})]
N = 5


def pair(env_id: str, options: dict, mode: AutoresetMode) -> tuple[gym.vector.VectorEnv, SyncVectorEnv]:
    batched = gym.make_vec(env_id, N, vectorization_mode="vector_entry_point", autoreset_mode=mode, **options)
    singles = SyncVectorEnv([lambda: gym.make(env_id, **options) for _ in range(N)], autoreset_mode=mode)
    return batched, singles


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize(("env_id", "options"), VARIANTS, ids=str)
def test_equals_single_environments(env_id, options, mode):
    batched, singles = pair(env_id, options, mode)
    np.testing.assert_equal(batched.reset(seed=11), singles.reset(seed=11))
    batched.action_space.seed(0)
    ends = 0
    for step in range(70):
        actions = batched.action_space.sample()
        ours, theirs = batched.step(actions), singles.step(actions)
        np.testing.assert_equal(ours[:4], theirs[:4])
        assert ours[4].keys() == theirs[4].keys()
        np.testing.assert_equal(comparable(ours[4]), comparable(theirs[4]))
        ends += int((ours[2] | ours[3]).sum())
        if step == 50:
            np.testing.assert_equal(batched.reset(seed=12), singles.reset(seed=12))
    assert ends >= 2 * N  # or the resets were not compared


def comparable(info: dict) -> dict:
    """Arrays of arrays as lists, which numpy can compare."""
    return {key: list(value) if key == "final_obs" else value for key, value in info.items()}


@pytest.mark.parametrize("env_id", CLASSES)
def test_disabled_autoreset_waits_for_the_user(env_id):
    batched, singles = pair(env_id, {}, AutoresetMode.DISABLED)
    batched.reset(seed=2), singles.reset(seed=2)
    batched.action_space.seed(0)
    over = np.zeros(N, np.bool_)
    while not over.any():
        actions = batched.action_space.sample()
        ours, theirs = batched.step(actions), singles.step(actions)
        np.testing.assert_equal(ours, theirs)
        over = ours[2] | ours[3]
    with pytest.raises(ResetNeeded, match=r"rows \[.*\] are done"):
        batched.step(actions)
    reset = batched.reset(seed=9, options={"reset_mask": over}), singles.reset(seed=9, options={"reset_mask": over})
    np.testing.assert_equal(*reset)
    np.testing.assert_equal(batched.step(actions)[:4], singles.step(actions)[:4])


@pytest.mark.parametrize("env_id", CLASSES)
def test_made_by_its_entry_point(env_id):
    env = gym.make_vec(env_id, 3, vectorization_mode="vector_entry_point")
    assert isinstance(env, CLASSES[env_id])
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert env.max_episode_steps == gym.spec(env_id).max_episode_steps
    assert env.reset(seed=0)[0] in env.observation_space


@pytest.mark.parametrize("env_id", CLASSES)
def test_a_copy_goes_on_as_the_original(env_id):
    env = CLASSES[env_id](3)
    env.reset(seed=0)
    actions = np.full((25, 3, 2), 0.3, np.float32)
    copies = [copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
    expected = [env.step(action) for action in actions]
    for one in copies:
        np.testing.assert_equal([one.step(action) for action in actions], expected)


@pytest.mark.parametrize("env_id", CLASSES)
def test_renders_each_row_as_the_single_environment_does(env_id):
    env = CLASSES[env_id](2, render_mode="rgb_array")
    single = gym.make(env_id, render_mode="rgb_array")
    env.reset(seed=4)
    for row, frame in enumerate(env.render()):
        single.reset(seed=4 + row)
        np.testing.assert_array_equal(frame, single.render())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_envs": 0}, "num_envs must be 1 or more, not 0"),
        ({"max_episode_steps": 0}, "max_episode_steps must be 1 or more"),
        ({"autoreset_mode": "never"}, "autoreset_mode must be one of 'NextStep', 'SameStep', 'Disabled', not 'never'"),
        ({"render_mode": "human"}, "render_mode must be one of None, 'rgb_array', not 'human'"),
    ],
)
@pytest.mark.parametrize("env_id", CLASSES)
def test_bad_arguments(env_id, options, message):
    with pytest.raises(ValueError, match=message):
        CLASSES[env_id](**options)


@pytest.mark.parametrize("env_id", CLASSES)
def test_bad_calls(env_id):
    env = CLASSES[env_id](2)
    with pytest.raises(ResetNeeded, match="before step"):
        env.step(np.zeros((2, 2)))
    with pytest.raises(ResetNeeded, match="every row"):
        env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(ValueError, match="seed must be a number or 2 of them, one for each row, not 3"):
        env.reset(seed=[1, 2, 3])
    env.reset(seed=[1, None])
    assert env.np_random_seed[0] == 1
    for mask in ([True, False], np.array([1, 0]), np.array([True])):
        with pytest.raises(ValueError, match="bool array of shape"):
            env.reset(options={"reset_mask": mask})
    with pytest.raises(ValueError, match="one row at least"):
        env.reset(options={"reset_mask": np.array([False, False])})
    with pytest.raises(ValueError, match=r"actions must have shape \(2, 2\), not \(2,\)"):
        env.step(np.zeros(2))
    with pytest.raises(ValueError, match="one is nan"):
        env.step(np.full((2, 2), np.nan))
