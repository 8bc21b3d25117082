"""One growable pool of experts for continual, meta, reinforcement and multi-task learning."""

from modmoe import losses
from modmoe.errors import MissingExtraError, NonFiniteError
from modmoe.experts import Expert, MLPExpert
from modmoe.gating import DenseRouter, GaussianRouter, PrototypeRouter, Router, TopKRouter
from modmoe.growable import GrowableBuffer, GrowableParameter, Init, RowSpec
from modmoe.growth import count_parameters, freeze, grow, pools, remove, unfreeze
from modmoe.layer import MoELayer
from modmoe.optim import sync_optimizer
from modmoe.pool import ExpertPool
from modmoe.routing import Routing

__version__ = "0.1.0"

__all__ = [
    "DenseRouter",
    "Expert",
    "ExpertPool",
    "GaussianRouter",
    "GrowableBuffer",
    "GrowableParameter",
    "Init",
    "MLPExpert",
    "MissingExtraError",
    "MoELayer",
    "NonFiniteError",
    "PrototypeRouter",
    "Router",
    "Routing",
    "RowSpec",
    "TopKRouter",
    "count_parameters",
    "freeze",
    "grow",
    "losses",
    "pools",
    "remove",
    "sync_optimizer",
    "unfreeze",
]
