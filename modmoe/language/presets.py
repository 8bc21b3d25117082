"""Language models by name: how known mixtures route, at equal active parameters and with the same shared parts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import nn

from modmoe.conversion import SharedSwiGLU
from modmoe.errors import did_you_mean
from modmoe.experts import AttentionExpert, SwiGLUExpert
from modmoe.gating import (
    DeepSeekV3Router,
    DomainRouter,
    GShardRouter,
    LoryRouter,
    Router,
    SwitchRouter,
    TopKRouter,
)
from modmoe.gating.capacity import Capacity
from modmoe.language.attention import HeadMixture
from modmoe.language.blocks import UNLIMITED
from modmoe.language.merging import PrefixSmearRouter
from modmoe.language.transformer import Balance, ModelSize, MoELanguageModel
from modmoe.layer import MoELayer
from modmoe.pool import ExpertPool

PresetName = Literal["dense", "switch", "gshard", "glam", "mixtral", "deepseek", "moa", "smear", "lory", "demix"]
SEGMENTS = 4  # of a context, between which merged experts change
GRANULARITY = 4  # parts of a dense layer that a fine-grained expert is one of
HEADS_CHOSEN = 3  # of MoA: with keys and values of half the features, as many numbers as ordinary attention has


@dataclass(frozen=True)
class Preset:
    """How one kind of mixture is built.

    Args:
        make_router: (D, context) -> router; None for a model without experts.
        share: an expert's hidden size is that of the dense layer divided by this: by k, or more.
        multiple: experts for each that is asked for.
        every: MoE in every n-th block, the last of each n.
        shared: a shared expert of an expert's size beside the others.
        heads: the experts are attention heads.
        balance: the auxiliary losses.
    """

    make_router: Callable[[int, int], Router] | None
    share: int = 1
    multiple: int = 1
    every: int = 1
    shared: bool = False
    heads: bool = False
    balance: Balance = field(default_factory=Balance)


def _segment(context: int) -> int:
    return max(1, context // SEGMENTS)


PRESETS: dict[str, Preset] = {
    "dense": Preset(None),
    "switch": Preset(
        lambda D, context: SwitchRouter(D, capacity=Capacity(1.25, eval_factor=UNLIMITED)),
        every=2,
        balance=Balance(load=0.01),
    ),
    "gshard": Preset(
        lambda D, context: GShardRouter(D, Capacity(1.0, eval_factor=UNLIMITED)),
        share=2,
        every=2,
        balance=Balance(load=0.01, first_choice=True),
    ),
    "glam": Preset(
        lambda D, context: TopKRouter(D, 2, capacity=Capacity(1.25, eval_factor=UNLIMITED)),
        share=2,
        every=2,
        balance=Balance(load=0.01, z=1e-4),
    ),
    "mixtral": Preset(lambda D, context: TopKRouter(D, 2, renormalize=True), share=2, balance=Balance(load=0.01)),
    "deepseek": Preset(
        lambda D, context: DeepSeekV3Router(D, GRANULARITY - 1), share=GRANULARITY, multiple=2, shared=True
    ),
    "moa": Preset(
        lambda D, context: TopKRouter(D, HEADS_CHOSEN, order="softmax_topk", renormalize=True),
        heads=True,
        balance=Balance(load=0.01, z=1e-3),
    ),
    "smear": Preset(lambda D, context: PrefixSmearRouter(D, _segment(context))),
    "lory": Preset(lambda D, context: LoryRouter(D, _segment(context))),
    "demix": Preset(lambda D, context: DomainRouter(D)),
}


def language_model(
    preset: str,
    size: ModelSize | None = None,
    num_experts: int = 8,
    every: int | None = None,
    last: int | None = None,
) -> MoELanguageModel:
    """A new model whose active parameters are those of ``dense``, but for the rows of the gates.

    =========  ====================================================  =================  ================================
    preset     experts chosen, and their hidden size                 in blocks          kept even by
    =========  ====================================================  =================  ================================
    switch     1 of E, H; capacity 1.25                              every second one   loss 0.01
    gshard     2 of E, H/2; the second one at random; capacity 1     every second one   loss 0.01 of first choices
    glam       2 of E, H/2; capacity 1.25                            every second one   loss 0.01, z-loss 1e-4
    mixtral    2 of E, H/2                                           all                loss 0.01
    deepseek   3 of 2 E, H/4, and a shared one of H/4                all                a bias on the choice
    moa        3 of E attention heads of D/2, shared keys, values    all                loss 0.01, z-loss 1e-3
    smear      all E merged, H, by the segments so far               all
    lory       all E merged, H, by the segment before                all
    demix      the domain's one of E, H                              all
    =========  ====================================================  =================  ================================

    Capacities hold in training only. A segment is a quarter of the context. Where the papers' shared parts differ
    (norm, positions, activation), all presets have those of ``size``.

    Args:
        preset: a key of ``PRESETS``.
        size: None for ``ModelSize()``; H has to be divisible by what divides it in the table.
        num_experts: E.
        every: MoE in every n-th block, the last of each n; None for the preset's own.
        last: MoE in the last n blocks, in place of ``every``.
    Raises:
        ValueError: on an unknown name, sizes that do not divide, too few experts, or both or impossible places.
    Source:
        Fedus et al. 2021 (Switch), Lepikhin et al. 2020 (GShard), Du et al. 2021 (GLaM), Jiang et al. 2024 (Mixtral),
        Dai et al. 2024 and DeepSeek-AI 2024 (DeepSeekMoE, V3), Zhang et al. 2022 (MoA), Muqeeth et al. 2023 (SMEAR),
        Zhong et al. 2024 (Lory), Gururangan et al. 2021 (DEMix).
    """
    if preset not in PRESETS:
        known = ", ".join(get_args(PresetName))
        raise ValueError(f"unknown preset '{preset}'{did_you_mean(preset, PRESETS)} (known: {known})")
    size = ModelSize() if size is None else size
    kind = PRESETS[preset]
    if kind.make_router is None:
        if every is not None or last is not None:
            raise ValueError(f"'{preset}' has no blocks with experts to place")
        return MoELanguageModel(size)
    places = block_numbers(size.num_blocks, kind.every if every is None and last is None else every, last)
    make_router, D = kind.make_router, size.features
    if kind.heads:
        if D % 4:
            raise ValueError(f"heads of half the features, and even, need features divisible by 4, got {D}")
        return MoELanguageModel(
            size,
            moe_blocks=places,
            make_attention=lambda: HeadMixture(
                ExpertPool(AttentionExpert(D, D // 2), num_experts), make_router(D, size.context), causal=True
            ),
            balance=kind.balance,
        )
    if size.hidden_features % kind.share:
        raise ValueError(f"'{preset}' divides hidden_features by {kind.share}, got {size.hidden_features}")
    hidden = size.hidden_features // kind.share

    def make_layer() -> nn.Module:
        return MoELayer(
            ExpertPool(SwiGLUExpert(D, hidden), num_experts * kind.multiple),
            make_router(D, size.context),
            shared_expert=SharedSwiGLU(D, hidden) if kind.shared else None,
        )

    return MoELanguageModel(size, make_layer, places, balance=kind.balance)


def block_numbers(num_blocks: int, every: int | None = None, last: int | None = None) -> list[int]:
    """The blocks with experts, counted from 0: the last of every n, or the last n.

    Raises:
        ValueError: unless exactly one is given, and lies in [1, num_blocks].
    """
    if (every is None) == (last is None):
        raise ValueError(f"either every or last is needed, got every={every} and last={last}")
    n = every if last is None else last
    if n is None or not 1 <= n <= num_blocks:
        raise ValueError(f"every and last lie in [1, {num_blocks}], got {n}")
    return list(range(num_blocks - n, num_blocks)) if last is not None else list(range(n - 1, num_blocks, n))
