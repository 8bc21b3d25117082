"""Which blocks of a backbone hold experts, and the parts of a model that hold none."""

import re
from collections.abc import Sequence

from torch import nn

from modmoe.layer import MoELayer
from modmoe.pool import ExpertPool

Blocks = str | Sequence[int]


def select_blocks(blocks: Blocks, depth: int) -> tuple[int, ...]:
    """The positions that a pattern names, in ascending order, counted from 0.

    ``"all"`` is every block; ``"every-n"`` is n - 1, 2 n - 1, ...; ``"last-n"`` are the last n odd positions: of 12
    blocks, ``"last-2"`` is (9, 11) and ``"every-2"`` is (1, 3, 5, 7, 9, 11).

    Args:
        blocks: a pattern, or the positions themselves.
        depth: number of blocks, at least 1.
    Raises:
        ValueError: on an unknown pattern, one that names no block or more than there are, or positions that are out
            of range or named twice.
    Source:
        Riquelme et al. 2021 (V-MoE), Every-2 and Last-n.
    """
    if not isinstance(blocks, str):
        chosen = tuple(sorted(blocks))
        if not chosen or len(set(chosen)) != len(chosen) or chosen[0] < 0 or chosen[-1] >= depth:
            raise ValueError(f"blocks are different positions in [0, {depth}), at least one, got {list(blocks)}")
        return chosen
    if blocks == "all":
        return tuple(range(depth))
    pattern = re.fullmatch(r"(last|every)-(\d+)", blocks)
    if pattern is None:
        raise ValueError(
            f"unknown block pattern '{blocks}': 'all', 'last-n' or 'every-n' with a number n, or a list of positions"
        )
    n = int(pattern[2])
    chosen = tuple(range(n - 1, depth, n)) if pattern[1] == "every" and n else tuple(range(1, depth, 2))[-n:]
    if not chosen or n == 0 or (pattern[1] == "last" and len(chosen) < n):
        raise ValueError(f"'{blocks}' does not fit a model of {depth} blocks, of which {depth // 2} are odd")
    return chosen


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Every MoELayer of a model by its qualified name, in order; ``layer.routing`` is what it decided last."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


def dense_parts(model: nn.Module, without: Sequence[str] = ("head",)) -> list[str]:
    """The names of the largest submodules that contain no pool and have parameters: what all experts share.

    For a stream: ``ExpertPoolPlugin(freeze_after_first=dense_parts(model))`` leaves only experts and head to later
    tasks.

    Args:
        model: any module; a parameter that it, or a module with a pool in it, holds directly has no such name.
        without: last parts of names that are left out.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        pooled = any(isinstance(part, ExpertPool) for part in module.modules())
        owned = any(isinstance(model.get_submodule(outer), ExpertPool) for outer in _ancestors(name))
        if name and not (inside or pooled or owned) and any(True for _ in module.parameters()):
            found.append(name)
    return [name for name in found if name.rpartition(".")[2] not in without]


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
