"""From other models to pools of experts and back; within a pool: prune, merge, change k."""

from modmoe.conversion.branch_train_mix import branch_train_mix
from modmoe.conversion.distill import distill, distillation_loss
from modmoe.conversion.edit import change_top_k, merge_experts, prune_unused
from modmoe.conversion.feed_forward import SwiGLU
from modmoe.conversion.huggingface import SharedSwiGLU, from_transformers, to_transformers, transformers_config
from modmoe.conversion.huggingface_models import replace_moe_blocks, restore_moe_blocks, sync_config
from modmoe.conversion.to_dense import average_expert, busiest_expert, measure_load, to_dense
from modmoe.conversion.upcycle import upcycle

__all__ = [
    "SharedSwiGLU",
    "SwiGLU",
    "average_expert",
    "branch_train_mix",
    "busiest_expert",
    "change_top_k",
    "distill",
    "distillation_loss",
    "from_transformers",
    "measure_load",
    "merge_experts",
    "prune_unused",
    "replace_moe_blocks",
    "restore_moe_blocks",
    "sync_config",
    "to_dense",
    "to_transformers",
    "transformers_config",
    "upcycle",
]
