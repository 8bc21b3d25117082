"""Steps per second of mixture policies beside SB3's MlpPolicy with equal parameters, as a ratio.

    python benchmarks/rl_throughput.py --json benchmarks/results/rl_throughput.json

Both train with PPO on 8 environments and SB3's default settings but for rollouts of 512 steps, in turns (mixture, MLP,
mixture, ...). A round's ratio is of neighbours, and the figure is the median over rounds with the range; once in CPU
time (one process, one thread: what else the machine does disturbs it less) and once by the clock. Also the CPU time of
one forward pass of 8 observations without a gradient, and of one update of 64.

Cost: about 6 minutes on one core. Gate: 0.6; aim: 0.8 (issue 7).
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import stable_baselines3
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from modmoe.rl import MoEActorCriticPolicy

NUM_ENVS = 8
NUM_STEPS = 512  # of a rollout
MIXTURES: dict[str, dict[str, Any]] = {
    "top_2_of_4": {"num_experts": 4, "router": "top_k", "router_kwargs": {"top_k": 2}},
    "top_2_of_4_balanced": {"num_experts": 4, "router": "top_k", "router_kwargs": {"top_k": 2}, "balance_coef": 0.01},
    "dense_4": {"num_experts": 4, "router": "dense"},
    "top_1_of_8": {"num_experts": 8, "router": "top_k", "router_kwargs": {"top_k": 1}},
}


def num_parameters(model: PPO) -> int:
    return sum(parameter.numel() for parameter in model.policy.parameters())


def build_mlp(env_id: str) -> PPO:
    return PPO("MlpPolicy", make_vec_env(env_id, NUM_ENVS, seed=0), n_steps=NUM_STEPS, seed=0, device="cpu")


def build_mixture(env_id: str, options: dict[str, Any], target: int) -> PPO:
    """The mixture whose two hidden layers, as many as the MLP has, bring its parameters closest to ``target``."""

    def build(hidden: int) -> PPO:
        env = make_vec_env(env_id, NUM_ENVS, seed=0)
        kwargs = {**options, "hidden_features": (hidden, hidden)}
        return PPO(MoEActorCriticPolicy, env, n_steps=NUM_STEPS, policy_kwargs=kwargs, seed=0, device="cpu")

    found = min(range(4, 64), key=lambda hidden: abs(num_parameters(build(hidden)) - target))
    return build(found)


class Speed(NamedTuple):
    """Timesteps per second of CPU time, and by the clock."""

    cpu: float
    clock: float


def measure(model: PPO, timesteps: int) -> Speed:
    clock, cpu = time.perf_counter(), time.process_time()
    model.learn(timesteps, reset_num_timesteps=False)
    return Speed(timesteps / (time.process_time() - cpu), timesteps / (time.perf_counter() - clock))


def microseconds(call: Callable[[], Any], repeats: int = 50, rounds: int = 7) -> float:
    """The least CPU time of a call over rounds."""
    for _ in range(10):
        call()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(repeats):
            call()
        times.append((time.process_time() - start) / repeats)
    return round(1e6 * min(times), 1)


def parts_of_a_step(model: PPO) -> dict[str, float]:
    """One forward pass as in a rollout, and one update as in training, in microseconds."""
    space = model.observation_space
    assert isinstance(space, gym.spaces.Box)
    eight, many = (torch.rand(size, *space.shape) for size in (NUM_ENVS, 64))
    with torch.no_grad():
        actions = model.policy(many)[0]
    model.policy.set_training_mode(True)

    def forward() -> None:
        with torch.no_grad():
            model.policy(eight)

    def update() -> None:
        values, log_prob, entropy = model.policy.evaluate_actions(many, actions)
        (values.mean() - log_prob.mean() - entropy.mean()).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(model.policy.parameters(), 0.5)
        model.policy.optimizer.step()
        model.policy.optimizer.zero_grad()

    return {"forward_of_8_us": microseconds(forward), "update_of_64_us": microseconds(update)}


def compare(env_id: str, name: str, timesteps: int, rounds: int) -> dict[str, Any]:
    mlp = build_mlp(env_id)
    mixture = build_mixture(env_id, MIXTURES[name], num_parameters(mlp))
    for model in (mlp, mixture):
        model.learn(1)  # warm up: one rollout and its update
    rounds_of = [(measure(mixture, timesteps), measure(mlp, timesteps)) for _ in range(rounds)]
    ratios = [ours.cpu / theirs.cpu for ours, theirs in rounds_of]
    return {
        "env": env_id,
        "mixture": name,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "clock_ratio": round(statistics.median(ours.clock / theirs.clock for ours, theirs in rounds_of), 3),
        "steps_per_second": round(statistics.median(ours.cpu for ours, _ in rounds_of)),
        "mlp_steps_per_second": round(statistics.median(theirs.cpu for _, theirs in rounds_of)),
        "parameters": num_parameters(mixture),
        "mlp_parameters": num_parameters(mlp),
        "parts": {"mixture": parts_of_a_step(mixture), "mlp": parts_of_a_step(mlp)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--envs", nargs="+", default=["CartPole-v1", "Pendulum-v1"])
    parser.add_argument("--mixtures", nargs="+", default=list(MIXTURES), choices=list(MIXTURES))
    parser.add_argument("--timesteps", type=int, default=8192, help="in one round: two rollouts")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for env_id in arguments.envs:
        for name in arguments.mixtures:
            rows.append(compare(env_id, name, arguments.timesteps, arguments.rounds))
            row = rows[-1]
            low, high = row["ratio_range"]
            speeds = f"{row['steps_per_second']:5d} steps/s, MLP {row['mlp_steps_per_second']:5d}"
            ratios = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f}), by the clock {row['clock_ratio']:.2f}"
            print(f"{env_id:14s} {name:20s} {speeds}: {ratios}", flush=True)
    if arguments.json:
        conditions = {
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "stable_baselines3": stable_baselines3.__version__,
            "gymnasium": gym.__version__,
            "num_envs": NUM_ENVS,
            "timesteps": arguments.timesteps,
            "rounds": arguments.rounds,
        }
        arguments.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
