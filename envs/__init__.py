"""Gymnasium environments for modular reinforcement learning; importing the package registers them."""

from .leap_terrain import LeapTerrain, LeapTerrainVector, course_distance, held_out_seeds
from .point_goals import PointGoals, PointGoalsVector
from .registration import register
from .rotated_reach import RotatedReach, RotatedReachVector
from .switching_cartpole import SwitchingCartPole
from .switching_pendulum import SwitchingPendulum
from .task_sequence import TaskSequence
from .transfer import (
    average_performance,
    backward_transfer,
    forgetting,
    forgetting_by_task,
    forward_transfer,
    learning_transfer,
)

__all__ = [
    "LeapTerrain",
    "LeapTerrainVector",
    "PointGoals",
    "PointGoalsVector",
    "RotatedReach",
    "RotatedReachVector",
    "SwitchingCartPole",
    "SwitchingPendulum",
    "TaskSequence",
    "average_performance",
    "backward_transfer",
    "course_distance",
    "forgetting",
    "forgetting_by_task",
    "forward_transfer",
    "held_out_seeds",
    "learning_transfer",
    "register",
]

register()
