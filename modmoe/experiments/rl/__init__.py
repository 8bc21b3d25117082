"""Reinforcement learning: MACE, mixture policies beside plain ones, tasks in sequence."""
