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
from modmoe.routing import Routing
from modmoe.rows import Group

# Below this many multiplications in a product, autograd's own backward pass is faster than one written in Python.
PLAIN_WORK = 1 << 24


@dataclass(frozen=True)
class Call:
    """What is known of one call without a gradient.

    Args:
        layers: the experts' function.
        names: their row names, in the order in which each bank's tensors are passed.
        classes: the banks by size, live or frozen.
        plan: how the assignments are sorted.
    """

    layers: TwoLayers
    names: tuple[str, ...]
    classes: tuple[Class, ...]
    plan: Plan

    def of_class(self, flat: Sequence, banks: Class) -> dict[str, list]:
        """Row name -> what ``flat``, one entry for each tensor, holds for the banks of a class."""
        step = len(self.names)
        first, last = banks.first * step, (banks.first + len(banks.positions)) * step
        return {name: list(flat[first + i : last : step]) for i, name in enumerate(self.names)}

    def outputs(self, tokens: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What the experts say to their rows' tokens (M, D): (M, D_out), and class by class the inner values."""
        parts, values = [], []
        w_out, b_out = self.layers.outer
        for banks, run in zip(self.classes, self.plan.runs, strict=True):
            rows = self.of_class(tensors, banks)
            own = run.part(tokens)
            inner = [product(own, rows[w], run, rows[b] if b else None) for w, b in self.layers.inner]
            hidden = self.layers.activate(*inner)
            parts.append(run.flat(product(hidden, rows[w_out], run, rows[b_out] if b_out else None)))
            values += [*inner, hidden]
        return _joined(parts), values

    def is_small(self, num_rows: int) -> bool:
        """Whether to leave the backward pass to autograd: little work, all of it in batched products."""
        work = num_rows * max(math.prod(banks.matrix) for banks in self.classes)
        batched = all(run.capacity or len(run.counts) == 1 for run in self.plan.runs)
        return batched and work <= PLAIN_WORK


def run_fused(banks: Sequence[Group], expert: Expert, x: Tensor, routing: Routing) -> Tensor:
    """The layer's output: the weighted sum over each token's assignments.

    The banks' tensors are read where they are, however many cohorts there are; frozen ones cost no gradient. Second
    derivatives are taken through the same formulas in differentiable operations. It waits for the loads, so it is for
    the CPU.

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
    plan = dispatch(classes, routing.token_index, routing.expert_index, routing.has_drops)
    call = Call(layers, tuple(banks[0].tensors), tuple(classes), plan)
    tensors = [bank.tensors[name] for bank in ordered for name in call.names]
    weight = routing.weight.to(x.dtype)
    if not call.is_small(len(plan.token)):
        return FusedExperts.apply(call, x, weight, *tensors)[0]
    with _without_autocast(x):
        outputs, _ = call.outputs(x.index_select(0, plan.token), tensors)
        return plan.combine(outputs * plan.scale(weight), len(x))


class FusedExperts(torch.autograd.Function):
    """See :func:`run_fused`. Returns the layer's output, and for the backward pass the experts' and inner values."""

    @staticmethod
    def forward(call: Call, x: Tensor, weight: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        with _without_autocast(x):
            outputs, values = call.outputs(x.index_select(0, call.plan.token), tensors)
            scale = call.plan.scale(weight)
            if not weight.requires_grad:  # nobody asks for the outputs again
                return call.plan.combine(outputs.mul_(scale), len(x)), outputs.new_empty(0), *values
            return call.plan.combine(outputs * scale, len(x)), outputs, *values

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # apart from forward, as torch.func needs it
        call, x, weight, *tensors = inputs
        _, *values = output
        ctx.mark_non_differentiable(*values)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.num_tensors = call, len(tensors)
        ctx.save_for_backward(x, weight, *tensors, *values)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        call, grad = ctx.call, grads[0]
        if grad is None:
            return (None,) * (3 + ctx.num_tensors)
        x, weight, *saved = ctx.saved_tensors
        tensors, (outputs, *values) = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        _, needs_x, needs_weight, *needs = ctx.needs_input_grad
        plan, step = call.plan, len(call.layers.inner) + 1
        tokens, incoming = x.index_select(0, plan.token), grad.index_select(0, plan.token)
        if torch.is_grad_enabled():  # second derivatives: what was saved has no graph
            outputs, values = call.outputs(tokens, tensors)
        dw = plan.weight_gradient((incoming * outputs).sum(1), weight) if needs_weight else None
        incoming = _scaled(incoming, plan.scale(weight))
        grad_tokens = []
        grad_tensors: list[Tensor | None] = []
        for banks, run in zip(call.classes, plan.runs, strict=True):
            (*inner, hidden), values = values[:step], values[step:]
            task = ClassBackward(call.layers, run, call.of_class(tensors, banks), call.of_class(needs, banks), needs_x)
            grad_x, grad_rows = task(run.part(tokens), inner, hidden, run.part(incoming))
            grad_tokens.append(run.flat(grad_x))
            none = [None] * len(banks.positions)
            of_banks = zip(*(grad_rows.get(name, none) for name in call.names), strict=True)
            grad_tensors += [gradient for bank in of_banks for gradient in bank]
        dx = plan.combine(_joined(grad_tokens), len(x)) if needs_x else None
        return None, dx, dw, *grad_tensors


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
    """

    layers: TwoLayers
    run: Run
    rows: dict[str, list[Tensor]]
    wanted: dict[str, list[bool]]
    needs_x: bool

    def __call__(
        self, tokens: Tensor, inner: Sequence[Tensor], hidden: Tensor, incoming: Tensor
    ) -> tuple[Tensor, dict[str, list[Tensor | None]]]:
        """Compute them.

        Args:
            tokens: (m, D); this and all others may be (n, C, ...), see Run.
            inner: the inner products, each (m, H).
            hidden: (m, H), the map's value.
            incoming: (m, D_out), the gradient of each expert's output.
        Returns:
            the gradient of the tokens (m, D), anything where it is not needed; those of rows by name and bank.
        """
        grads: dict[str, list[Tensor | None]] = {}
        self._add(grads, *self.layers.outer, hidden, incoming)
        if not (self.needs_x or any(self._wants(*names) for names in self.layers.inner)):
            return tokens, grads
        back = product(incoming, self.rows[self.layers.outer[0]], self.run, transposed=True)
        parts = []
        for names, grad in zip(self.layers.inner, self.layers.gradient(back, *inner), strict=True):
            self._add(grads, *names, tokens, grad)
            if self.needs_x:
                parts.append(product(grad, self.rows[names[0]], self.run, transposed=True))
        return (sum(parts[1:], parts[0]) if parts else tokens), grads

    def _wants(self, weight: str, bias: str | None) -> bool:
        return any(self.wanted[weight]) or (bias is not None and any(self.wanted[bias]))

    def _add(self, grads: dict, weight: str, bias: str | None, x: Tensor, grad: Tensor) -> None:
        if any(self.wanted[weight]):
            grads[weight] = outer_product(x, grad, self.run, self.rows[weight], self.wanted[weight])
        if bias is not None and any(self.wanted[bias]):
            grads[bias] = bias_gradient(grad, self.run, self.wanted[bias])


def _without_autocast(x: Tensor):
    """The caller has cast what is to be cast."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _scaled(own: Tensor, scale: Tensor) -> Tensor:
    """own * scale; in place where no graph needs own, as fresh memory costs more than the product."""
    return own * scale if torch.is_grad_enabled() else own.mul_(scale)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]
