"""Sparse upcycling: a trained model's feed-forward blocks become pools of copies of themselves."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from modmoe.conversion.feed_forward import FFN, FeedForward, TransformerLayer, read_feed_forward
from modmoe.gating import Router, TopKRouter
from modmoe.layer import MoELayer
from modmoe.pool import ExpertPool

Select = str | Callable[[str, nn.Module], bool]
MakeRouter = Callable[[int], Router]


@torch.no_grad()
def upcycle(
    model: nn.Module,
    select: Select,
    num_experts: int,
    top_k: int = 2,
    make_router: MakeRouter | None = None,
    noise: float = 0.0,
    omit_inner_dropout: bool = False,
) -> list[tuple[str, MoELayer]]:
    """Replace feed-forward blocks in place by layers whose experts are copies of them, under a fresh router.

    With weights that add up to 1 and nothing dropped, as by default, the model computes what it did. A block is
    recognised by what it computes, see :func:`read_feed_forward`, its activation included. Dropout after its last
    linear layer stays, as ``nn.Sequential(layer, dropout)``. The experts are trainable, even if the block was frozen.
    Padding is routed like any token: nobody hands the layer a mask.

    In an ``nn.TransformerEncoderLayer`` or ``DecoderLayer``, selected as a whole, ``linear1`` becomes the MoELayer,
    and ``activation``, ``dropout`` and ``linear2`` become identities. Its fused inference path, which computes a dense
    block, is switched off, and so are the nested tensors of an ``nn.TransformerEncoder`` around it.

    Args:
        model: changed in place. A module that stands in several places is replaced in all of them by one layer.
        select: a regular expression that a module's whole qualified name has to match, for instance
            ``r"encoder\\.layers\\..*\\.mlp"``, or (name, module) -> bool.
        num_experts: E.
        top_k: k of a TopKRouter whose weights add up to 1, where make_router is None.
        make_router: D -> a new router for each layer; it takes the place of ``top_k``.
        noise: each copy's weights (not biases) get normal noise of this times the standard deviation of the tensor's
            elements, so that copies differ before the router tells them apart.
        omit_inner_dropout: take blocks with dropout before their last linear layer, and train without it: experts
            have none.
    Returns:
        (name, layer) for each, so that ``model.get_submodule(name)`` is the layer.
    Raises:
        ValueError: if nothing or a module inside another one is selected, on a module that is no such block, inner
            dropout, a negative noise, and as ExpertPool and MoELayer do; nothing is changed then.
    Source:
        Komatsuzaki et al. 2022 (sparse upcycling): all else is copied, the router is drawn with a standard deviation
        of 0.02. They renormalise combine weights for vision only, and drop beyond a capacity.
    """
    if noise < 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    make = make_router or (lambda features: TopKRouter(features, top_k, renormalize=True))
    built = []
    for name, module in find_blocks(model, select).items():
        block = read_feed_forward(name, module, omit_inner_dropout)
        rows = {}
        for row, value in block.rows.items():
            rows[row] = value.expand(num_experts, *value.shape)
            if noise and row.startswith("w_"):
                rows[row] = rows[row] + noise * value.float().std() * torch.randn_like(rows[row])
        built.append((name, module, block, layer_of(block.expert, rows, make)))
    return [(replace_block(model, name, module, block, layer), layer) for name, module, block, layer in built]


def find_blocks(model: nn.Module, select: Select) -> dict[str, nn.Module]:
    """The selected modules, each once, by its (first) name.

    Raises:
        ValueError: if there are none, if one stands inside another, or if it is the model itself and no transformer
            layer: it has no place in which it could be replaced.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(select, str):
        pattern = re.compile(select)
        names = [name for name in modules if pattern.fullmatch(name)]
    else:
        names = [name for name, module in modules.items() if select(name, module)]
    if not names:
        what = f"'{select}' matches none" if isinstance(select, str) else "nothing is selected"
        raise ValueError(f"{what} of the modules {[name for name in modules if name][:20]} ...")
    found = {id(modules[name]): name for name in reversed(names)}  # the first name of each wins
    blocks = {name: modules[name] for name in names if found[id(modules[name])] == name}
    for outer, outer_module in blocks.items():
        parts = {id(part) for part in outer_module.modules() if part is not outer_module}
        inner = [name for name, module in blocks.items() if id(module) in parts]
        if inner:
            raise ValueError(f"'{inner[0]}' stands inside '{outer}', and both are selected: select one of them")
    if any(module is model and not isinstance(module, TransformerLayer) for module in blocks.values()):
        raise ValueError("the model itself is selected, which nothing holds that it could be replaced in: wrap it")
    return blocks


@torch.no_grad()
def layer_of(expert: FFN, rows: Mapping[str, Tensor], make_router: MakeRouter) -> MoELayer:
    """A layer of given experts and a new router, on their device with their dtype.

    Args:
        expert: the kind.
        rows: name -> (E, ...); copied.
        make_router: D -> router.
    """
    like = next(iter(rows.values()))
    pool = ExpertPool(expert, len(like)).to(device=like.device, dtype=like.dtype)
    for name, values in rows.items():
        ((bank, _, _),) = pool.growable("expert", name).banks()
        bank.copy_(values)
    return MoELayer(pool, make_router(expert.in_features).to(device=like.device, dtype=like.dtype))


def replace_block(model: nn.Module, name: str, module: nn.Module, block: FeedForward, layer: MoELayer) -> str:
    """Put a layer in the place, or all places, of a block; returns the layer's name."""
    if isinstance(module, TransformerLayer):
        for part in ("activation", "dropout", "linear2"):
            setattr(module, part, nn.Identity().train(module.training))
        setattr(module, "linear1", layer.train(module.training))  # noqa: B010 - its type there is nn.Linear
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # what its fused path asks for
        for encoder in model.modules():
            if isinstance(encoder, nn.TransformerEncoder) and any(part is module for part in encoder.layers):
                encoder.use_nested_tensor = False
        return f"{name}.linear1" if name else "linear1"
    new = nn.Sequential(layer, *block.dropouts) if block.dropouts else layer
    substitute(model, module, new.train(module.training))
    return f"{name}.0" if block.dropouts else name


def substitute(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put one module in all places of another."""
    for parent in list(model.modules()):
        for child, part in list(parent._modules.items()):
            if part is old:
                setattr(parent, child, new)
