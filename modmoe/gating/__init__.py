"""Routers: trained by gradient, fitted to data, or by ids."""

from modmoe.gating.attention import AttentionRouter
from modmoe.gating.autoencoder import AutoencoderRouter
from modmoe.gating.base import Router
from modmoe.gating.base_assignment import BaseAssignmentRouter
from modmoe.gating.classwise import ClasswiseRouter, DensityRouter
from modmoe.gating.cosine import CosineRouter
from modmoe.gating.density import GaussianRouter, PrototypeRouter
from modmoe.gating.domain import DomainRouter
from modmoe.gating.expert_choice import ExpertChoiceRouter
from modmoe.gating.fitted import FittedRouter
from modmoe.gating.group_limited import DeepSeekV2Router, DeepSeekV3Router
from modmoe.gating.ids import GroupedRandomRouter, HashRouter
from modmoe.gating.learned import LearnedRouter
from modmoe.gating.merging import LoryRouter, SmearRouter
from modmoe.gating.noisy import NoisyTopKRouter
from modmoe.gating.ppca import PPCARouter
from modmoe.gating.relu import ReLURouter
from modmoe.gating.soft import SoftRouter
from modmoe.gating.stick import StickRouter
from modmoe.gating.switch import GShardRouter, SwitchRouter
from modmoe.gating.token_choice import DenseRouter, TopKRouter
from modmoe.gating.v_moe import VMoERouter

__all__ = [
    "AttentionRouter",
    "AutoencoderRouter",
    "BaseAssignmentRouter",
    "ClasswiseRouter",
    "CosineRouter",
    "DeepSeekV2Router",
    "DeepSeekV3Router",
    "DenseRouter",
    "DensityRouter",
    "DomainRouter",
    "ExpertChoiceRouter",
    "FittedRouter",
    "GShardRouter",
    "GaussianRouter",
    "GroupedRandomRouter",
    "HashRouter",
    "LearnedRouter",
    "LoryRouter",
    "NoisyTopKRouter",
    "PPCARouter",
    "PrototypeRouter",
    "ReLURouter",
    "Router",
    "SmearRouter",
    "SoftRouter",
    "StickRouter",
    "SwitchRouter",
    "TopKRouter",
    "VMoERouter",
]
