"""Branch-Train-MiX: models trained apart from one seed become one mixture-of-experts model."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modmoe.conversion.feed_forward import FeedForward, read_feed_forward
from modmoe.conversion.upcycle import MakeRouter, Select, find_blocks, layer_of, replace_block
from modmoe.gating import TopKRouter
from modmoe.layer import MoELayer
from modmoe.rows import Task


@torch.no_grad()
def branch_train_mix(
    branches: Sequence[nn.Module],
    select: Select,
    top_k: int = 2,
    make_router: MakeRouter | None = None,
    tasks: Sequence[Task | None] | None = None,
    experts_per_branch: int = 1,
    omit_inner_dropout: bool = False,
) -> tuple[nn.Module, list[tuple[str, MoELayer]]]:
    """Make one model of several: the selected feed-forward blocks become experts, everything else is averaged.

    The routers are new: train the model on. To keep the seed's blocks as experts of their own, pass the seed as one
    more branch; it then counts in the averages, too. From branches that are all equal, the model computes what they
    do.

    Averaged are parameters and buffers of floating point. Integer and bool buffers have to agree, but for single
    numbers (the counters of batch norms): of those the first branch's are taken, as is everything that is no tensor.

    Args:
        branches: models of the same structure, at least one; left as they are.
        select: as in :func:`upcycle`, of the first branch.
        top_k: as in :func:`upcycle`.
        make_router: as in :func:`upcycle`.
        tasks: each branch's task, which its experts belong to; None for none.
        experts_per_branch: copies that each branch contributes, side by side.
        omit_inner_dropout: as in :func:`upcycle`.
    Returns:
        The new model, and (name, layer) for each layer in it; a layer's experts stand in the order of the branches.
    Raises:
        ValueError: on no branch, on branches of different structures, on another number of tasks, and as
            :func:`upcycle` does.
    Source:
        Sukhbaatar et al. 2024 (BTX), section 3.2: the attention is averaged, the router trained with top-2.
    """
    if not branches or experts_per_branch < 1:
        raise ValueError(f"at least one branch and one expert of each are needed, got {len(branches)} branches")
    if tasks is not None and len(tasks) != len(branches):
        raise ValueError(f"{len(tasks)} tasks for {len(branches)} branches")
    for number, branch in enumerate(branches[1:], start=1):
        _check_structure(branches[0], branch, number)
    make = make_router or (lambda features: TopKRouter(features, top_k, renormalize=True))
    model = copy.deepcopy(branches[0])
    places = find_blocks(model, select)
    built = []
    for name, module in places.items():
        blocks = [read_feed_forward(name, branch.get_submodule(name), omit_inner_dropout) for branch in branches]
        _check_blocks(name, blocks)
        layer = layer_of(blocks[0].expert, _stacked(blocks, experts_per_branch), make)
        for position, expert_id in enumerate(layer.pool.ids):
            if tasks is not None:
                layer.pool.assign_task(expert_id, tasks[position // experts_per_branch])
        built.append((name, module, read_feed_forward(name, module, omit_inner_dropout), layer))
    _average(model, branches)
    return model, [(replace_block(model, name, module, block, layer), layer) for name, module, block, layer in built]


def _check_structure(first: nn.Module, other: nn.Module, number: int) -> None:
    """Raise ValueError unless two models have the same modules and tensors, up to the values."""
    for what, left, right in (
        ("modules", *({name: type(m).__name__ for name, m in model.named_modules()} for model in (first, other))),
        ("tensors", _signature(first), _signature(other)),
    ):
        differing = sorted(name for name in {**left, **right} if left.get(name) != right.get(name))
        if differing:
            name = differing[0]
            raise ValueError(
                f"branch {number} differs from the first one in {len(differing)} of its {what}: "
                f"'{name}' is {right.get(name, 'missing')} instead of {left.get(name, 'missing')}"
            )
    theirs = dict(other.named_buffers())
    for name, buffer in first.named_buffers():
        if not _is_averaged(buffer) and buffer.dim() and not torch.equal(buffer.cpu(), theirs[name].cpu()):
            raise ValueError(f"branch {number} differs from the first one in the buffer '{name}', which has no average")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _signature(model: nn.Module) -> dict[str, str]:
    return {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in _tensors(model).items()}


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _check_blocks(name: str, blocks: Sequence[FeedForward]) -> None:
    kinds = {str(vars(block.expert)) for block in blocks}
    if len(kinds) != 1:
        raise ValueError(f"the branches' blocks '{name}' are different kinds of experts: {sorted(kinds)}")


def _stacked(blocks: Sequence[FeedForward], times: int) -> dict[str, Tensor]:
    """name -> (E, ...), on the device of the first branch."""
    like = next(iter(blocks[0].rows.values()))
    return {
        name: torch.stack([block.rows[name].to(like.device) for block in blocks]).repeat_interleave(times, 0)
        for name in blocks[0].rows
    }


def _average(model: nn.Module, branches: Sequence[nn.Module]) -> None:
    """Write the branches' means into a copy of the first one."""
    sources = [_tensors(branch) for branch in branches]
    for name, tensor in _tensors(model).items():
        if _is_averaged(tensor):
            wide = torch.promote_types(tensor.dtype, torch.float64)
            total = sum(
                (source[name].detach().to(tensor.device, wide) for source in sources),
                torch.zeros((), dtype=wide, device=tensor.device),
            )
            tensor.copy_(total / len(branches))
