"""Routers: trained by gradient (token choice), or fitted to data."""

from modmoe.gating.autoencoder import AutoencoderRouter
from modmoe.gating.base import Router
from modmoe.gating.classwise import ClasswiseRouter, DensityRouter
from modmoe.gating.density import GaussianRouter, PrototypeRouter
from modmoe.gating.fitted import FittedRouter
from modmoe.gating.learned import LearnedRouter
from modmoe.gating.ppca import PPCARouter
from modmoe.gating.stick import StickRouter
from modmoe.gating.token_choice import DenseRouter, TopKRouter

__all__ = [
    "AutoencoderRouter",
    "ClasswiseRouter",
    "DenseRouter",
    "DensityRouter",
    "FittedRouter",
    "GaussianRouter",
    "LearnedRouter",
    "PPCARouter",
    "PrototypeRouter",
    "Router",
    "StickRouter",
    "TopKRouter",
]
