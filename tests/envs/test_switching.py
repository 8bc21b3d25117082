"""SwitchingPendulum and SwitchingCartPole: Gymnasium's physics with the parameter that the context names."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from modmoe_envs import SwitchingCartPole, SwitchingPendulum


@pytest.mark.parametrize(
    ("parameter", "value", "state", "action", "speed"),
    [
        # velocity += (3 g / (2 l) sin(angle) + 3 torque / (m l^2)) * .05, torque = 2 * action
        ("gravity", 5.0, (np.pi / 2, 0), 0.0, 0.375),  # 7.5 * .05
        ("mass", 2.0, (0.0, 0.0), 1.0, 0.15),  # 3 * 2 / 2 * .05
        ("length", 2.0, (0.0, 0.0), 1.0, 0.075),  # 3 * 2 / 4 * .05
        ("length", 2.0, (np.pi / 2, 0.0), 0.0, 0.375),  # 30 / 4 * .05
    ],
)
def test_pendulum_by_hand(parameter, value, state, action, speed):
    env = SwitchingPendulum(parameter, values=(value,))
    env.reset(seed=0)
    env.state = np.array(state)
    observation, reward, _, _, info = env.step(np.array([action], np.float32))
    assert observation[2] == pytest.approx(speed, abs=1e-6)
    assert observation[0] == pytest.approx(np.cos(state[0] + 0.05 * speed), abs=1e-6)
    assert reward == pytest.approx(-(state[0] ** 2 + 0.001 * (2 * action) ** 2))
    assert info == {"context": 0, parameter: value}


@pytest.mark.parametrize(
    ("parameter", "value", "speed"),
    [
        # From rest, 10 N: temp = 10 / (1 + m), angle'' = -temp / (l (4/3 - m / (1 + m))), speed after .02 s.
        ("length", 0.5, -0.292683),  # 9.0909 / (.5 * 1.242424) = 14.6341
        ("length", 1.0, -0.146341),
        ("mass", 0.5, -0.266667),  # 6.6667 / (.5 * 1) = 13.3333
    ],
)
def test_cartpole_by_hand(parameter, value, speed):
    env = SwitchingCartPole(parameter, values=(value,))
    env.reset(seed=0)
    env.state = np.zeros(4)
    observation, reward, terminated, _, info = env.step(1)
    assert observation[3] == pytest.approx(speed, abs=1e-6)
    assert (reward, terminated) == (1.0, False)
    assert info == {"context": 0, parameter: value}


def test_cartpole_gravity_by_hand():
    # At .1 rad, gravity adds g sin(.1) / (l (4/3 - m cos^2(.1) / 1.1)) = .0998334 g / .621664;
    # between 20 and 9.8 that makes 1.63801.
    speeds = []
    for task in (1, 2):
        env = SwitchingCartPole(task=task)
        env.reset(seed=0)
        env.state = np.array([0, 0, 0.1, 0])
        speeds.append(env.step(1)[0][3])
    assert speeds[1] - speeds[0] == pytest.approx(0.02 * 1.63801, abs=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs", "scale"), [(SwitchingPendulum, PendulumEnv, 0.5), (SwitchingCartPole, CartPoleEnv, 1)]
)
def test_the_middle_gravity_is_gymnasiums_own(ours, theirs, scale):
    env, plain = ours(task=1), theirs()
    env.reset(seed=3)
    plain.reset(seed=0)
    plain.state = np.array(env.state)
    plain.action_space.seed(0)
    for _ in range(15):
        action = plain.action_space.sample()
        one, other = env.step(scale * action if scale != 1 else action), plain.step(action)
        np.testing.assert_allclose(one[0][:-3], other[0], atol=1e-6)
        np.testing.assert_allclose(one[1:4], other[1:4], atol=1e-6)
        if one[2]:
            break


@pytest.mark.parametrize(("cls", "attribute"), [(SwitchingPendulum, "g"), (SwitchingCartPole, "gravity")])
def test_switches_inside_episodes(cls, attribute):
    env = cls(switch_every=3, task=1)
    env.action_space.seed(0)
    observation, info = env.reset(seed=0)
    contexts, gravities, shown = [info["context"]], [getattr(env, attribute)], [observation[-3:].argmax()]
    for _ in range(7):
        observation, *_, info = env.step(env.action_space.sample())
        contexts.append(info["context"])
        gravities.append(getattr(env, attribute))
        shown.append(observation[-3:].argmax())
        assert info["gravity"] == gravities[-1]
    assert contexts == [1, 1, 1, 2, 2, 2, 0, 0]
    assert shown == contexts
    assert gravities == [env.switcher.values[context] for context in contexts]
    assert env.reset()[1]["context"] == 1  # the next episode begins where this one did


@pytest.mark.parametrize("cls", [SwitchingPendulum, SwitchingCartPole])
def test_does_not_switch_inside_episodes_unless_told(cls):
    env = cls()
    _, info = env.reset(seed=0)
    env.action_space.seed(0)
    assert {env.step(env.action_space.sample())[4]["context"] for _ in range(8)} == {info["context"]}


def test_cartpole_ends():
    env = gym.make("modmoe/SwitchingCartPole-v0")
    env.reset(seed=0)
    steps, over = 0, False
    while not over:
        *_, over, _, _ = env.step(1)
        steps += 1
    assert abs(env.unwrapped.state[2]) > 12 * np.pi / 180
    assert steps < 15


@pytest.mark.parametrize("sign", [-1, 1])
def test_cartpole_observations_stay_in_their_space(sign):
    env = SwitchingCartPole()
    env.reset(seed=0)
    env.state = sign * np.array([0.0, 100.0, 0.0, 100.0])
    observation = env.step(1)[0]
    assert observation in env.observation_space
    assert observation[1] == sign * 20.0


def test_pendulum_takes_gymnasiums_reset_options():
    env = SwitchingPendulum()
    env.reset(seed=0, options={"x_init": 0.01, "y_init": 0.01, "task": 2})
    assert np.abs(env.state).max() < 0.01
    assert env.g == 15.0
