"""Auxiliary losses of routers: pure functions of tensors, and a way to carry them through a host."""

from modmoe.losses.attach import attach
from modmoe.losses.balance import load_balancing_loss
from modmoe.losses.importance import expected_load, importance_loss, load_loss
from modmoe.losses.mutual_information import mutual_information_loss
from modmoe.losses.relu import relu_l1_loss
from modmoe.losses.z import z_loss

__all__ = [
    "attach",
    "expected_load",
    "importance_loss",
    "load_balancing_loss",
    "load_loss",
    "mutual_information_loss",
    "relu_l1_loss",
    "z_loss",
]
