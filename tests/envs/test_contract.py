"""What every environment promises, over every variant: both checkers, seeds, copies, refusals, pictures."""

import builtins
import copy
import importlib.metadata
import inspect
import pickle
import warnings

import gymnasium as gym
import modmoe_envs
import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled, ResetNeeded
from gymnasium.utils.env_checker import check_env
from modmoe_envs.registration import ENVS, SEQUENCES
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

LEAP, REACH, PENDULUM, CARTPOLE, GOALS = ENVS
MODES = ("visible", "hidden", "noisy")
VARIANTS = [
    *((env_id, {"context": mode}) for env_id in ENVS for mode in MODES),
    *((LEAP, {"terrain": terrain}) for terrain in ("gap", "wall", "step")),
    (LEAP, {"hardened": False}),
    (REACH, {"num_contexts": 5, "task": 4}),
    (GOALS, {"num_contexts": 5, "task": 4}),
    *((env_id, {"parameter": name}) for env_id in (PENDULUM, CARTPOLE) for name in ("mass", "length")),
    *((env_id, {"switch_every": 3, "context": mode}) for env_id in (PENDULUM, CARTPOLE) for mode in MODES),
]
every_variant = pytest.mark.parametrize(("env_id", "options"), VARIANTS, ids=str)
every_env = pytest.mark.parametrize("env_id", ENVS)


def rollout(env: gym.Env, seed: int | None, num_steps: int = 60) -> list:
    """What an environment returns to fixed actions, through resets."""
    env.action_space.seed(7)
    seen = [env.reset(seed=seed)]
    for _ in range(num_steps):
        seen.append(env.step(env.action_space.sample()))
        if seen[-1][2] or seen[-1][3]:
            seen.append(env.reset())
    return seen


