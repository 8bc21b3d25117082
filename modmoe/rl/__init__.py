"""Reinforcement learning on Stable-Baselines3 and Gymnasium."""

from modmoe.hosts import import_host

import_host("stable_baselines3")

from modmoe.rl.actor_critic import MoEActorCriticPolicy  # noqa: E402
from modmoe.rl.callbacks import GrowOnPlateau, GrowOnTask, RoutingLogger  # noqa: E402
from modmoe.rl.experts import DeepMLPExpert, SideBySideExpert  # noqa: E402
from modmoe.rl.growth import freeze, grow, remove, unfreeze  # noqa: E402
from modmoe.rl.mace import MACE  # noqa: E402
from modmoe.rl.mace_policy import MACEPolicy  # noqa: E402
from modmoe.rl.network import MoENetwork  # noqa: E402
from modmoe.rl.off_policy import MoESACPolicy, MoETD3Policy  # noqa: E402
from modmoe.rl.options import MoEOptions  # noqa: E402
from modmoe.rl.policy import MoEPolicy  # noqa: E402
from modmoe.rl.q_network import MoEDQNPolicy, MoEQNetwork  # noqa: E402
from modmoe.rl.safe import load_safely, save_safely  # noqa: E402

__all__ = [
    "MACE",
    "DeepMLPExpert",
    "GrowOnPlateau",
    "GrowOnTask",
    "MACEPolicy",
    "MoEActorCriticPolicy",
    "MoEDQNPolicy",
    "MoENetwork",
    "MoEOptions",
    "MoEPolicy",
    "MoEQNetwork",
    "MoESACPolicy",
    "MoETD3Policy",
    "RoutingLogger",
    "SideBySideExpert",
    "freeze",
    "grow",
    "load_safely",
    "remove",
    "save_safely",
    "unfreeze",
]
