"""The names under which ``gymnasium.make`` knows the environments."""

from typing import Any

import gymnasium as gym

ENVS: dict[str, dict[str, Any]] = {
    "modmoe/LeapTerrain-v0": {
        "entry_point": "modmoe_envs.leap_terrain:LeapTerrain",
        "vector_entry_point": "modmoe_envs.leap_terrain:LeapTerrainVector",
        "max_episode_steps": 120,
    },
    "modmoe/RotatedReach-v0": {
        "entry_point": "modmoe_envs.rotated_reach:RotatedReach",
        "vector_entry_point": "modmoe_envs.rotated_reach:RotatedReachVector",
        "max_episode_steps": 20,
    },
    "modmoe/SwitchingPendulum-v0": {
        "entry_point": "modmoe_envs.switching_pendulum:SwitchingPendulum",
        "max_episode_steps": 200,
    },
    "modmoe/SwitchingCartPole-v0": {
        "entry_point": "modmoe_envs.switching_cartpole:SwitchingCartPole",
        "max_episode_steps": 500,
    },
    "modmoe/PointGoals-v0": {
        "entry_point": "modmoe_envs.point_goals:PointGoals",
        "vector_entry_point": "modmoe_envs.point_goals:PointGoalsVector",
        "max_episode_steps": 20,
    },
}

SEQUENCES: dict[str, dict[str, Any]] = {
    "modmoe/TaskSequence-v0": {"entry_point": "modmoe_envs.task_sequence:sequence_of_contexts"},
}
"""Made of another environment, which has to be said: ``env_id`` and ``num_tasks``, see ``TaskSequence.of_contexts``."""


def register() -> None:
    """Register every environment that is not registered yet.

    ``import modmoe_envs`` calls it, and so does whatever loads the entry point group ``gymnasium.envs``. Gymnasium
    itself stopped loading that group in 1.0: there, import the package first or name it,
    ``gymnasium.make("modmoe_envs:modmoe/LeapTerrain-v0")``.
    """
    for name, options in (ENVS | SEQUENCES).items():
        if name not in gym.registry:
            gym.register(name, **options)
