"""Language models out of others: upcycled, mixed from branches, and Mixtral checkpoints of transformers, both ways."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modmoe.conversion import branch_train_mix, from_transformers, to_transformers, transformers_config, upcycle
from modmoe.gating import TopKRouter
from modmoe.hosts import import_host
from modmoe.language.transformer import Balance, ModelSize, MoELanguageModel
from modmoe.layer import MoELayer
from modmoe.rows import Task

FEED_FORWARD = r"blocks\.\d+\.feed_forward"  # what upcycle and branch_train_mix select
PARTS = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
BLOCK_PARTS = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "feed_forward_norm.weight",
    **{f"self_attn.{part}_proj.weight": f"attention.{part}_proj.weight" for part in "qkvo"},
}


def upcycled(
    dense: MoELanguageModel, num_experts: int = 8, top_k: int = 1, noise: float = 0.0, balance: Balance | None = None
) -> MoELanguageModel:
    """A copy of a dense model in which each feed-forward part is a pool of copies of it; it computes the same.

    With one expert chosen, its weight is 1 and the active parameters are those of the dense model, but for the gates.

    Args:
        dense: left as it is.
        num_experts: E.
        top_k: k.
        noise: see :func:`modmoe.conversion.upcycle`.
        balance: the auxiliary losses; None for a load-balancing loss of 0.01.
    Raises:
        ValueError: as :func:`modmoe.conversion.upcycle` does, as where the feed-forward parts are not dense.
    Source:
        Komatsuzaki et al. 2022.
    """
    model = copy.deepcopy(dense)
    make = lambda features: TopKRouter(features, top_k, renormalize=True)  # noqa: E731
    upcycle(model, FEED_FORWARD, num_experts, make_router=make, noise=noise)
    model.balance = Balance(load=0.01) if balance is None else balance
    return model


def mixed_branches(
    branches: Sequence[MoELanguageModel],
    top_k: int = 2,
    tasks: Sequence[Task | None] | None = None,
    balance: Balance | None = None,
) -> MoELanguageModel:
    """Branch-Train-MiX: dense models trained apart on their domains, from one seed, as experts of one model.

    The feed-forward parts become experts, the rest is averaged, the gates are new: train the model on.

    Args:
        branches: of one size; left as they are.
        top_k: k.
        tasks: each branch's, or None.
        balance: the auxiliary losses; None for a load-balancing loss of 0.01.
    Raises:
        ValueError: as :func:`modmoe.conversion.branch_train_mix` does.
    Source:
        Sukhbaatar et al. 2024 (BTX).
    """
    model, _ = branch_train_mix(branches, FEED_FORWARD, top_k, tasks=tasks)
    assert isinstance(model, MoELanguageModel)
    model.balance = Balance(load=0.01) if balance is None else balance
    return model


@torch.no_grad()
def from_mixtral(source: nn.Module, context: int | None = None) -> MoELanguageModel:
    """A language model that computes what a Mixtral of transformers does.

    Args:
        source: a MixtralForCausalLM with its ``config``; copied.
        context: None for ``max_position_embeddings``; positions need no memory, so that may be long.
    Raises:
        ValueError: on settings that have no counterpart here (scaled rotary angles, a sliding window shorter than the
            context, heads of another size than D / h), and as :func:`modmoe.conversion.from_transformers` does.
    Source:
        transformers 5.24.0, MixtralForCausalLM (Jiang et al. 2024).
    """
    config: Any = source.config
    state: Mapping[str, Tensor] = source.state_dict()
    size = ModelSize(
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings if context is None else context,
        features=config.hidden_size,
        num_blocks=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        hidden_features=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        rope_theta=_theta(config),
    )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < size.context:
        raise ValueError(
            f"a sliding window of {window} is shorter than the context of {size.context}: give a shorter one"
        )
    if (getattr(config, "head_dim", None) or size.features // size.num_heads) * size.num_heads != size.features:
        raise ValueError(f"heads of {config.head_dim} are not {size.features} / {size.num_heads}")
    layers = iter(
        from_transformers("mixtral", state, config, f"model.layers.{number}.mlp.") for number in range(size.num_blocks)
    )
    model = MoELanguageModel(size, lambda: next(layers), balance=Balance(load=config.router_aux_loss_coef))
    like = state["lm_head.weight"]
    model.to(device=like.device, dtype=like.dtype)
    ours = dict(model.named_parameters())
    for theirs, name in _names(size.num_blocks).items():
        ours[name].copy_(state[theirs])
    return model


@torch.no_grad()
def to_mixtral(model: MoELanguageModel) -> Any:
    """A MixtralForCausalLM of transformers that computes what a model of the preset ``mixtral`` does.

    A grown pool gives more experts; what is frozen is not kept.

    Args:
        model: SwiGLU experts under a TopKRouter in every block, RMSNorm, rotary positions.
    Returns:
        The model in evaluation mode, on the CPU; ``save_pretrained`` writes it.
    Raises:
        ValueError: on any other model, or if its layers do not have equally many experts of one size.
        MissingExtraError: if transformers is not installed.
    """
    transformers = import_host("transformers")
    size = model.size
    layers = [block.get_submodule("feed_forward") for block in model.blocks]
    attentions = {type(block.get_submodule("attention")).__name__ for block in model.blocks}
    if size.norm != "rms" or size.positions != "rotary" or attentions != {"CausalAttention"}:
        raise ValueError(f"mixtral needs RMSNorm, rotary positions and ordinary attention, got {size} and {attentions}")
    configs = []
    for number, layer in enumerate(layers):
        if not isinstance(layer, MoELayer):
            raise ValueError(f"mixtral has experts in every block, block {number} has {type(layer).__name__}")
        configs.append(transformers_config("mixtral", layer))
    if any(config != configs[0] for config in configs):
        raise ValueError(f"one config serves all blocks, but they need {configs}")
    config = transformers.MixtralConfig(
        vocab_size=size.vocab_size,
        max_position_embeddings=size.context,
        num_hidden_layers=size.num_blocks,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads or size.num_heads,
        rms_norm_eps=size.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        sliding_window=None,
        tie_word_embeddings=False,
        router_aux_loss_coef=model.balance.load,
        bos_token_id=None,
        eos_token_id=None,
        **configs[0],
    )
    ours = dict(model.named_parameters())
    state = {theirs: ours[name].detach().cpu() for theirs, name in _names(size.num_blocks).items()}
    for number, layer in enumerate(layers):
        assert isinstance(layer, MoELayer)
        state |= to_transformers("mixtral", layer, prefix=f"model.layers.{number}.mlp.")
    target = transformers.MixtralForCausalLM(config).to(state["lm_head.weight"].dtype)
    target.load_state_dict(state)
    return target.eval()


def _names(num_blocks: int) -> dict[str, str]:
    """transformers' name -> ours, of all but the experts and gates."""
    blocks = {
        f"model.layers.{number}.{theirs}": f"blocks.{number}.{ours}"
        for number in range(num_blocks)
        for theirs, ours in BLOCK_PARTS.items()
    }
    return {**PARTS, **blocks}


def _theta(config: Any) -> float:
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"rotary angles of the type '{rope['rope_type']}' have no counterpart here, only 'default' has"
        )
    return float(rope["rope_theta"])