@every_variant
def test_both_checkers_pass_without_a_warning(env_id, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(env_id, **options).unwrapped
        check_env(env)
        check_env_for_sb3(env)


@every_variant
def test_seeded_rollouts_are_equal(env_id, options):
    env, other = gym.make(env_id, **options), gym.make(env_id, **options)
    first, again, elsewhere = rollout(env, 3), rollout(env, 3), rollout(other, 3)
    np.testing.assert_equal(again, first)
    np.testing.assert_equal(elsewhere, first)
    assert not np.array_equal(env.reset(seed=4)[0], first[0][0])


@every_variant
def test_a_copy_goes_on_as_the_original(env_id, options):
    env = gym.make(env_id, render_mode="rgb_array", **options)
    rollout(env, 3, num_steps=7)
    env.render()
    copies = [copy.deepcopy(env.unwrapped), pickle.loads(pickle.dumps(env.unwrapped))]
    expected = rollout(env.unwrapped, None, num_steps=20)
    for one in copies:
        np.testing.assert_equal(rollout(one, None, num_steps=20), expected)


@every_env
def test_hidden_and_noisy_change_only_the_context_entries(env_id):
    envs = {mode: gym.make(env_id, context=mode) for mode in MODES}
    seen = {mode: env.reset(seed=5) for mode, env in envs.items()}
    tail = -context_size(env_id)
    visible, noisy, hidden = (seen[mode][0] for mode in ("visible", "noisy", "hidden"))
    np.testing.assert_array_equal(hidden[:tail], visible[:tail])
    np.testing.assert_array_equal(noisy[:tail], visible[:tail])
    assert (hidden[tail:] == 0).all()
    assert (noisy[tail:] != visible[tail:]).all()
    np.testing.assert_equal(seen["hidden"][1], seen["visible"][1])  # info tells the truth in every mode
    assert len({env.observation_space.shape for env in envs.values()}) == 1


@every_env
def test_noise_is_centred_and_of_the_given_size(env_id):
    env = gym.make(env_id, context="noisy", context_noise=0.1)
    tail = -context_size(env_id)
    truth = gym.make(env_id).reset(seed=5)[0][tail:]
    errors = np.array([env.reset(seed=5)[0][tail:] - truth] + [draw(env)[tail:] - truth for _ in range(400)])
    assert abs(errors.mean()) < 4 * 0.1 / errors.size**0.5
    assert 0.09 < errors.std() < 0.11


def context_size(env_id: str) -> int:
    """The last so many entries of an observation are the context."""
    return 2 if env_id == GOALS else 3


def draw(env: gym.Env) -> np.ndarray:
    """Another observation of the state: none of these environments changes by being looked at."""
    inner = env.unwrapped
    if hasattr(inner, "world"):
        return inner.world.observe(np.zeros(1, np.intp), [inner.np_random])[0]
    return inner.switcher.extend(np.zeros(3, np.float32), inner.np_random)


@every_env
def test_every_step_tells_the_context(env_id):
    env = gym.make(env_id)
    _, info = env.reset(seed=0)
    _, _, _, _, later = env.step(env.action_space.sample())
    np.testing.assert_equal(later["context"], info["context"])
    task = gym.make(env_id, **({} if env_id == LEAP else {"task": 2})).reset(seed=0)[1]["context"]
    assert np.shape(task) == (3,) if env_id == LEAP else task == 2


@every_env
def test_frames(env_id):
    env = gym.make(env_id, render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    env.step(env.action_space.sample())
    after = env.render()
    assert before.dtype == np.uint8
    assert before.ndim == 3
    assert before.shape[2] == 3
    assert len(np.unique(before.reshape(-1, 3), axis=0)) > 20  # shapes and smooth edges
    assert (before != after).any()
    env.reset(seed=0)
    np.testing.assert_array_equal(env.render(), before)


@every_env
def test_human_shows_each_state_in_a_window(env_id, monkeypatch):
    env = gym.make(env_id, render_mode="human").unwrapped
    shown = []
    show = env.canvas.show
    monkeypatch.setattr(env.canvas, "show", lambda mode, fps: (shown.append(mode), show(mode, fps))[1])
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert shown == ["human", "human"]
    assert env.render() is None
    env.close()
    env.close()


@every_env
def test_render_without_pygame_says_what_to_install(env_id, monkeypatch):
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "pygame":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    env = gym.make(env_id, render_mode="rgb_array")
    env.reset(seed=0)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DependencyNotInstalled, match=r"pip install \"gymnasium\[classic-control\]\""):
        env.render()


@every_env
def test_order_is_enforced(env_id):
    env = gym.make(env_id, render_mode="rgb_array").unwrapped
    with pytest.raises(ResetNeeded, match="before step"):
        env.step(env.action_space.sample())
    with pytest.raises(ResetNeeded, match="before render"):
        env.render()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "secret"}, "context must be one of 'visible', 'hidden', 'noisy', not 'secret'"),
        ({"context_noise": -1.0}, "context_noise must be 0 or more, not -1.0"),
        ({"render_mode": "ansi"}, "render_mode must be one of None, 'human', 'rgb_array', not 'ansi'"),
    ],
)
@every_env
def test_bad_arguments(env_id, options, message):
    with pytest.raises(ValueError, match=message):
        gym.spec(env_id).make(**options) if "render_mode" not in options else make_class(env_id)(**options)


def make_class(env_id: str) -> type[gym.Env]:
    return getattr(modmoe_envs, ENVS[env_id]["entry_point"].split(":")[1])


