"""learn2learn's algorithms around modules whose pools grow."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from learn2learn import algorithms
from torch import Tensor, nn
from torch.optim import Optimizer

from modmoe.meta.l2l.adapt import Adapt, active_experts, select_parameters
from modmoe.meta.l2l.clone import Cloned, clone_with_places
from modmoe.meta.l2l.errors import AdaptationError, StaleWrapperError
from modmoe.meta.l2l.preflight import ADVICE, without_second_derivative
from modmoe.meta.l2l.rates import Rates, Transforms, growable_parameters, plain_parameters
from modmoe.optim import sync_optimizer


class GrowthAware(nn.Module):
    """What the wrappers share: safe clones of what adapts, steps that cannot go silently wrong, and ``sync``.

    After any change of a pool ``clone`` raises until ``sync`` has been called, with the outer optimizer where there
    is one. Frozen parameters stay as they are; unused ones do too; tied ones stay tied.
    """

    module: nn.Module
    first_order: bool
    adapt_to: Adapt
    evaluation: bool
    _cloned: Cloned | None
    _structure: dict[str, Any]
    _started: bool

    def _wrap(self, adapt: Adapt) -> None:
        self.adapt_to = adapt
        self.evaluation = False
        self._cloned = None
        self._structure = structure_of(self.module)
        select_parameters(self.module, adapt)

    def clone(self, *batch: Any, first_order: bool | None = None, evaluation: bool = False) -> Self:
        """A wrapper around a safe clone, to be adapted to one task.

        Args:
            batch: the arguments of the module's forward on the task's context; needed with
                adapt="active_experts", and only there: the clone has the experts that the routers choose for it.
            first_order: None for the wrapper's own.
            evaluation: no graph leads back to the base, and none from step to step, so that memory does not grow.
        Raises:
            StaleWrapperError: if the module has changed its structure since the last ``sync``.
            AdaptationError: on a missing or needless batch.
        """
        changed = sorted(set(_differences(self._structure, structure_of(self.module))))
        if changed:
            raise StaleWrapperError(
                f"{changed} changed after the module was wrapped: call wrapper.sync(optimizer), which gives new "
                "experts what the wrapper and the optimizer keep for each"
            )
        if bool(batch) != (self.adapt_to == "active_experts"):
            raise AdaptationError(
                f"adapt={self.adapt_to!r}: clone(*batch) takes the task's context with 'active_experts' and only then"
            )
        names = select_parameters(self.module, self.adapt_to)
        experts = active_experts(self.module, *batch) if batch else None
        cloned = clone_with_places(self.module, names, experts, detach=evaluation)
        clone = type(self).__new__(type(self))
        clone.__dict__ = {**self.__dict__, "_modules": {**self._modules, "module": cloned.module}}
        clone.first_order = evaluation or (self.first_order if first_order is None else first_order)
        clone.evaluation, clone._cloned = evaluation, cloned
        clone.adapt_to = lambda name, parameter: name in cloned.tensors
        if self._cloned is not None:  # a clone of a clone has the same experts
            cloned.kept.update(self._cloned.kept)
        clone._structure = structure_of(cloned.module)
        clone._started = False
        return clone

    def adapt(self, loss: Tensor) -> None:
        """One step of gradient descent on a loss that was computed with this clone.

        Args:
            loss: () float.
        Raises:
            AdaptationError: on a wrapper that is no clone; a loss that reaches nothing that adapts; or, before the
                first step of second order, operations that have no second derivative.
        """
        if self._cloned is None:
            raise AdaptationError("adapt a clone (wrapper.clone()): a step on the wrapper itself would lose the base")
        if not loss.requires_grad:
            raise AdaptationError("the loss has no graph: compute it with this clone, and with gradients on")
        if not self._started and not self.first_order:
            found = without_second_derivative(loss)
            if found:
                raise AdaptationError(f"second order: {found} have no second derivative; {ADVICE['second_order']}")
        self._started = True
        self._before_step(loss)
        tensors = self._cloned.tensors
        second_order = not self.first_order
        gradients = torch.autograd.grad(
            loss,
            list(tensors.values()),
            create_graph=second_order,
            retain_graph=second_order or self._keeps_graph(),
            allow_unused=True,
        )
        if all(gradient is None for gradient in gradients):
            raise AdaptationError(f"the loss reaches none of {list(tensors)}; {ADVICE['unreached']}")
        for name, gradient in zip(list(tensors), gradients, strict=True):
            if gradient is not None:
                value = tensors[name] - self._step(name, gradient)
                self._cloned.replace(name, value.detach().requires_grad_() if self.evaluation else value)

    def _before_step(self, loss: Tensor) -> None:
        """What a wrapper does first with the same loss."""

    def _keeps_graph(self) -> bool:
        return False

    def _step(self, name: str, gradient: Tensor) -> Tensor:
        """What is taken off a parameter."""
        raise NotImplementedError

    def _sync(self) -> None:
        """Bring what is kept for each parameter in line with the module."""

    def sync(self, optimizer: Optimizer | None = None) -> None:
        """Take over the module's structure after growth, freezing or removal.

        Args:
            optimizer: of the wrapper's parameters; new ones get their slots and those that are gone leave it.
        """
        if self._cloned is not None:
            raise AdaptationError("a clone is of one task: sync the wrapper and clone again")
        before = {id(parameter) for parameter in self.parameters()}
        self._sync()
        self._structure = structure_of(self.module)
        if optimizer is not None:
            sync_optimizer(optimizer, self)
            _drop(optimizer, before - {id(p) for p in self.parameters() if p.requires_grad})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; the pools are rebuilt first, and what is kept for each of their rows after them."""
        start = "module."
        self.module.load_state_dict(
            {name[len(start) :]: value for name, value in state_dict.items() if name.startswith(start)}, strict, assign
        )
        self.sync()
        return super().load_state_dict(state_dict, strict, assign)


