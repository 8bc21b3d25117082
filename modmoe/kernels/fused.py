"""The fused backend: dispatch, both products, activation and combine in one autograd.Function, on banks in place."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from modmoe.experts.base import Expert, TwoLayers
from modmoe.kernels.runs import Run, bias_gradient, outer_product, product
from modmoe.pool import Group
from modmoe.routing import Routing


@dataclass(frozen=True)
class Layout:
    """What is known of the experts without looking at a tensor.

    Args:
        layers: their function.
        names: their row names, in the order in which each bank's tensors are passed.
        positions: the positions of each bank's experts; E in all.
        classes: (first, last) bank of each class: banks of equal sizes, all frozen or all live.
    """

    layers: TwoLayers
    names: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    classes: tuple[tuple[int, int], ...]

    def of_class(self, flat: Sequence, first: int, last: int) -> dict[str, list]:
        """Row name -> what ``flat``, one entry for each tensor, holds for the banks from first to last."""
        step = len(self.names)
        return {name: list(flat[first * step + i : last * step : step]) for i, name in enumerate(self.names)}


class Dispatch(NamedTuple):
    """The M assignments that were not dropped, bank by bank and expert by expert.

    Args:
        token: (M,) int64, the token of each.
        source: (M,) int64, its place among the routing's N assignments.
        expert: (M,) int64, its expert's number in the order of the banks.
        counts: (E,) int64, the assignments of each expert in this order.
    """

    token: Tensor
    source: Tensor
    expert: Tensor
    counts: Tensor


def run_fused(banks: Sequence[Group], expert: Expert, x: Tensor, routing: Routing) -> Tensor:
    """The layer's output: the weighted sum over each token's assignments.

    The banks' tensors are read where they are, however many cohorts there are; frozen ones cost no gradient. No
    expert's output is kept for the gradient of its weight: with the map's value a and the incoming gradient g it is
    <g, a W_out + b_out> = <g W_out^T, a> + <g, b_out>, and g W_out^T is needed anyway. Second derivatives are taken
    through the same formulas in differentiable operations.

    Args:
        banks: ``pool.banks()``; each expert stands in exactly one.
        expert: their kind.
        x: (T, D), zero in padding.
        routing: flat triples.
    Returns:
        (T, D_out).
    Raises:
        ValueError: if the kind is no two layers.
    """
    layers = expert.two_layers()
    if layers is None:
        raise ValueError(f"the fused backend computes experts of two layers, and {expert} has others")

    def kind(bank: Group) -> tuple:
        return (bank.frozen, *(tuple(tensor.shape[1:]) for tensor in bank.tensors.values()))

    ordered = sorted(banks, key=kind)
    classes, first = [], 0
    for _, members in groupby(ordered, key=kind):
        last = first + len(list(members))
        classes.append((first, last))
        first = last
    layout = Layout(layers, tuple(banks[0].tensors), tuple(bank.positions for bank in ordered), tuple(classes))
    tensors = [bank.tensors[name] for bank in ordered for name in layout.names]
    weight = routing.weight.to(x.dtype)
    return FusedExperts.apply(layout, x, weight, routing.token_index, routing.expert_index, *tensors)[0]


class FusedExperts(torch.autograd.Function):
    """See :func:`run_fused`. Returns the output and, for the backward pass, the dispatch and the inner values."""

    @staticmethod
    def forward(
        layout: Layout, x: Tensor, weight: Tensor, token_index: Tensor, expert_index: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        with torch.autocast(x.device.type, enabled=False):  # the caller has cast what is to be cast
            plan = dispatch(layout, token_index, expert_index)
            tokens = x.index_select(0, plan.token)
            outputs, values = [], []
            for (first, last), run in zip(layout.classes, split_runs(layout, plan), strict=True):
                rows = layout.of_class(tensors, first, last)
                inner, hidden = inner_values(layout.layers, tokens[run.start : run.stop], rows, run)
                w_out, b_out = layout.layers.outer
                outputs.append(product(hidden, rows[w_out], run, rows[b_out] if b_out else None))
                values += [*inner, hidden]
            weighted = _joined(outputs).mul_(weight.index_select(0, plan.source).unsqueeze(1))
            out = weighted.new_zeros(len(x), weighted.shape[1]).index_add_(0, plan.token, weighted)
        return out, *plan, *values

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # apart from forward, as torch.func needs it
        layout, x, weight, _, _, *tensors = inputs
        _, *values = output
        ctx.mark_non_differentiable(*values)
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.num_tensors = layout, len(tensors)
        ctx.save_for_backward(x, weight, *tensors, *values)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        layout, grad = ctx.layout, grads[0]
        if grad is None:
            return (None,) * (5 + ctx.num_tensors)
        x, weight, *saved = ctx.saved_tensors
        tensors, values = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        _, needs_x, needs_weight, _, _, *needs = ctx.needs_input_grad
        plan, values = Dispatch(*values[:4]), values[4:]
        step = len(layout.layers.inner) + 1
        tokens = x.index_select(0, plan.token)
        incoming = grad.index_select(0, plan.token)
        scale = weight.index_select(0, plan.source).unsqueeze(1)
        grad_tokens, grad_weights = [], []
        grad_tensors: list[Tensor | None] = []
        for (first, last), run in zip(layout.classes, split_runs(layout, plan), strict=True):
            part = slice(run.start, run.stop)
            rows = layout.of_class(tensors, first, last)
            (*inner, hidden), values = values[:step], values[step:]
            if torch.is_grad_enabled():  # second derivatives: what was saved has no graph
                inner, hidden = inner_values(layout.layers, tokens[part], rows, run)
            task = ClassBackward(layout.layers, run, rows, layout.of_class(needs, first, last), needs_x, needs_weight)
            grad_x, grad_w, grad_rows = task(tokens[part], inner, hidden, incoming[part], scale[part])
            grad_tokens.append(grad_x)
            grad_weights.append(grad_w)
            none = [None] * (last - first)
            grad_tensors += [
                g for bank in zip(*(grad_rows.get(n, none) for n in layout.names), strict=True) for g in bank
            ]
        dx = torch.zeros_like(x).index_add(0, plan.token, _joined(grad_tokens)) if needs_x else None
        dw = torch.zeros_like(weight).index_copy(0, plan.source, _joined(grad_weights)) if needs_weight else None
        return None, dx, dw, None, None, *grad_tensors


class ClassBackward(NamedTuple):
    """The gradients of one class of banks.

    Args:
        layers: the experts' function.
        run: the class's assignments, m of them.
        rows: row name -> the banks' tensors.
        wanted: row name -> whether the gradient of each of them is needed.
        needs_x: whether that of the tokens is.
        needs_weight: whether that of the combine weights is.
    """

    layers: TwoLayers
    run: Run
    rows: dict[str, list[Tensor]]
    wanted: dict[str, list[bool]]
    needs_x: bool
    needs_weight: bool

    def __call__(
        self, tokens: Tensor, inner: Sequence[Tensor], hidden: Tensor, incoming: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, list[Tensor | None]]]:
        """Compute them.

        Args:
            tokens: (m, D).
            inner: the inner products, each (m, H).
            hidden: (m, H), the map's value.
            incoming: (m, D_out), the gradient of each assignment's weighted output.
            scale: (m, 1), the combine weights.
        Returns:
            the gradients of tokens (m, D) and weights (m,), anything where not needed; those of rows by name and bank.
        """
        grads: dict[str, list[Tensor | None]] = {}
        w_out, b_out = self.layers.outer
        grad_x, grad_w = tokens, scale.squeeze(1)
        needs_inner = self.needs_x or any(self._wants(*names) for names in self.layers.inner)
        back = incoming
        if needs_inner or self.needs_weight:
            back = product(incoming, self.rows[w_out], self.run, transposed=True)
        if self.needs_weight:
            grad_w = (back * hidden).sum(1)
            if b_out:
                grad_w = grad_w + (incoming * self.run.rows(self.rows[b_out])).sum(1)
        if self._wants(w_out, b_out):
            self._add(grads, w_out, b_out, hidden, _scaled(incoming, scale))
        if needs_inner:
            parts = []
            for names, grad in zip(self.layers.inner, self.layers.gradient(_scaled(back, scale), *inner), strict=True):
                self._add(grads, *names, tokens, grad)
                if self.needs_x:
                    parts.append(product(grad, self.rows[names[0]], self.run, transposed=True))
            grad_x = sum(parts[1:], parts[0]) if parts else grad_x
        return grad_x, grad_w, grads

    def _wants(self, weight: str, bias: str | None) -> bool:
        return any(self.wanted[weight]) or (bias is not None and any(self.wanted[bias]))

    def _add(self, grads: dict, weight: str, bias: str | None, x: Tensor, grad: Tensor) -> None:
        if any(self.wanted[weight]):
            grads[weight] = outer_product(x, grad, self.run, self.wanted[weight])
        if bias is not None and any(self.wanted[bias]):
            grads[bias] = bias_gradient(grad, self.run, self.wanted[bias])


def dispatch(layout: Layout, token_index: Tensor, expert_index: Tensor) -> Dispatch:
    """Sort a routing's assignments by bank and expert, the tokens in order; dropped ones are left out."""
    order = [position for positions in layout.positions for position in positions]
    num_experts = len(order)
    numbers = [num_experts] * (num_experts + 1)  # the last entry answers for -1, dropped
    for number, position in enumerate(order):
        numbers[position] = number
    table = torch.tensor(numbers, device=expert_index.device)
    expert, source = torch.sort(table.index_select(0, expert_index % (num_experts + 1)), stable=True)
    counts = torch.bincount(expert, minlength=num_experts + 1)
    kept = len(expert) - int(counts[-1])
    expert, source = expert[:kept], source[:kept]
    return Dispatch(token_index.index_select(0, source), source, expert, counts[:-1])


def split_runs(layout: Layout, plan: Dispatch) -> list[Run]:
    """Each class's part of the sorted assignments."""
    counts, runs, number, start = plan.counts.tolist(), [], 0, 0
    for first, last in layout.classes:
        sizes = tuple(len(positions) for positions in layout.positions[first:last])
        own = counts[number : number + sum(sizes)]
        stop = start + sum(own)
        runs.append(Run(start, own, sizes, plan.expert[start:stop] - number if number else plan.expert[start:stop]))
        number, start = number + sum(sizes), stop
    return runs


def inner_values(
    layers: TwoLayers, tokens: Tensor, rows: dict[str, list[Tensor]], run: Run
) -> tuple[list[Tensor], Tensor]:
    """The inner products of a class's tokens (m, D), each (m, H), and the map's value (m, H)."""
    inner = [product(tokens, rows[weight], run, rows[bias] if bias else None) for weight, bias in layers.inner]
    return inner, layers.activate(*inner)


def _scaled(own: Tensor, scale: Tensor) -> Tensor:
    """own * scale; in place where no graph needs own, as fresh memory costs more than the product."""
    return own * scale if torch.is_grad_enabled() else own.mul_(scale)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]