@pytest.mark.parametrize(
    ("env_id", "options", "message"),
    [
        (LEAP, {"terrain": "lava"}, "terrain must be one of 'mixed', 'gap', 'wall', 'step', not 'lava'"),
        (LEAP, {"course": 3.0}, "course must be longer than 3.0 m"),
        (REACH, {"num_contexts": 0}, "num_contexts must be 1 or more, not 0"),
        (REACH, {"task": 3}, "task must be None or one of 0 to 2, not 3"),
        (REACH, {"task": True}, "task must be None or one of 0 to 2, not True"),
        (PENDULUM, {"parameter": "colour"}, "parameter must be one of 'gravity', 'mass', 'length', not 'colour'"),
        (CARTPOLE, {"values": ()}, "values must be one or more positive numbers"),
        (CARTPOLE, {"values": (1.0, 0.0)}, "values must be one or more positive numbers"),
        (PENDULUM, {"switch_every": 0}, "switch_every must be 1 or more steps"),
        (GOALS, {"num_contexts": 0}, "num_contexts must be 1 or more, not 0"),
        (GOALS, {"task": 3}, "task must be None or one of 0 to 2, not 3"),
        (CARTPOLE, {"task": -1}, "task must be None or one of 0 to 2, not -1"),
    ],
)
def test_bad_arguments_of_one(env_id, options, message):
    with pytest.raises(ValueError, match=message):
        gym.make(env_id, **options)


@every_env
def test_a_misspelt_reset_option_is_refused(env_id):
    env = gym.make(env_id)
    with pytest.raises(ValueError, match="unknown reset option 'tsak'; known: "):
        env.reset(options={"tsak": 1})


@pytest.mark.parametrize("env_id", [REACH, PENDULUM, CARTPOLE, GOALS])
def test_a_task_for_one_reset(env_id):
    env = gym.make(env_id, task=0)
    assert env.reset(seed=0, options={"task": 2})[1]["context"] == 2
    assert env.reset()[1]["context"] == 0
    with pytest.raises(ValueError, match="0 to 2, not 3"):
        env.reset(options={"task": 3})


@pytest.mark.parametrize("env_id", [REACH, PENDULUM, CARTPOLE, GOALS])
def test_a_seed_gives_the_same_start_in_every_task(env_id):
    starts = [gym.make(env_id, task=task, context="hidden").reset(seed=3)[0] for task in range(3)]
    np.testing.assert_array_equal(starts[1], starts[0])
    np.testing.assert_array_equal(starts[2], starts[0])


@pytest.mark.parametrize("env_id", [REACH, PENDULUM, CARTPOLE, GOALS])
def test_contexts_are_drawn_evenly(env_id):
    env = gym.make(env_id)
    env.reset(seed=0)
    counts = np.bincount([env.reset()[1]["context"] for _ in range(600)], minlength=3)
    assert counts.min() > 200 - 4 * (600 * 2 / 9) ** 0.5  # 200 each, standard deviation 11.5


@pytest.mark.parametrize(("env_id", "steps"), [(LEAP, 120), (REACH, 20), (PENDULUM, 200), (CARTPOLE, 500), (GOALS, 20)])
def test_time_limits(env_id, steps):
    assert gym.spec(env_id).max_episode_steps == steps


@pytest.mark.parametrize(("env_id", "steps"), [(REACH, 20), (PENDULUM, 200), (GOALS, 20)])
def test_truncated_by_time(env_id, steps):
    env = gym.make(env_id)
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(steps)]
    assert ends == [(False, False)] * (steps - 1) + [(False, True)]


@every_env
def test_docs_have_gymnasiums_headings(env_id):
    text = inspect.getdoc(make_class(env_id))
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "Description",
        "Action Space",
        "Observation Space",
        "Rewards",
        "Starting State",
        "Episode End",
        "Arguments",
        "Version History",
    ]
    for name in inspect.signature(make_class(env_id).__init__).parameters:
        assert name == "self" or f"- `{name}`:" in text


def test_the_entry_point_registers_every_environment():
    (point,) = (
        point
        for point in importlib.metadata.entry_points(group="gymnasium.envs")
        if point.value.startswith("modmoe_envs")
    )
    saved = {env_id: gym.registry.pop(env_id) for env_id in ENVS | SEQUENCES}
    try:
        with pytest.raises(gym.error.NamespaceNotFound):
            gym.spec(LEAP)
        point.load()()
        assert set(ENVS | SEQUENCES) <= set(gym.registry)
    finally:
        gym.registry.update(saved)


def test_make_imports_the_package_by_name():
    assert isinstance(gym.make(f"modmoe_envs:{REACH}").unwrapped, modmoe_envs.RotatedReach)