class MAML(GrowthAware, algorithms.MAML):
    """p <- p - lr grad, for the parameters that adapt.

    Args:
        model: any module.
        lr: of a step, > 0.
        first_order: without second derivatives.
        adapt: which parameters, see :func:`select_parameters`.
    Raises:
        AdaptationError: if nothing would adapt.
        ValueError: on lr <= 0.
    Source:
        Finn et al. 2017; learn2learn's MAML.
    """

    def __init__(self, model: nn.Module, lr: float, first_order: bool = False, adapt: Adapt = "all"):
        algorithms.MAML.__init__(self, model, _positive(lr), first_order=first_order)
        self._wrap(adapt)

    def _step(self, name: str, gradient: Tensor) -> Tensor:
        return self.lr * gradient


class FeaturesAndHead(nn.Module):
    """head(features(x)); further arguments go to the head."""

    def __init__(self, features: nn.Module, head: nn.Module):
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.head(self.features(x), *args)


class ANIL(MAML):
    """MAML of a head on features that do not adapt ("almost no inner loop").

    learn2learn has no class for it: its examples wrap the head alone and call the features beside it. Here both are
    one module, ``FeaturesAndHead``, of which the parameters named "head." adapt, so that statistics inside the features
    are a clone's own as well. Features are trained by the outer loop.

    Args:
        features: x -> features.
        head: features -> output; may contain a pool.
        lr: of a step, > 0.
        first_order: without second derivatives.
    Source:
        Raghu et al. 2020.
    """

    def __init__(self, features: nn.Module, head: nn.Module, lr: float, first_order: bool = False):
        super().__init__(FeaturesAndHead(features, head), lr, first_order, adapt=_in_head)


class MetaSGD(GrowthAware, algorithms.MetaSGD):
    """p <- p - rate * grad, with a learned rate for each scalar; experts' rates grow and go with them.

    Args:
        model: any module.
        lr: at which rates start, > 0.
        first_order: without second derivatives.
        adapt: which parameters, see :func:`select_parameters`; all have rates.
    Raises:
        AdaptationError: if nothing would adapt.
        ValueError: on lr <= 0.
    Source:
        Li et al. 2017; learn2learn's MetaSGD.
    """

    lrs: Rates

    def __init__(self, model: nn.Module, lr: float, first_order: bool = False, adapt: Adapt = "all"):
        algorithms.MetaSGD.__init__(self, model, first_order=first_order, lrs=Rates(model, _positive(lr)))
        self._wrap(adapt)

    def _step(self, name: str, gradient: Tensor) -> Tensor:
        rates = self.lrs.of(name)
        kept = None if self._cloned is None else self._cloned.kept.get(name)
        return (rates if kept is None else rates.index_select(0, kept)) * gradient

    def _sync(self) -> None:
        self.lrs.sync(self.module)


