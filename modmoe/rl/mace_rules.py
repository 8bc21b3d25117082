"""MACE's equations: what critics and actors learn, how a pair is chosen, how exploration fades."""

from typing import Literal

import torch
from torch import Tensor

Decay = Literal["linear", "geometric"]


def critic_target(rewards: Tensor, dones: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """y = (1-g) r + g max_j V_j(s'), and (1-g) r on a fall.

    Args:
        rewards: (B,).
        dones: (B,) float, 1 on a fall.
        next_values: (B, K) of the target network in s'.
        gamma: g in [0, 1].
    Returns:
        (B,).
    Source:
        Peng, Berseth, van de Panne 2016, algorithm 1.
    """
    return (1 - gamma) * rewards + gamma * (1 - dones) * next_values.max(1).values


def improves(targets: Tensor, values: Tensor) -> Tensor:
    """The CACLA condition y > max_j V_j(s).

    Args:
        targets: (B,) y.
        values: (B, K) of the target network in s.
    Returns:
        (B,) bool.
    Source:
        Peng, Berseth, van de Panne 2016, algorithm 1; van Hasselt and Wiering 2007 for one actor.
    """
    return targets > values.max(1).values


def anneal(ends: tuple[float, float], done: float, decay: Decay = "linear") -> float:
    """From the first of two values to the second, by the part ``done`` in [0, 1] of the way.

    Returns:
        a + (b-a) done, or a (b/a)^done where the decay is geometric.
    """
    start, end = ends
    return start + (end - start) * done if decay == "linear" else start * (end / start) ** done


def boltzmann_probabilities(values: Tensor, temperature: Tensor | float) -> Tensor:
    """P(i) = exp(V_i / temperature) / sum_j exp(V_j / temperature).

    Args:
        values: (B, K).
        temperature: > 0.
    Returns:
        (B, K), each row adds up to 1.
    Source:
        Peng, Berseth, van de Panne 2016, actor selection.
    """
    return torch.softmax(values / temperature, 1)
