"""Routers: trained by gradient (token choice), or fitted to data."""

from modmoe.gating.autoencoder import AutoencoderRouter
from modmoe.gating.base import Router
from modmoe.gating.density import GaussianRouter, PrototypeRouter
from modmoe.gating.fitted import ClasswiseRouter, FittedRouter
from modmoe.gating.ppca import PPCARouter
from modmoe.gating.stick import StickRouter
from modmoe.gating.token_choice import DenseRouter, TopKRouter

__all__ = [
    "AutoencoderRouter",
    "ClasswiseRouter",
    "DenseRouter",
    "FittedRouter",
    "GaussianRouter",
    "PPCARouter",
    "PrototypeRouter",
    "Router",
    "StickRouter",
    "TopKRouter",
]
