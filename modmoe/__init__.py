"""One growable pool of experts for continual, meta, reinforcement and multi-task learning."""

from modmoe import losses
from modmoe.attention import MoAttention
from modmoe.catalog import make_router
from modmoe.checkpoint import load_checkpoint, save_checkpoint
from modmoe.errors import CheckpointError, MissingExtraError, NonFiniteError
from modmoe.experts import (
    AttentionExpert,
    ConvExpert,
    Expert,
    GatedSharedExpert,
    LoRAExpert,
    MLPExpert,
    SwiGLUExpert,
)
from modmoe.gating import (
    AttentionRouter,
    AutoencoderRouter,
    BaseAssignmentRouter,
    CosineRouter,
    DeepSeekV2Router,
    DeepSeekV3Router,
    DenseRouter,
    DomainRouter,
    ExpertChoiceRouter,
    GaussianRouter,
    GroupedRandomRouter,
    GShardRouter,
    HashRouter,
    LearnedRouter,
    LoryRouter,
    NoisyTopKRouter,
    PPCARouter,
    PrototypeRouter,
    ReLURouter,
    Router,
    SmearRouter,
    SoftRouter,
    StickRouter,
    SwitchRouter,
    TopKRouter,
    VMoERouter,
)
from modmoe.growable import GrowableBuffer, GrowableParameter, Init, RowSpec
from modmoe.growth import count_parameters, freeze, grow, pools, remove, unfreeze
from modmoe.layer import MoELayer
from modmoe.lora import lora_layer, merged_linear
from modmoe.optim import sync_optimizer
from modmoe.pool import ExpertPool
from modmoe.routing import MergedRouting, Routing, SlotRouting
from modmoe.segmentation import segment_pool, segmented

__version__ = "0.1.0"

__all__ = [
    "AttentionExpert",
    "AttentionRouter",
    "AutoencoderRouter",
    "BaseAssignmentRouter",
    "CheckpointError",
    "ConvExpert",
    "CosineRouter",
    "DeepSeekV2Router",
    "DeepSeekV3Router",
    "DenseRouter",
    "DomainRouter",
    "Expert",
    "ExpertChoiceRouter",
    "ExpertPool",
    "GShardRouter",
    "GatedSharedExpert",
    "GaussianRouter",
    "GroupedRandomRouter",
    "GrowableBuffer",
    "GrowableParameter",
    "HashRouter",
    "Init",
    "LearnedRouter",
    "LoRAExpert",
    "LoryRouter",
    "MLPExpert",
    "MergedRouting",
    "MissingExtraError",
    "MoAttention",
    "MoELayer",
    "NoisyTopKRouter",
    "NonFiniteError",
    "PPCARouter",
    "PrototypeRouter",
    "ReLURouter",
    "Router",
    "Routing",
    "RowSpec",
    "SlotRouting",
    "SmearRouter",
    "SoftRouter",
    "StickRouter",
    "SwiGLUExpert",
    "SwitchRouter",
    "TopKRouter",
    "VMoERouter",
    "count_parameters",
    "freeze",
    "grow",
    "load_checkpoint",
    "lora_layer",
    "losses",
    "make_router",
    "merged_linear",
    "pools",
    "remove",
    "save_checkpoint",
    "segment_pool",
    "segmented",
    "sync_optimizer",
    "unfreeze",
]
