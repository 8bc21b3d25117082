"""Routers."""

from modmoe.gating.base import Router
from modmoe.gating.density import DensityRouter, GaussianRouter, PrototypeRouter
from modmoe.gating.token_choice import DenseRouter, TopKRouter

__all__ = ["DenseRouter", "DensityRouter", "GaussianRouter", "PrototypeRouter", "Router", "TopKRouter"]
