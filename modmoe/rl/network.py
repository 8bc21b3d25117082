"""The network of a mixture policy: features and contexts in, each expert's outputs mixed."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor, nn

from modmoe import ExpertPool, MoELayer, NonFiniteError, Router
from modmoe.experts import Expert
from modmoe.growable import Init, RowSpec
from modmoe.kernels.batched import BatchedOps
from modmoe.kernels.reference import LoopOps
from modmoe.losses import attach, load_balancing_loss, z_loss
from modmoe.rl.context import Observation, context_features, read_context, read_tasks
from modmoe.rl.experts import SideBySideExpert, make_expert
from modmoe.rl.options import MoEOptions
from modmoe.routing import Routing
from modmoe.rows import Group

LOG_STD = "log_std"  # the namespace of the rows that hold each expert's log standard deviations
DENSE_PAIRS = 4096  # B * E up to which computing every expert beats moving inputs to their experts

# methods of a router that do something where they are overridden; without them it scores and selects, and that is all
BEYOND_SELECTION = ("forward", "assign", "declined", "scored_experts", "scores", "scores_among", "update")


class GateLayer(MoELayer):
    """A MoELayer whose router may score other features than its experts take."""

    @classmethod
    def check_sizes(cls, router: Router, expert: Expert) -> None:
        pass


class Mixed(NamedTuple):
    """Outputs (B, D_out), and the weights (B, E) with which the experts were mixed."""

    outputs: Tensor
    weights: Tensor


class Decision(NamedTuple):
    """What a router decided for a batch.

    Args:
        weights: (B, E), 0 where an expert was not chosen.
        logits: (B, E).
        probs: (B, E).
        choices: (B, K), or None where the router gives no fixed number.
        routing: the whole record, where it was made.
    """

    weights: Tensor
    logits: Tensor
    probs: Tensor
    choices: Tensor | None
    routing: Routing | None


class Structure(NamedTuple):
    """What is derived from a pool's book and kept until it changes.

    Args:
        book: the one it was derived from.
        groups: the banks of the experts, in place.
        order: positions of the banks' experts in pool order; None where they stand so.
    """

    book: Mapping
    groups: list[Group]
    order: Tensor | None


class MoENetwork(nn.Module):
    """y_b = sum_e w_be f_e(x_b), where each expert ends in the network's outputs (``own_heads``) or in latents.

    With oracle routing (``task_of``) a task is computed from its experts' rows alone, gate rows too: once they are
    frozen, it is the same to the last bit for ever (given the same number of inputs).

    Args:
        space: of the observations.
        in_features: of the extractor's output.
        outputs: name -> size of each output; an expert owns a network for each.
        options: see there.
        extra_features: numbers that the experts see besides, and the gate does not (the action, in a critic).
        log_std: size of the rows of log standard deviations; 0 for none.
        log_std_init: their initial value.
        gains: name -> factor of the initial size of an output.
        activation: of the experts unless ``expert_kwargs`` say otherwise.
    Raises:
        ValueError: as MoEOptions, routers and experts do.
    """

    def __init__(
        self,
        space: spaces.Space,
        in_features: int,
        outputs: Mapping[str, int],
        options: MoEOptions,
        extra_features: int = 0,
        log_std: int = 0,
        log_std_init: float = 0.0,
        gains: Mapping[str, float] | None = None,
        activation: str = "relu",
    ):
        super().__init__()
        self.options = options
        self.outputs = dict(outputs)
        act = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]
        layers: list[nn.Module] = []
        width = in_features
        for size in options.trunk:
            layers += [nn.Linear(width, size), act()]
            width = size
        self.trunk = nn.Sequential(*layers) if layers else None
        gate_features = {"features": in_features, "hidden": width}.get(options.gate_input)
        if gate_features is None:
            assert options.context is not None  # MoEOptions
            gate_features = context_features(space, options.context)
        router = options.make_router(gate_features)

        defaults = {"activation": activation} if options.expert == "mlp" else {}
        sizes = self.outputs if options.own_heads else {"latent": options.latent_features}
        parts = {
            name: make_expert(
                options.expert,
                width + extra_features,
                size,
                options.hidden_features,
                {**defaults, **(options.expert_kwargs or {})},
            )
            for name, size in sizes.items()
        }
        expert = SideBySideExpert(parts, gains if options.own_heads else None)
        self.layer = GateLayer(ExpertPool(expert, options.num_experts, options.task), router)
        self.head = None
        self.log_std = None
        if not options.own_heads:
            self.head = nn.ModuleDict({k: nn.Linear(options.latent_features, size) for k, size in outputs.items()})
        if log_std and options.own_heads:
            # mixed with the weights, so a copy's rows keep the mixture where the weights keep their sum
            spec = RowSpec((log_std,), Init("constant", value=log_std_init))
            self.layer.pool.declare(LOG_STD, {"value": spec}, preserving="tie")
        elif log_std:
            self.log_std = nn.Parameter(torch.full((log_std,), log_std_init))
        self._plain = not any(overrides(router, name) for name in BEYOND_SELECTION)
        self.last_routing: Routing | None = None
        self._structure: Structure | None = None
        self.losses: dict[str, Tensor] = {}  # sums of the auxiliary losses since they were last read
        self.num_losses = 0
        if options.shared_frozen:
            self.freeze_shared()

    @property
    def pool(self) -> ExpertPool:
        return self._modules["layer"]._modules["pool"]  # type: ignore[union-attr,return-value] # read ten times a call

    # -- computing ---------------------------------------------------------------------------------

    def forward(self, features: Tensor, obs: Observation, extra: Tensor | None = None) -> Mixed:
        """Route and mix.

        Args:
            features: (B, D) of the extractor.
            obs: what they were extracted from: contexts and tasks are read there.
            extra: (B, extra_features), or None.
        """
        hidden = features if self.trunk is None else self.trunk(features)
        x = hidden if extra is None else torch.cat([hidden, extra], 1)
        gate_x = self._gate_input(features, hidden, obs)
        if self.options.task_of is None:
            mixed = self._compute(x, gate_x, None)
        else:
            tasks = self.tasks(obs)
            present = tasks.unique().tolist()
            if len(present) == 1:
                mixed = self._compute(x, gate_x, self._open_to(present[0]))
            else:
                parts = [(tasks == task).nonzero().squeeze(1) for task in present]
                found = [
                    self._compute(x.index_select(0, part), gate_x.index_select(0, part), self._open_to(task))
                    for task, part in zip(present, parts, strict=True)
                ]
                back = torch.cat(parts).argsort()
                mixed = Mixed(*(torch.cat(values).index_select(0, back) for values in zip(*found, strict=True)))
        if self.head is None:
            return mixed
        return mixed._replace(outputs=torch.cat([head(mixed.outputs) for head in self.head.values()], 1))

    def log_stds(self, weights: Tensor) -> Tensor:
        """(B, A): the mixture's log standard deviations, a weighted mean of the experts' rows."""
        if self.log_std is not None:
            return self.log_std.expand(len(weights), -1)
        rows = self.pool.namespace(LOG_STD)["value"]
        if self.layer.router.weight_sum == "1":
            return weights @ rows
        return weights @ rows / weights.sum(1, keepdim=True).clamp(min=1e-8)

    def split(self, outputs: Tensor) -> dict[str, Tensor]:
        """The outputs (B, D_out) by name."""
        return dict(zip(self.outputs, outputs.split(list(self.outputs.values()), 1), strict=True))

    def route(self, features: Tensor, obs: Observation) -> Routing:
        """The decision alone, without a gradient, for who wants to look at it."""
        with torch.no_grad():
            hidden = features if self.trunk is None else self.trunk(features)
            gate_x = self._gate_input(features, hidden, obs)
            if self.options.task_of is None:
                return self.layer.router(gate_x, self.pool.namespace(self.layer.namespace))
            tasks = self.tasks(obs)
            opened = torch.zeros(len(tasks), self.pool.num_experts, dtype=torch.bool, device=tasks.device)
            for task in tasks.unique().tolist():
                columns = torch.tensor(self._open_to(task), device=tasks.device)
                opened[:, columns] |= (tasks == task).unsqueeze(1)
            if bool((opened.sum(1) == 1).all()):
                return Routing.assigned(opened.to(torch.uint8).argmax(1), self.pool.num_experts)
            return self.layer.router(gate_x, self.pool.namespace(self.layer.namespace), None, opened)

    def tasks(self, obs: Observation) -> Tensor:
        """(B,) int64: the task of each observation.

        Raises:
            ValueError: if the options do not say how to read one.
        """
        if self.options.task_of is None:
            raise ValueError("the policy does not know tasks: say task_of=... in policy_kwargs")
        return read_tasks(obs, self.options.context, self.options.task_of)

    def _gate_input(self, features: Tensor, hidden: Tensor, obs: Observation) -> Tensor:
        if self.options.gate_input == "context":
            assert self.options.context is not None  # MoEOptions
            return read_context(obs, self.options.context)
        return hidden if self.options.gate_input == "hidden" else features

    def _open_to(self, task: int) -> tuple[int, ...]:
        """The positions of the experts of a task, and of those that are open to every task."""
        owners = self.pool.tasks()
        found = tuple(position for position, owner in enumerate(owners) if owner is None or owner == task)
        if found and set(owners) != {None}:  # tasks that route while no expert has one are a mistake
            return found
        if self.options.unseen_task == "raise":
            raise ValueError(
                f"no expert belongs to task {task}, the pool has {list(dict.fromkeys(owners))}: say task=... for the "
                "experts to start with, grow(model, task=...) before training on another, or unseen_task='newest' to "
                "evaluate"
            )
        return (len(owners) - 1,)

    def _compute(self, x: Tensor, gate_x: Tensor, among: tuple[int, ...] | None) -> Mixed:
        """Outputs of the experts (or latents), mixed, by the experts at these positions alone; None for all.

        A part of the pool is computed from its own rows, so that it gives the same to the last bit however the pool
        grows; one expert has weight 1, whatever the gate says of it.
        """
        pool = self.pool
        if among is not None and len(among) == 1:
            rows = pool.namespace("expert", [pool.ids[among[0]]])
            y = pool.expert.compute(x, LoopOps({name: rows[name].squeeze(0) for name in rows}))
            weights = x.new_zeros(len(x), pool.num_experts)
            weights[:, among[0]] = 1.0
            return Mixed(y, weights)
        ids = pool.ids if among is None else tuple(pool.ids[position] for position in among)
        decision = self._decide(gate_x, ids)
        if among is None:
            y, weights = self._mix(x, decision), decision.weights
        else:
            rows = pool.namespace("expert", ids)
            y = weighted(decision.weights, pool.expert.compute(x, BatchedOps({name: rows[name] for name in rows})))
            columns = torch.tensor(among, device=x.device)
            weights = x.new_zeros(len(x), pool.num_experts).index_copy(1, columns, decision.weights)
        return Mixed(self._attach(y, decision, ids), weights)

    def _decide(self, gate_x: Tensor, ids: tuple[int, ...]) -> Decision:
        """Weights without the record, where the router does no more than score and select: half the time."""
        router, rows = self.layer.router, self.pool.namespace(self.layer.namespace, ids)
        if not self._plain or self._moves_inputs(len(gate_x)):
            routing = router(gate_x, rows)
            choices = routing.requested_choices if routing.top_k is not None else None
            return Decision(routing.matrix(), routing.logits, routing.probs, choices, routing)
        router.check_pool(len(ids))
        logits = router.score(gate_x, rows)
        if not math.isfinite(float(logits.detach().sum())):
            raise NonFiniteError("the observations, or the router's scores of them, are not finite")
        choices, weights, probs = router.select(logits, None, None, rows)
        return Decision(torch.zeros_like(probs).scatter(1, choices, weights), logits, probs, choices, None)

    def _mix(self, x: Tensor, decision: Decision) -> Tensor:
        if decision.routing is not None and self._moves_inputs(len(x)):
            return self.layer.mix(x, decision.routing)
        structure = self._current()
        outputs = [self.pool.expert.compute(x, BatchedOps(group.tensors)) for group in structure.groups]
        w = decision.weights if structure.order is None else decision.weights.index_select(1, structure.order)
        return weighted(w, outputs[0] if len(outputs) == 1 else torch.cat(outputs))

    def _moves_inputs(self, batch: int) -> bool:
        """Whether each input goes to its experts, rather than all experts computing all inputs."""
        num_experts = self.pool.num_experts
        return batch * num_experts > DENSE_PAIRS and 2 * self.layer.router.num_active(num_experts) <= num_experts

    # -- auxiliary losses --------------------------------------------------------------------------

    def _attach(self, y: Tensor, decision: Decision, ids: tuple[int, ...]) -> Tensor:
        """y, whose backward pass also trains the router by the auxiliary losses."""
        if not (self.training and torch.is_grad_enabled()):
            return y
        if decision.routing is not None and overrides(self.layer.router, "update"):
            self.last_routing = decision.routing.detach()
        options, live = self.options, [not self.pool.book[expert_id].frozen for expert_id in ids]
        found: list[tuple[str, float, Tensor]] = []
        if options.balance_coef and sum(live) > 1 and decision.choices is not None:
            counted = None if all(live) else torch.tensor(live, device=y.device)
            loss = load_balancing_loss(decision.probs, decision.choices, open_experts=counted)
            found.append(("balance", options.balance_coef, loss))
        if options.z_coef:
            found.append(("z", options.z_coef, z_loss(decision.logits)))
        for name, factor, loss in found:
            y = attach(y, loss, factor)
            self.losses[name] = self.losses.get(name, 0.0) + loss.detach()
        self.num_losses += bool(found)
        return y

    def read_losses(self) -> dict[str, float]:
        """The mean of each auxiliary loss since this was last called; empty if there was none."""
        means = {name: float(total) / self.num_losses for name, total in self.losses.items()}
        self.losses, self.num_losses = {}, 0
        return means

    # -- structure ---------------------------------------------------------------------------------

    def freeze_shared(self) -> None:
        """Freeze what all experts share: trunk, heads, and the router's shared parts."""
        for module in (self.trunk, self.head):
            if module is not None:
                module.requires_grad_(False)
        if self.log_std is not None:
            self.log_std.requires_grad_(False)
        self.layer.router.freeze_shared()

    def update_router(self) -> None:
        """Let a router adjust what it keeps besides its gradients, by the last routing in training."""
        routing, self.last_routing = self.last_routing, None
        if routing is not None and routing.num_experts == self.pool.num_experts:
            self.layer.router.update(self.pool, self.layer.namespace, routing)

    def _current(self) -> Structure:
        pool = self.pool
        if self._structure is None or self._structure.book is not pool.book:
            self._structure = self._derive()
        return self._structure

    def _derive(self) -> Structure:
        pool = self.pool
        groups = pool.banks()
        order = [position for group in groups for position in group.positions]
        device = next(iter(groups[0].tensors.values())).device
        return Structure(pool.book, groups, None if order == sorted(order) else torch.tensor(order, device=device))

    def _apply(self, fn, recurse: bool = True):
        self._structure = None  # .to() replaces the frozen banks
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_structure": None, "last_routing": None, "losses": {}, "num_losses": 0}


def weighted(weights: Tensor, y: Tensor) -> Tensor:
    """(B, D_out): sum_e w_be y_eb for weights (B, E) and outputs (E, B, D_out)."""
    return torch.bmm(weights.unsqueeze(1), y.transpose(0, 1)).squeeze(1)


def overrides(router: Router, method: str) -> bool:
    """Whether a router has its own version of a method of Router."""
    return getattr(type(router), method) is not getattr(Router, method)
