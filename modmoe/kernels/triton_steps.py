"""The launches of the triton backend: shapes, grids and buffers of one call."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modmoe.experts.base import Expert
from modmoe.experts.mlp import MLPExpert
from modmoe.experts.swiglu import SwiGLUExpert
from modmoe.kernels import triton_launch
from modmoe.kernels.triton_launch import Tiles
from modmoe.kernels.triton_table import Bank, expert_table


@dataclass(frozen=True)
class Call:
    """What is known of a call without looking at a tensor's values."""

    expert: Expert
    names: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    live: tuple[bool, ...]
    num_experts: int
    top_k: int | None
    has_drops: bool
    save: bool
    kernels: Any = field(repr=False)

    @property
    def gated(self) -> bool:
        return isinstance(self.expert, SwiGLUExpert)

    @property
    def activation(self) -> str:
        return self.expert.activation if isinstance(self.expert, MLPExpert) else "silu"

    def banks(self, tensors: Sequence[Tensor]) -> list[Bank]:
        step = len(self.names)
        return [
            Bank(positions, live, dict(zip(self.names, tensors[i * step : (i + 1) * step], strict=True)))
            for i, (positions, live) in enumerate(zip(self.positions, self.live, strict=True))
        ]


class Order(NamedTuple):
    """The assignments sorted by expert, as far as kernels read it.

    Args:
        order: (N,) int64, the assignment at each sorted place.
        token: (N,) int64, its token.
        offsets: (E + 1,) int32, where each expert's run begins; dropped ones stand after the last.
    """

    order: Tensor
    token: Tensor
    offsets: Tensor


def sort_by_expert(token_index: Tensor, expert_index: Tensor, num_experts: int) -> Order:
    """Sort on the device, dropped assignments last. Equal experts keep the routing's order."""
    slot = torch.where(expert_index < 0, num_experts, expert_index).to(torch.int32)
    ordered, order = torch.sort(slot, stable=True)
    ends = torch.arange(num_experts + 1, dtype=torch.int32, device=slot.device)
    return Order(order, token_index.index_select(0, order), torch.searchsorted(ordered, ends, out_int32=True))