class GBML(GrowthAware, algorithms.GBML):
    """p <- p - lr T(grad), with a learned transform T for each parameter, and for each row of a pool.

    learn2learn makes one transform for each parameter, so one for a whole cohort of experts; one for each row is what
    can grow, freeze and leave with its expert.

    Args:
        module: any module.
        transform: a parameter or row -> its transform (``learn2learn.optim.ModuleTransform`` and its like), or None.
        lr: of a step, > 0.
        adapt_transform: the transforms take a step as well, from the second step on, as learn2learn's.
        first_order: without second derivatives.
        adapt: which parameters, see :func:`select_parameters`.
    Raises:
        AdaptationError: if nothing would adapt.
        ValueError: on lr <= 0.
    Source:
        Arnold et al. 2019; learn2learn's GBML.
    """

    compute_update: Transforms  # type: ignore[assignment]
    _transforms: Cloned

    def __init__(
        self,
        module: nn.Module,
        transform: Callable[[Tensor], nn.Module | None],
        lr: float = 1.0,
        adapt_transform: bool = False,
        first_order: bool = False,
        adapt: Adapt = "all",
    ):
        algorithms.GBML.__init__(
            self,
            module,
            transform,
            _positive(lr),
            adapt_transform,
            first_order,
            compute_update=Transforms(module, transform),
        )
        self._wrap(adapt)

    def clone(self, *batch: Any, first_order: bool | None = None, evaluation: bool = False) -> Self:
        clone = super().clone(*batch, first_order=first_order, evaluation=evaluation)
        assert clone._cloned is not None
        used = [
            name
            for parameter in clone._cloned.tensors
            for key in clone.compute_update.keys_of(parameter, clone._cloned.rows.get(parameter))
            if key in clone.compute_update.transforms
            for name in _names_within(clone.compute_update, key)
        ]
        clone._transforms = clone_with_places(clone.compute_update, used, detach=evaluation)
        clone._modules["compute_update"] = clone._transforms.module
        clone._params_updated = False
        return clone

    def _keeps_graph(self) -> bool:
        return self.adapt_transform

    def _before_step(self, loss: Tensor) -> None:
        if not (self.adapt_transform and self._params_updated):
            self._params_updated = True
            return
        tensors = self._transforms.tensors
        gradients = torch.autograd.grad(
            loss, list(tensors.values()), create_graph=not self.first_order, retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(list(tensors), gradients, strict=True):
            if gradient is not None:
                value = tensors[name] - self.lr * gradient
                self._transforms.replace(name, value.detach().requires_grad_() if self.evaluation else value)

    def _step(self, name: str, gradient: Tensor) -> Tensor:
        assert self._cloned is not None
        return self.lr * self.compute_update.update(name, self._cloned.rows.get(name), gradient)

    def _sync(self) -> None:
        self.compute_update.sync(self.module)


def structure_of(module: nn.Module) -> dict[str, Any]:
    """What a wrapper has to follow: the rows of every bank, and the other parameters' shapes."""
    rows = {path: growable._banks for path, growable in growable_parameters(module).items()}
    return {**rows, **{name: parameter.shape for name, parameter in plain_parameters(module)}}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]


def _drop(optimizer: Optimizer, dead: set[int]) -> None:
    """Take tensors out of an optimizer, with their state."""
    for group in optimizer.param_groups:
        keep = [index for index, p in enumerate(group["params"]) if id(p) not in dead]
        if "param_names" in group:
            group["param_names"] = [group["param_names"][index] for index in keep]
        group["params"][:] = [group["params"][index] for index in keep]
    for parameter in [parameter for parameter in optimizer.state if id(parameter) in dead]:
        del optimizer.state[parameter]


def _names_within(transforms: Transforms, key: str) -> list[str]:
    return [f"transforms.{key}.{name}" for name, _ in transforms.transforms[key].named_parameters()]


def _in_head(name: str, parameter: Tensor) -> bool:
    return name.startswith("head.")


def _positive(lr: float) -> float:
    if not lr > 0:
        raise ValueError(f"lr must be above 0, got {lr}")
    return lr
