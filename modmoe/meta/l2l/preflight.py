"""Look at an adaptation before its first step, and say what would go wrong."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from modmoe.growable import GrowableParameter
from modmoe.meta.l2l.adapt import gate_layers
from modmoe.meta.l2l.clone import safe_clone
from modmoe.meta.l2l.errors import AdaptationError
from modmoe.pool import ExpertPool

HARMLESS = ("frozen", "unused", "idle_experts", "tied")  # to the wrappers of this package, not to learn2learn's


@dataclass(frozen=True)
class AdaptationReport:
    """What an adaptation meets; names as of ``named_parameters``, of frozen rows as of ``named_buffers``.

    Args:
        frozen: what does not adapt: parameters without gradient, and frozen rows.
        unused: parameters that the loss does not reach.
        idle_experts: (pool, id) of live experts whose weights' gradient is exactly zero: no router chose them.
        tied: groups of names of one parameter.
        dead_gate: gates whose gradient is exactly zero while the loss depends on them in form, or that the loss does
            not reach although it reaches their experts.
        unreached: the message, where the loss reaches no parameter at all.
        second_order: operations in the loss that have no second derivative.
    """

    frozen: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    idle_experts: tuple[tuple[str, int], ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    dead_gate: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    second_order: tuple[str, ...] = ()


ADVICE = {
    "frozen": "learn2learn needs allow_nograd=True for them; modmoe.meta.l2l's wrappers leave them out by themselves",
    "unused": "learn2learn needs allow_unused=True for them; modmoe.meta.l2l's wrappers leave them as they are",
    "idle_experts": "a step does not change them: adapt='active_experts' neither copies nor differentiates them",
    "tied": "learn2learn's MetaSGD unties them; modmoe.meta.l2l's wrappers keep them tied, with one rate",
    "dead_gate": "a softmax over the one chosen expert is always 1: weigh it by its probability among all experts, as "
    "SwitchRouter and TopKRouter do, or choose two",
    "unreached": "a step would change nothing, without a word: compute the loss with the clone that adapts, and with "
    "gradients on",
    "second_order": "run the forward pass in torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or adapt with "
    "first_order=True",
}


def check_for_adaptation(
    module: nn.Module,
    loss: Tensor | Callable[[nn.Module], Tensor],
    second_order: bool = False,
    allow: Collection[str] = HARMLESS,
) -> AdaptationReport:
    """Name the parameters that a step of adaptation would trip over; the module is left as it is.

    Args:
        module: what will adapt: a module, not its wrapper.
        loss: () float, computed by ``module``; or a function that computes it with the clone that it is given.
        second_order: ask for second derivatives, too.
        allow: kinds of findings that are reported only; the others raise.
    Returns:
        All findings.
    Raises:
        AdaptationError: on a kind that is not allowed; the message names the parameters and what to do.
        ValueError: on an unknown kind.
    """
    known = [field.name for field in fields(AdaptationReport)]
    if set(allow) - set(known):
        raise ValueError(f"unknown kinds {sorted(set(allow) - set(known))}, there are {known}")
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if isinstance(loss, Tensor):
        looked_at, value = module, loss
    else:
        with torch.enable_grad():
            looked_at = safe_clone(module)
            value = loss(looked_at)
    by_name = dict(looked_at.named_parameters())
    gradients = _gradients(value, {name: by_name[name] for name in names})
    reached = {name for name, gradient in gradients.items() if gradient is not None}
    report = AdaptationReport(
        frozen=_frozen(module),
        unused=tuple(name for name in names if name not in reached),
        idle_experts=_idle_experts(looked_at, gradients),
        tied=_tied(module),
        dead_gate=_dead_gates(module, gradients),
        unreached=() if reached else ("the loss reaches no trainable parameter",),
        second_order=without_second_derivative(value) if second_order else (),
    )
    for kind in reversed(known):  # the worst first: all that an unreached module has is unused as well
        found = getattr(report, kind)
        if found and kind not in allow:
            raise AdaptationError(f"{kind.replace('_', ' ')}: {found}; {ADVICE[kind]}")
    return report


def _gradients(loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor | None]:
    if loss.dim() != 0:
        raise AdaptationError(f"a loss is one number, got shape {tuple(loss.shape)}")
    if not loss.requires_grad or not parameters:
        return dict.fromkeys(parameters)
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def _frozen(module: nn.Module) -> tuple[str, ...]:
    names = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    for path, growable in module.named_modules():
        if isinstance(growable, GrowableParameter):
            names += [f"{path}.{name}" for name in growable._banks if name not in growable._parameters]
    return tuple(names)


def _idle_experts(module: nn.Module, gradients: dict[str, Tensor | None]) -> tuple[tuple[str, int], ...]:
    idle = []
    for path, pool in module.named_modules():
        if not isinstance(pool, ExpertPool):
            continue
        prefix = f"{path}.rows.expert." if path else "rows.expert."
        busy, live = set(), {expert_id for expert_id in pool.ids if not pool.record(expert_id).frozen}
        for name in pool.specs("expert"):
            for bank, rows in pool.growable("expert", name)._banks.items():
                gradient = gradients.get(f"{prefix}{name}.{bank}")
                if gradient is not None:
                    busy |= {row.owner for row, own in zip(rows, gradient, strict=True) if bool(own.any())}
        idle += [(path, expert_id) for expert_id in pool.ids if expert_id in live - busy]
    return tuple(idle)


def _tied(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    places: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    return tuple(tuple(names) for names in places.values() if len(names) > 1)


def _dead_gates(module: nn.Module, gradients: dict[str, Tensor | None]) -> tuple[str, ...]:
    dead = []
    for _, prefix, _ in gate_layers(module):
        gates = {name: gradient for name, gradient in gradients.items() if name.startswith(prefix)}
        weights = f"{prefix.rsplit('.', 2)[0]}.expert."
        served = any(g is not None and bool(g.any()) for n, g in gradients.items() if n.startswith(weights))
        if gates and served and not any(g is not None and bool(g.any()) for g in gates.values()):
            dead += list(gates)
    for name, gradient in gradients.items():  # a gate that is no MoELayer's, known by its module's name
        is_gate = bool({"gate", "router"} & set(name.split(".")[:-1]))
        if is_gate and name not in dead and ".rows." not in name and gradient is not None and not bool(gradient.any()):
            dead.append(name)
    return tuple(dead)


def without_second_derivative(loss: Tensor) -> tuple[str, ...]:
    """The operations in a loss's graph that cannot be differentiated twice: the fused kernels of attention."""
    seen, waiting, found = set(), [loss.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "ScaledDotProduct" in node.name() and node.name() not in found:
            found.append(node.name())
        waiting += [parent for parent, _ in node.next_functions]
    return tuple(found)
