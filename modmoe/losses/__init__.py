"""Auxiliary losses of routers: pure functions of tensors, and a way to carry them through a host."""

from modmoe.losses.attach import attach
from modmoe.losses.balance import load_balancing_loss
from modmoe.losses.z import z_loss

__all__ = ["attach", "load_balancing_loss", "z_loss"]
