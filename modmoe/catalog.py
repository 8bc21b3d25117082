"""Every router and expert kind by name, what each declares, and which of them go together."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from modmoe.attention import MoAttention, why_not_causal
from modmoe.errors import did_you_mean
from modmoe.experts import AttentionExpert, ConvExpert, Expert, LoRAExpert, MLPExpert, SwiGLUExpert
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
    FittedRouter,
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
from modmoe.layer import MoELayer

ROUTERS: dict[str, type[Router]] = {
    "dense": DenseRouter,
    "top_k": TopKRouter,
    "noisy_top_k": NoisyTopKRouter,
    "v_moe": VMoERouter,
    "switch": SwitchRouter,
    "gshard": GShardRouter,
    "deepseek_v2": DeepSeekV2Router,
    "deepseek_v3": DeepSeekV3Router,
    "cosine": CosineRouter,
    "attention": AttentionRouter,
    "relu": ReLURouter,
    "expert_choice": ExpertChoiceRouter,
    "base": BaseAssignmentRouter,
    "hash": HashRouter,
    "grouped_random": GroupedRandomRouter,
    "domain": DomainRouter,
    "soft": SoftRouter,
    "smear": SmearRouter,
    "lory": LoryRouter,
    "gaussian": GaussianRouter,
    "prototype": PrototypeRouter,
    "ppca": PPCARouter,
    "autoencoder": AutoencoderRouter,
    "stick": StickRouter,
    "learned": LearnedRouter,
}

NUM_EXPERTS = 8  # of the pool that the table of gates speaks of
FEATURES = 16


def make_router(name: str, in_features: int, **options: Any) -> Router:
    """Build a router by name, as a config file gives it.

    Args:
        name: a key of ``ROUTERS``.
        in_features: D.
        options: the other arguments of the router's class.
    Raises:
        ValueError: on an unknown name, an unknown or missing option, or as the class raises.
    """
    if name not in ROUTERS:
        raise ValueError(f"unknown router '{name}'{did_you_mean(name, ROUTERS)} (known: {', '.join(ROUTERS)})")
    kind = ROUTERS[name]
    try:
        inspect.signature(kind).bind(in_features, **options)
    except TypeError as error:
        raise ValueError(f"router '{name}': {error}; it takes {inspect.signature(kind)}") from error
    return kind(in_features, **options)


def example_routers(in_features: int = FEATURES, num_classes: int = 8) -> dict[str, Router]:
    """One router of every kind, and of the variants that declare something else: name and options -> router.

    Args:
        in_features: D, at least 6.
        num_classes: labels that the gates that need their number can be fitted to.
    """
    variants: dict[str, list[dict[str, Any]]] = {
        "top_k": [{}, {"top_k": 1}, {"top_k": 1, "renormalize": True}],
        "noisy_top_k": [{}, {"top_k": 1}],
        "v_moe": [{"eval_capacity_factor": 1.0}, {"top_k": 1, "eval_capacity_factor": 1.0}],
        "deepseek_v2": [{"top_k": 2, "num_groups": 2}],
        "deepseek_v3": [{"top_k": 2}, {"top_k": 2, "num_groups": 2, "routed_scaling": 2.5}],
        "grouped_random": [{"num_groups": 2, "vocab_size": 1000}],
        "soft": [{"slots": 2}],
        "lory": [{"segment_length": 2}],
        "ppca": [{"components": 2, "rank": 2}],
        "autoencoder": [{"hidden_features": 3, "epochs": 2}],
        "stick": [{"num_classes": num_classes, "ridge": 1.0}],
        "learned": [{"density": GaussianRouter(in_features), "hidden_features": 8, "max_epochs": 10}],
    }
    return {
        _label(name, options): make_router(name, in_features, **options)
        for name in ROUTERS
        for options in variants.get(name, [{}])
    }


def _label(name: str, options: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in options.items() if isinstance(value, bool | float | int)}
    return name + (f"({', '.join(f'{key}={value}' for key, value in shown.items())})" if shown else "")


def example_experts(in_features: int = FEATURES) -> dict[str, Expert]:
    """One small expert of every kind, with as many output as input features: name -> expert."""
    return {
        "mlp": MLPExpert(in_features, 4),
        "swiglu": SwiGLUExpert(in_features, 4),
        "conv": ConvExpert((1, 2, in_features // 2), [2], in_features),
        "lora": LoRAExpert(in_features, in_features, rank=2),
        "attention": AttentionExpert(in_features, 4),
    }


def layer_class(expert: Expert) -> type[MoELayer]:
    """The kind of layer that computes this kind of expert."""
    return MoAttention if expert.needs_sequence else MoELayer


def why_not(router: Router, expert: Expert) -> str | None:
    """Why the two make no layer; None if they do."""
    try:
        layer_class(expert).check_pair(router, expert)
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class GateProperties:
    """What a router declares.

    Args:
        gate: its name, with the options that it was built with.
        decides: "choices", "triples", "slots" or "merges"; see Router.form.
        per: "token", "sequence" or "batch": what it decides on at once.
        causal: whether a token's routing never depends on later ones.
        stochastic: whether it draws random numbers in training.
        weights: what a token's weights add up to.
        active: experts that compute a token, of 8.
        ids: what ids it needs, or None.
        learns_from: "gradient", "data" (fitted), or "nothing".
        shared: its parts that all experts share.
        growth: how an added expert keeps the layer's function: "split", "tie", "zero" or None.
    """

    gate: str
    decides: str
    per: str
    causal: bool
    stochastic: bool
    weights: str
    active: int
    ids: str | None
    learns_from: str
    shared: tuple[str, ...]
    growth: str | None


def gate_properties(name: str, router: Router) -> GateProperties:
    """Read what a router declares."""
    trained = any(spec.trainable for spec in router.row_specs().values())
    return GateProperties(
        gate=name,
        decides=router.form,
        per=router.scope,
        causal=router.causal,
        stochastic=router.stochastic,
        weights=router.weight_sum,
        active=router.num_active(NUM_EXPERTS),
        ids=router.needs_ids,
        learns_from="data" if isinstance(router, FittedRouter) else "gradient" if trained else "nothing",
        shared=router.shared_parts,
        growth=router.preserving_growth,
    )


def gate_tables() -> dict[str, list[dict[str, Any]]]:
    """The two tables of ``modmoe gates``: ``gates``, and ``pairs``: None, or why the two do not go together."""
    routers, experts = example_routers(), example_experts()
    pairs = []
    for name, router in routers.items():
        row = {kind: why_not(router, expert) for kind, expert in experts.items()}
        row["causal_attention"] = row["attention"] or why_not_causal(router)
        pairs.append({"gate": name, **row})
    return {"gates": [asdict(gate_properties(name, router)) for name, router in routers.items()], "pairs": pairs}


def format_gate_tables() -> str:
    """The two tables as text."""
    tables, routers = gate_tables(), example_routers()
    gates = [{key: _cell(value) for key, value in row.items()} for row in tables["gates"]]
    reasons: dict[str, str] = {}  # text -> its mark
    pairs = []
    for row in tables["pairs"]:
        cells = {"gate": row["gate"]}
        for kind in list(row)[1:]:
            reason = row[kind]
            # what is said of one router is said of every one that decides on the same
            text = None if reason is None else reason.replace(type(routers[row["gate"]]).__name__, "the gate")
            cells[kind] = "yes" if text is None else f"no ({reasons.setdefault(text, str(len(reasons) + 1))})"
        pairs.append(cells)
    notes = [f"({mark}) {text}" for text, mark in reasons.items()]
    return "\n".join(
        [
            f"What each gate declares (of a pool of {NUM_EXPERTS} experts):\n",
            *_aligned(gates),
            "\nGates and kinds of experts that go together (the others raise when the layer is built):\n",
            *_aligned(pairs),
            "",
            *notes,
        ]
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, tuple) else "-" if value is None else str(value)


def _aligned(rows: list[dict[str, str]]) -> list[str]:
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return [lines[0].replace("_", " "), "-" * max(map(len, lines)), *lines[1:]]
