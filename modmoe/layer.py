"""The mixture-of-experts layer: a pool, a router, and a backend."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modmoe.experts import Expert
from modmoe.gating.base import Router
from modmoe.gating.fitted import FittedRouter
from modmoe.kernels.blended import run_blended
from modmoe.kernels.choice import Choice, choose_backend, default_backend
from modmoe.kernels.reference import run_reference
from modmoe.kernels.select import BACKENDS, Backend, compute_assignments, compute_output
from modmoe.pool import ExpertPool
from modmoe.routing import MergedRouting, Routing, SlotRouting
from modmoe.rows import Growth, Task
from modmoe.tasks import TaskIds, open_experts


class MoELayer(nn.Module):
    """y_t = sum_e w_te f_e(x_t), over the experts e that the router chooses for token t.

    Args:
        pool: the experts. Several layers may stand on one pool; each has its own gate rows.
        router: scores and selects.
        shared_expert: a module that every token passes through besides; its output is added.
        backend: "auto", or one of "reference", "dense", "bmm", "grouped", "fused" (CPU), "triton" (CUDA).
        namespace: the name of the gate rows on the pool; None for "gate", "gate_2", ...
    Raises:
        ValueError: on an unknown backend or one that cannot compute these experts, experts that need another kind of
            layer, a router whose size is not the experts', or a top_k above the pool's size.
    """

    def __init__(
        self,
        pool: ExpertPool,
        router: Router,
        shared_expert: nn.Module | None = None,
        backend: Backend = "auto",
        namespace: str | None = None,
    ):
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend '{backend}', choose one of {BACKENDS}")
        self.check_pair(router, pool.expert)
        if backend == "fused" and pool.expert.two_layers() is None:
            raise ValueError(f"the fused backend computes experts of two layers, and {pool.expert} has others")
        self.check_sizes(router, pool.expert)
        router.check_pool(pool.num_experts)
        self.pool = pool
        self.router = router
        self.shared_expert = shared_expert
        self.backend = backend
        if namespace is None:
            names = ("gate", *(f"gate_{number}" for number in range(2, len(pool.namespaces) + 2)))
            namespace = next(name for name in names if name not in pool.namespaces)
        self.namespace = namespace
        pool.declare(namespace, router.row_specs(), preserving=router.preserving_growth)
        self._routing: Routing | None = None
        self._shared_frozen = False

    @classmethod
    def check_pair(cls, router: Router, expert: Expert) -> None:
        """Raise ValueError if this kind of layer cannot compute this kind of expert with this router."""
        if expert.needs_sequence:
            raise ValueError(f"{expert} needs the keys and values of its sequence: use MoAttention for MoELayer")

    @classmethod
    def check_sizes(cls, router: Router, expert: Expert) -> None:
        """Raise ValueError unless both take the same features; layers that route by others override it."""
        if router.in_features != expert.in_features:
            raise ValueError(f"the router takes {router.in_features} features, the experts take {expert.in_features}")

    # -- computing ---------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        task_ids: TaskIds | None = None,
        *,
        top_k: int | None = None,
        expert_mask: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Route and compute.

        Args:
            x: (..., D).
            mask: (...) bool, True for real tokens; the output of the others is zero, and they load no expert.
            task_ids: one task for all of x, or one for each entry of x's first axis (a sequence of str or int, or an
                int tensor), or an int tensor (...). Tokens of a task use its experts and those without a task only.
            top_k: overrides the router's k in this call.
            expert_mask: (E,) or (..., E) bool, the experts that may be used, in the order of ``pool.ids``.
            ids: (...) int64, what the router's ``needs_ids`` names.
        Returns:
            (..., D_out) with x's dtype (under autocast: the autocast dtype).
        Raises:
            ValueError: on a wrong shape, k or task, or where every expert is masked for a token.
            NonFiniteError: on a non-finite input or score.
        """
        routing = self.route(x, mask, task_ids, top_k=top_k, expert_mask=expert_mask, ids=ids)
        y = self.mix(x, routing)
        if self.shared_expert is not None:
            # zeros go in as well: a NaN in padding would reach the gradients as 0 * NaN
            shared = self.shared_expert(x if mask is None else torch.where(mask.unsqueeze(-1), x, torch.zeros_like(x)))
            y = y + (shared if mask is None else torch.where(mask.unsqueeze(-1), shared, torch.zeros_like(shared)))
        return y

    def route(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        task_ids: TaskIds | None = None,
        *,
        top_k: int | None = None,
        expert_mask: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Routing:
        """What the router decides for x, without computing; arguments as in :meth:`forward`."""
        if x.dim() < 1 or x.shape[-1] != self.router.in_features:
            raise ValueError(f"x of shape (..., {self.router.in_features}) is needed, got {tuple(x.shape)}")
        self._check_dtype(x)
        shape = x.shape[:-1]
        if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
            raise ValueError(f"a bool mask of shape {tuple(shape)} is needed, got {mask.dtype} {tuple(mask.shape)}")
        allowed = open_experts(self.pool, shape, x.device, task_ids, expert_mask)
        flat = x.reshape(-1, x.shape[-1])
        flat_mask = None if mask is None else mask.reshape(-1)
        if flat_mask is not None:
            flat = torch.where(flat_mask.unsqueeze(1), flat, torch.zeros_like(flat))
        rows = self.pool.namespace(self.namespace)
        flat_ids = None if ids is None else ids.reshape(-1)
        routing = self.router(flat, rows, flat_mask, allowed, top_k, flat_ids, tuple(shape))
        self._keep(routing)
        return routing

    def mix(self, x: Tensor, routing: Routing) -> Tensor:
        """What the routed experts give together, by a routing of x: (..., D) -> (..., D_out), zero in padding."""
        flat = self._tokens(x, routing)
        if isinstance(routing, SlotRouting | MergedRouting):
            groups = [group.to(flat.dtype) for group in self.pool.groups()]
            y = run_blended(flat, groups, self.pool.expert, routing, self.backend)
        else:
            y = compute_output(self.pool, flat, routing, self.backend)
        return y.view(*x.shape[:-1], y.shape[1])

    def explain(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        task_ids: TaskIds | None = None,
        *,
        top_k: int | None = None,
        expert_mask: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Choice:
        """Which backend computes x, and why; arguments as in :meth:`forward`, and as there gradients matter."""
        if self.backend != "auto":
            return Choice(self.backend, why="the layer was built so")
        before = self._routing
        with torch.random.fork_rng(enabled=self.router.stochastic):
            routing = self.route(x, mask, task_ids, top_k=top_k, expert_mask=expert_mask, ids=ids)
        self._routing = before
        return self._choose(self._tokens(x, routing), routing)

    def _choose(self, flat: Tensor, routing: Routing) -> Choice:
        if isinstance(routing, SlotRouting):
            return Choice("bmm", why="every expert has the same number of slots")
        if isinstance(routing, MergedRouting):
            return default_backend(self.pool.expert, len(routing.merge_weight), len(flat), flat.dtype, flat.device)
        return choose_backend(self.pool.expert, self.pool.num_experts, flat, routing)

    def compute(self, x: Tensor, routing: Routing) -> Tensor:
        """The output of each assignment's expert, not weighted: (..., D) -> (N, D_out), zero where dropped.

        Slots and merged experts are no sum of these: of them, forward alone gives the output.
        """
        flat = self._tokens(x, routing)
        groups = [group.to(flat.dtype) for group in self.pool.groups()]
        return compute_assignments(groups, self.pool.expert, flat, routing, self.backend)

    def _tokens(self, x: Tensor, routing: Routing) -> Tensor:
        """(T, D) the tokens, zero in padding, in the dtype that kernels compute in."""
        self._check_dtype(x)
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) != routing.num_tokens or self.pool.num_experts != routing.num_experts:
            raise ValueError(
                f"the routing is of {routing.num_tokens} tokens and {routing.num_experts} experts, "
                f"got {len(flat)} tokens and {self.pool.num_experts} experts"
            )
        if routing.mask is not None:
            flat = torch.where(routing.mask.unsqueeze(1), flat, torch.zeros_like(flat))
        autocast = torch.is_autocast_enabled(x.device.type)
        return flat.to(torch.get_autocast_dtype(x.device.type)) if autocast else flat

    def _check_dtype(self, x: Tensor) -> None:
        dtype = self.pool.like.dtype
        if x.dtype != dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"x has dtype {x.dtype}, the experts have {dtype}: convert one of them")

    def expert_output(self, expert_id: int, x: Tensor) -> Tensor:
        """One expert's own output for every x, whatever the router says: (..., D) -> (..., D_out).

        It is computed from the expert's rows alone, so for a frozen expert it is the same to the last bit for ever.
        """
        rows = self.pool.namespace("expert", [expert_id])
        flat = x.reshape(-1, x.shape[-1])
        local = torch.zeros(len(flat), dtype=torch.int64, device=x.device)
        y = run_reference(self.pool.expert, {name: rows[name] for name in rows}, flat, local)
        return y.view(*x.shape[:-1], -1)

    def expert_score(self, expert_id: int, x: Tensor) -> Tensor:
        """One expert's raw score for every x, from its own rows alone: (..., D) -> (...)."""
        score = self.router.score(x.reshape(-1, x.shape[-1]), self.pool.namespace(self.namespace, [expert_id]))
        return score.view(x.shape[:-1])

    # -- the last routing --------------------------------------------------------------------------

    @property
    def routing(self) -> Routing | None:
        """The last Routing; with its graph until the backward pass reaches the router, detached after it."""
        return self._routing

    def _keep(self, routing: Routing) -> None:
        self._routing = routing
        if torch.compiler.is_compiling() or not routing.source.requires_grad:
            return
        layer = weakref.ref(self)

        def release(_grad: Tensor) -> None:
            owner = layer()
            if owner is not None and owner._routing is routing_ref():
                owner._routing = owner._routing.detach() if owner._routing is not None else None

        routing_ref = weakref.ref(routing)
        routing.source.register_hook(release)

    def __getstate__(self) -> dict:
        # tensors with a graph cannot be copied, and a checkpoint has no use for the last batch
        return {**self.__dict__, "_routing": None}

    # -- growing -----------------------------------------------------------------------------------

    def add_experts(
        self,
        n: int = 1,
        init: Growth = "fresh",
        task: Task | None = None,
        source: int | None = None,
        **sizes: int,
    ) -> list[int]:
        """Add experts with all their rows; see :meth:`modmoe.ExpertPool.add_experts`. Returns the new stable ids."""
        return self.pool.add_experts(n, init=init, task=task, source=source, **sizes)

    def freeze(self, ids: Sequence[int] | None = None) -> None:
        """Freeze experts; without ids all of them, and the parts of the router and shared expert that all share."""
        self.pool.freeze(ids)
        if ids is None:
            self.router.freeze_shared()
            if self.shared_expert is not None:
                self.shared_expert.requires_grad_(False)
                self.shared_expert.zero_grad(set_to_none=True)  # an optimizer would still apply what is left there
                self._shared_frozen = True
                self.shared_expert.eval()

    def train(self, mode: bool = True) -> "MoELayer":
        """As of any module; a frozen shared expert stays in eval mode, so that its statistics do not move."""
        super().train(mode)
        if self._shared_frozen and self.shared_expert is not None:
            self.shared_expert.eval()
        return self

    def unfreeze(self, ids: Sequence[int]) -> None:
        """Make experts trainable again."""
        self.pool.unfreeze(ids)

    def remove(self, ids: Sequence[int]) -> None:
        """Remove experts with all their rows.

        Raises:
            ValueError: on an unknown id, or if fewer experts than top_k would be left; nothing is changed then.
        """
        left = [expert_id for expert_id in self.pool.ids if expert_id not in set(ids)]
        if left:
            self.router.check_pool(len(left))
        self.pool.remove(ids)

    def update_router(self) -> None:
        """Let the router adjust what it keeps besides its gradients, after an optimizer step; see Router.update."""
        if self._routing is not None:
            self.router.update(self.pool, self.namespace, self._routing)

    def observe(self, expert_id: int, x: Tensor, labels: Tensor | None = None, settle: bool = True) -> None:
        """Take data into the statistics that a gate keeps of one live expert; see FittedRouter.observe."""
        self._fitted_router().observe(self.pool, self.namespace, expert_id, x, labels, settle)

    def settle(self, expert_id: int) -> None:
        """Do what ``observe(settle=False)`` put off; see FittedRouter.settle."""
        self._fitted_router().settle(self.pool, self.namespace, expert_id)

    def _fitted_router(self) -> FittedRouter:
        if not isinstance(self.router, FittedRouter):
            raise ValueError(f"{type(self.router).__name__} is trained by gradient: it observes no data")
        return self.router

    def extra_repr(self) -> str:
        return f"backend={self.backend}, namespace={self.namespace}"
