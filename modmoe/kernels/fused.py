"""The fused backend: dispatch, both products, activation and combine in one autograd.Function, on banks in place."""

import inspect
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from modmoe.experts.base import Expert, TwoLayers
from modmoe.kernels.plan import Class, Plan, dispatch
from modmoe.kernels.runs import Run, bias_gradient, outer_product, product
from modmoe.pool import Group
from modmoe.routing import Routing


@dataclass
class Call:
    """What is known of one call without a gradient.

    Args:
        layers: the experts' function.
        names: their row names, in the order in which each bank's tensors are passed.
        classes: the banks by size, live or frozen.
        has_drops: False where it is known that nothing was dropped.
        plan: how the assignments are sorted; the forward pass fills it in.
    """

    layers: TwoLayers
    names: tuple[str, ...]
    classes: tuple[Class, ...]
    has_drops: bool
    plan: Plan | None = None

    def of_class(self, flat: Sequence, banks: Class) -> dict[str, list]:
        """Row name -> what ``flat``, one entry for each tensor, holds for the banks of a class."""
        step = len(self.names)
        first, last = banks.first * step, (banks.first + len(banks.positions)) * step
        return {name: list(flat[first + i : last : step]) for i, name in enumerate(self.names)}


def run_fused(banks: Sequence[Group], expert: Expert, x: Tensor, routing: Routing) -> Tensor:
    """The layer's output: the weighted sum over each token's assignments.

    The banks' tensors are read where they are, however many cohorts there are; frozen ones cost no gradient. No
    expert's output is kept for the gradient of its weight: with the map's value a and the incoming gradient g it is
    <g, a W_out + b_out> = <g W_out^T, a> + <g, b_out>, and g W_out^T is needed anyway. Second derivatives are taken
    through the same formulas in differentiable operations. It waits for the loads, so it is for the CPU.

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
        return (bank.frozen, *(tensor.shape[1:] for tensor in bank.tensors.values()))

    ordered = sorted(banks, key=kind) if len(banks) > 1 else banks
    classes, first = [], 0
    for (_, *shapes), members in groupby(ordered, key=kind):
        positions = tuple(bank.positions for bank in members)
        classes.append(Class(first, positions, max(shapes, key=math.prod)))
        first += len(positions)
    call = Call(layers, tuple(banks[0].tensors), tuple(classes), routing.has_drops)
    tensors = [bank.tensors[name] for bank in ordered for name in call.names]
    weight = routing.weight.to(x.dtype)
    return FusedExperts.apply(call, x, weight, routing.token_index, routing.expert_index, *tensors)[0]


class FusedExperts(torch.autograd.Function):
    """See :func:`run_fused`. Returns the output and, for the backward pass, the inner values."""

    @staticmethod
    def forward(
        call: Call, x: Tensor, weight: Tensor, token_index: Tensor, expert_index: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        with _without_autocast(x):
            plan = call.plan = dispatch(call.classes, token_index, expert_index, call.has_drops)
            tokens = x.index_select(0, plan.token)
            outputs, values = [], []
            for banks, run in zip(call.classes, plan.runs, strict=True):
                rows = call.of_class(tensors, banks)
                inner, hidden = inner_values(call.layers, run.part(tokens), rows, run)
                w_out, b_out = call.layers.outer
                outputs.append(run.flat(product(hidden, rows[w_out], run, rows[b_out] if b_out else None)))
                values += [*inner, hidden]
            weighted = _joined(outputs).mul_(plan.scale(weight))
            out = weighted.new_zeros(len(x), weighted.shape[1]).index_add_(0, plan.token, weighted)
        return out, *values

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # apart from forward, as torch.func needs it
        call, x, weight, _, _, *tensors = inputs
        _, *values = output
        ctx.mark_non_differentiable(*values)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.num_tensors = call, len(tensors)
        ctx.save_for_backward(x, weight, *tensors, *values)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        call, grad = ctx.call, grads[0]
        if grad is None:
            return (None,) * (5 + ctx.num_tensors)
        x, weight, *saved = ctx.saved_tensors
        tensors, values = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        _, needs_x, needs_weight, _, _, *needs = ctx.needs_input_grad
        plan = call.plan
        step = len(call.layers.inner) + 1
        tokens, incoming = x.index_select(0, plan.token), grad.index_select(0, plan.token)
        scale = plan.scale(weight)
        grad_tokens, grad_weights = [], []
        grad_tensors: list[Tensor | None] = []
        for banks, run in zip(call.classes, plan.runs, strict=True):
            own, grad_own, scale_own = run.part(tokens), run.part(incoming), run.part(scale)
            rows = call.of_class(tensors, banks)
            (*inner, hidden), values = values[:step], values[step:]
            if torch.is_grad_enabled():  # second derivatives: what was saved has no graph
                inner, hidden = inner_values(call.layers, own, rows, run)
            task = ClassBackward(call.layers, run, rows, call.of_class(needs, banks), needs_x, needs_weight)
            grad_x, grad_w, grad_rows = task(own, inner, hidden, grad_own, scale_own)
            grad_tokens.append(run.flat(grad_x))
            grad_weights.append(run.flat(grad_w))
            none = [None] * len(banks.positions)
            of_banks = zip(*(grad_rows.get(name, none) for name in call.names), strict=True)
            grad_tensors += [gradient for bank in of_banks for gradient in bank]
        dx = torch.zeros_like(x).index_add(0, plan.token, _joined(grad_tokens)) if needs_x else None
        dw = plan.weight_gradient(_joined(grad_weights), weight) if needs_weight else None
        return None, dx, dw, None, None, *grad_tensors


# apply() binds its arguments to this, and would work the signature out anew in each call
FusedExperts.forward.__signature__ = inspect.signature(FusedExperts.forward)  # pyright: ignore[reportFunctionMemberAccess]


class ClassBackward(NamedTuple):
    """The gradients of one class of banks.

    Args:
        layers: the experts' function.
        run: the class's rows, m of them.
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
            tokens: (m, D); this and all others may be (n, C, ...), see Run.
            inner: the inner products, each (m, H).
            hidden: (m, H), the map's value.
            incoming: (m, D_out), the gradient of each row's weighted output.
            scale: (m, 1), the combine weights.
        Returns:
            the gradients of tokens (m, D) and weights (m,), anything where not needed; those of rows by name and bank.
        """
        grads: dict[str, list[Tensor | None]] = {}
        w_out, b_out = self.layers.outer
        grad_x, grad_w = tokens, scale.squeeze(-1)
        needs_inner = self.needs_x or any(self._wants(*names) for names in self.layers.inner)
        back = incoming
        if needs_inner or self.needs_weight:
            back = product(incoming, self.rows[w_out], self.run, transposed=True)
        if self.needs_weight:
            grad_w = (back * hidden).sum(-1)
            if b_out:
                grad_w = grad_w + (incoming * self.run.rows(self.rows[b_out])).sum(-1)
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
            grads[weight] = outer_product(x, grad, self.run, self.rows[weight], self.wanted[weight])
        if bias is not None and any(self.wanted[bias]):
            grads[bias] = bias_gradient(grad, self.run, self.wanted[bias])


def inner_values(
    layers: TwoLayers, tokens: Tensor, rows: dict[str, list[Tensor]], run: Run
) -> tuple[list[Tensor], Tensor]:
    """The inner products of a class's tokens, each (m, H) or (n, C, H), and the map's value."""
    inner = [product(tokens, rows[weight], run, rows[bias] if bias else None) for weight, bias in layers.inner]
    return inner, layers.activate(*inner)


def _without_autocast(x: Tensor):
    """The caller has cast what is to be cast."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _scaled(own: Tensor, scale: Tensor) -> Tensor:
    """own * scale; in place where no graph needs own, as fresh memory costs more than the product."""
    return own * scale if torch.is_grad_enabled() else own.mul_(scale)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]
