"""Reinforcement learning: MACE, mixture policies beside plain ones, tasks in sequence."""

import modmoe.rl  # noqa: F401  # says how to install what is missing
