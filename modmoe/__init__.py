"""One growable pool of experts for continual, meta, reinforcement and multi-task learning."""

from modmoe import losses
from modmoe.checkpoint import load_checkpoint, save_checkpoint
from modmoe.errors import CheckpointError, MissingExtraError, NonFiniteError
from modmoe.experts import ConvExpert, Expert, MLPExpert
from modmoe.gating import (
    AutoencoderRouter,
    DenseRouter,
    GaussianRouter,
    LearnedRouter,
    PPCARouter,
    PrototypeRouter,
    Router,
    StickRouter,
    TopKRouter,
)
from modmoe.growable import GrowableBuffer, GrowableParameter, Init, RowSpec
from modmoe.growth import count_parameters, freeze, grow, pools, remove, unfreeze
from modmoe.layer import MoELayer
from modmoe.optim import sync_optimizer
from modmoe.pool import ExpertPool
from modmoe.routing import Routing

__version__ = "0.1.0"

__all__ = [
    "AutoencoderRouter",
    "CheckpointError",
    "ConvExpert",
    "DenseRouter",
    "Expert",
    "ExpertPool",
    "GaussianRouter",
    "GrowableBuffer",
    "GrowableParameter",
    "Init",
    "LearnedRouter",
    "MLPExpert",
    "MissingExtraError",
    "MoELayer",
    "NonFiniteError",
    "PPCARouter",
    "PrototypeRouter",
    "Router",
    "Routing",
    "RowSpec",
    "StickRouter",
    "TopKRouter",
    "count_parameters",
    "freeze",
    "grow",
    "load_checkpoint",
    "losses",
    "pools",
    "remove",
    "save_checkpoint",
    "sync_optimizer",
    "unfreeze",
]