class Launches:
    """The kernels' launches for one call: shapes, grids and buffers.

    Args:
        call: what is known of it.
        banks: the experts.
        x: (T, D).
        order: the sorted assignments, N of them.
    """

    def __init__(self, call: Call, banks: Sequence[Bank], x: Tensor, order: Order):
        self.call, self.banks, self.order = call, banks, order
        self.num_rows, self.num_experts = len(order.order), call.num_experts
        self.hidden_max = max(bank.hidden for bank in banks)
        self.like = x
        self.table = expert_table(banks, call.num_experts)
        arch = triton_launch.architecture(x.device)
        self.tiles = triton_launch.choose_tiles(arch, x.element_size())
        self.row_tiles = triton_launch.fewer_rows(self.tiles, self.num_rows, self.num_experts)
        self.hidden_tiles = triton_launch.narrower(self.row_tiles)
        self.bias = "b_in" in call.names
        self.products = {
            "PRECISION": triton_launch.precision(x.dtype),
            "UPCAST": arch == 0 and x.dtype == torch.bfloat16,
            "ALIGNED": arch != 0 and aligned(banks),
        }
        self.by_tile = self.products | {
            "EXPERTS": max(16, 1 << (self.num_experts - 1).bit_length()),
            "GATED": call.gated,
        }

    def hidden(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The hidden layer (N, H), sorted, and the inner products that it is made of, if they are to be kept."""
        hidden = self._sorted()
        inner = [self._sorted() for _ in range(1 + self.call.gated)] if self.call.save else [hidden]
        self._launch(
            "hidden_forward",
            self.hidden_tiles,
            self.hidden_max,
            *(x, self.order.token, self.order.offsets, self.table, inner[0], inner[-1], hidden),
            *(self.num_experts, x.shape[1], self.hidden_max),
            ACTIVATION=self.call.activation,
            BIAS=self.bias,
            SAVE=self.call.save,
        )
        return hidden, inner

    def output(self, hidden: Tensor, weight: Tensor, num_tokens: int) -> Tensor:
        """(T, D_out) from the hidden layer."""
        return self._scatter([hidden], weight, num_tokens, self.call.expert.out_features, backward=False)

    def input_gradient(self, grads: Sequence[Tensor], num_tokens: int) -> Tensor:
        """(T, D) from the gradients of the inner products."""
        return self._scatter(grads, self.order.order, num_tokens, self.call.expert.in_features, backward=True)

    def _scatter(self, a: Sequence[Tensor], weight: Tensor, num_tokens: int, width: int, backward: bool) -> Tensor:
        order, top_k = self.order, self.call.top_k
        atomic = top_k is None and not torch.are_deterministic_algorithms_enabled()
        if atomic:
            out = torch.zeros(num_tokens, width, device=self.like.device)
        else:
            make = torch.zeros if self.call.has_drops else torch.empty
            out = make(self.num_rows, width, dtype=self.like.dtype, device=self.like.device)
        self._launch(
            "scatter_product",
            self.row_tiles,
            width,
            *(a[0], a[-1], order.token if atomic else order.order, order.order, weight, order.offsets, self.table, out),
            *(self.num_experts, width, self.hidden_max),
            BACKWARD=backward,
            BIAS=self.bias and not backward,
            ATOMIC=atomic,
            GATED=len(a) > 1,
        )
        if atomic:
            return out.to(self.like.dtype)
        if top_k == 1:
            return out
        if top_k is not None:
            return out.view(num_tokens, top_k, width).sum(1)
        assignment_token = torch.empty_like(order.token).index_copy_(0, order.order, order.token)
        return out.new_zeros(num_tokens, width).index_add_(0, assignment_token, out)

    def hidden_gradient(
        self, grad: Tensor, weight: Tensor, inner: Sequence[Tensor], x_grad: bool, weight_grad: bool
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """What the output's gradient leads to.

        Returns:
            (N, H) the hidden layer times the combine weights, for live experts; the gradients of the inner products,
            each (N, H), for live experts or (x_grad) for all; (N,) that of the combine weights.
        """
        row_grad = any(self.call.live)
        hidden = self._sorted() if row_grad else inner[0]
        grads = [self._sorted() for _ in inner] if x_grad or row_grad else list(inner)
        blocks = -(-self.hidden_max // self.hidden_tiles.block_n)
        parts = torch.zeros(blocks, self.num_rows, device=grad.device) if weight_grad else grad
        self._launch(
            "hidden_backward",
            self.hidden_tiles,
            self.hidden_max,
            *(grad, self.order.token, self.order.order, weight, self.order.offsets, self.table),
            *(inner[0], inner[-1], hidden, grads[0], grads[-1], parts),
            *(self.num_rows, self.num_experts, grad.shape[1], self.hidden_max),
            ACTIVATION=self.call.activation,
            BIAS=self.bias,
            X_GRAD=x_grad,
            WEIGHT_GRAD=weight_grad,
            ROW_GRAD=row_grad,
        )
        return hidden, grads, parts.sum(0).to(weight.dtype) if weight_grad else None

    def row_gradients(
        self, x: Tensor, grad: Tensor, weight: Tensor, hidden: Tensor, grads: Sequence[Tensor]
    ) -> list[list[Tensor | None]]:
        """For each of ``call.names``, the gradients of each bank; None for a frozen one."""
        found: dict[str, list[Tensor | None]] = {}
        found["w_in"], found["b_in"] = self._row_gradient(x, grads[0], weight, x.shape[1], inner=True)
        if self.call.gated:
            found["w_gate"], found["b_gate"] = self._row_gradient(x, grads[1], weight, x.shape[1], inner=True)
        found["w_out"], found["b_out"] = self._row_gradient(hidden, grad, weight, grad.shape[1], inner=False)
        return [found[name] for name in self.call.names]

    def _row_gradient(
        self, a: Tensor, b: Tensor, weight: Tensor, features: int, inner: bool
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        live = [(len(bank.positions), bank.hidden) for bank in self.banks if bank.live]
        num_live, total = sum(n for n, _ in live), sum(n * hidden for n, hidden in live)
        flat = a.new_empty(total * features)
        flat_bias = a.new_empty(total if inner else num_live * features) if self.bias else flat
        height, width = (features, self.hidden_max) if inner else (self.hidden_max, features)
        grid = (-(-height // self.tiles.block_m) * -(-width // self.tiles.block_n), num_live)
        triton_launch.launch(
            self.call.kernels.weight_gradient,
            grid,
            self.tiles,
            *(a, b, self.order.token, self.order.order, weight, self.order.offsets, self.table, flat, flat_bias),
            *(self.num_experts, features, self.hidden_max),
            INPUT=inner,
            BIAS=self.bias,
            **self.products,
        )
        shapes = [(n, features, hidden) if inner else (n, hidden, features) for n, hidden in live]
        bias_shapes = [(n, hidden) if inner else (n, features) for n, hidden in live]
        return self._split(flat, shapes), self._split(flat_bias, bias_shapes) if self.bias else []

    def _split(self, flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor | None]:
        """Views of one buffer, bank by bank."""
        parts = iter(flat.split([torch.Size(shape).numel() for shape in shapes]))
        views = iter([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
        return [next(views) if bank.live else None for bank in self.banks]

    def _sorted(self) -> Tensor:
        return torch.empty(self.num_rows, self.hidden_max, dtype=self.like.dtype, device=self.like.device)

    def _launch(self, kernel: str, tiles: Tiles, width: int, *arguments: Any, **constants: Any) -> None:
        """A grid of row tiles (each expert may leave one part full) times column blocks."""
        num_tiles = self.num_rows // tiles.block_m + min(self.num_experts, self.num_rows)
        grid = (num_tiles * -(-width // tiles.block_n),)
        function = getattr(self.call.kernels, kernel)
        triton_launch.launch(function, grid, tiles, *arguments, **(self.by_tile | constants))


def aligned(banks: Sequence[Bank]) -> bool:
    """Whether every expert's rows can be read in blocks of 16 bytes, whatever the row."""
    return all(
        tensor.data_ptr() % 16 == 0 and all(size % 16 == 0 for size in tensor.shape[1:])
        for bank in banks
        for tensor in bank.tensors.values()
    )
