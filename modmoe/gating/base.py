"""What every router has in common: scores, closed experts, checks, and the declared properties."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from modmoe.errors import NonFiniteError
from modmoe.gating.capacity import Capacity
from modmoe.growable import RowSpec
from modmoe.pool import ExpertPool
from modmoe.routing import Routing
from modmoe.rows import Preserving, Rows

Scope = Literal["token", "sequence", "batch"]


class Noisy(NamedTuple):
    """Logits (T, E) that noise was added to, and its standard deviation (T, E)."""

    logits: Tensor
    std: Tensor


class Assignment(NamedTuple):
    """The triples of a Routing, and where they come from; see there."""

    token_index: Tensor
    expert_index: Tensor
    weight: Tensor
    probs: Tensor
    top_k: int | None
    has_drops: bool
    requested: Tensor | None = None


class Router(nn.Module, ABC):
    """(x, rows) -> Routing. It keeps neither the pool nor rows: the layer passes them.

    Attributes:
        form: what it decides: "choices", K experts for each token; "triples", any number; "slots", mixtures of tokens
            (a SlotRouting); "merges", mixtures of experts (a MergedRouting).
        needs_ids: what the ``ids`` of a call hold: "token" or "domain"; None where there are none.
        shared_parts: names of its own parameters that all experts share; ``freeze()`` without ids freezes them too.
        in_features: size of the input.
        capacity: the limit of each expert's load; None for none.
        separate_scores: True if an expert's score depends on its own rows and the shared parts only, so that no growth
            changes it; False if only the experts that are open together with it may change it.
    """

    form: ClassVar[Literal["choices", "triples", "slots", "merges"]] = "choices"
    needs_ids: ClassVar[Literal["token", "domain"] | None] = None
    shared_parts: ClassVar[tuple[str, ...]] = ()
    separate_scores: ClassVar[bool] = True
    in_features: int
    capacity: Capacity | None = None

    @property
    def scope(self) -> Scope:
        """What it decides on at once: who is beyond a capacity is decided for the whole batch."""
        return "token" if self.capacity is None else "batch"

    @property
    def causal(self) -> bool:
        """True if a token's routing does not depend on later tokens; a capacity depends on how many there are."""
        return self.capacity is None

    @property
    def stochastic(self) -> bool:
        """True if it draws random numbers in training; in evaluation none does."""
        return False

    @abstractmethod
    def row_specs(self) -> dict[str, RowSpec]:
        """The rows that it needs of each expert."""

    @property
    def preserving_growth(self) -> Preserving | None:
        """How an added expert keeps the layer's function, see ``ExpertPool.declare``; None where nothing does."""
        return None

    @property
    @abstractmethod
    def weight_sum(self) -> str:
        """What each token's weights add up to: "1", "<= 1", or "any" where they may add up to more."""

    @abstractmethod
    def num_active(self, num_experts: int) -> int:
        """How many experts compute each token."""

    def check_pool(self, num_experts: int, top_k: int | None = None) -> None:
        """Raise ValueError if a pool of this size cannot be routed."""

    @abstractmethod
    def score(self, x: Tensor, rows: Rows) -> Tensor:
        """Raw scores (T, E) for x (T, D), at least in float32; an expert's column depends on its own rows only."""

    def scores(self, x: Tensor, rows: Rows, ids: Tensor | None) -> Tensor:
        """Raw scores (T, E) where a router reads ids (T,) int64 as well; others only :meth:`score`."""
        return self.score(x, rows)

    def scores_among(self, x: Tensor, rows: Rows, ids: Tensor | None, open_experts: Tensor | None) -> Tensor:
        """Raw scores (T, E) where they depend on which experts are open, (E,) or (T, E); others only :meth:`scores`."""
        return self.scores(x, rows, ids)

    def jitter(self, x: Tensor) -> Tensor:
        """What is scored in place of x (T, D), in training only; the experts see x itself."""
        return x

    def add_noise(self, logits: Tensor, x: Tensor, rows: Rows) -> Noisy | None:
        """What is selected by in place of the logits, in training only; None for the logits themselves."""
        return None

    @abstractmethod
    def select(
        self, logits: Tensor, allowed: Tensor | None, top_k: int | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts for each token.

        Args:
            logits: (T, E), with -inf where an expert is closed.
            allowed: (T, E) bool or None for all.
            top_k: this call's k, or None.
            rows: this router's rows.
        Returns:
            expert positions (T, K), weights (T, K), probs (T, E).
        """

    def declined(self, weights: Tensor, allowed: Tensor | None, rows: Rows) -> Tensor | None:
        """(T, K) bool: choices that are given up at once and take no room of any capacity; None for none.

        Args:
            weights: (T, K) of the chosen experts, the best first.
            allowed: (T, E) bool or None for all.
            rows: this router's rows.
        """
        return None

    def assign(
        self, logits: Tensor, allowed: Tensor | None, mask: Tensor | None, top_k: int | None, rows: Rows
    ) -> Assignment:
        """Turn scores into triples: K for each token, best first. Routers that decide otherwise override it.

        Args:
            logits: (T, E), with -inf where an expert is closed; 0 in padding.
            allowed: (T, E) bool or None for all.
            mask: (T,) bool or None for all.
            top_k: this call's k, or None.
            rows: this router's rows.
        """
        choices, weights, probs = self.select(logits, allowed, top_k, rows)
        num_tokens, k = choices.shape
        kept = None
        if allowed is not None:
            kept = allowed.gather(1, choices)
        if mask is not None:
            kept = mask.unsqueeze(1).expand_as(choices) if kept is None else kept & mask.unsqueeze(1)
        declined = self.declined(weights, allowed, rows)
        if declined is not None:
            kept = ~declined if kept is None else kept & ~declined
        if kept is not None:
            choices = choices.masked_fill(~kept, -1)
        requested = None
        if self.capacity is not None:
            requested = choices.reshape(-1)
            num_real = num_tokens if mask is None else mask.sum()
            limit = self.capacity.limit(num_real, k, logits.shape[1], self.training)
            kept = self.capacity.keep(choices, probs.amax(1), logits.shape[1], limit)
            choices = choices.masked_fill(~kept, -1)
        if kept is not None:
            weights = torch.where(kept, weights, torch.zeros_like(weights))
        return Assignment(
            torch.arange(num_tokens, device=logits.device).repeat_interleave(k),
            choices.reshape(-1),
            weights.reshape(-1),
            probs,
            k,
            kept is not None,
            requested,
        )

    def forward(
        self,
        x: Tensor,
        rows: Rows,
        mask: Tensor | None = None,
        open_experts: Tensor | None = None,
        top_k: int | None = None,
        ids: Tensor | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Routing:
        """Route tokens.

        Args:
            x: (T, D).
            rows: this router's rows of all experts.
            mask: (T,) bool, True for real tokens; the others are assigned to nobody.
            open_experts: (E,) or (T, E) bool, the experts that may be chosen; None for all.
            top_k: overrides the router's own k in this call.
            ids: (T,) int64, see ``needs_ids``.
            shape: what T is made of, the sequence last: (B, S), ...; None for one sequence.
        Returns:
            The triples.
        Raises:
            NonFiniteError: if a score of a real token is NaN or infinite.
            ValueError: if a real token has no open expert, on a wrong k, or on ids missing or not needed.
        """
        num_tokens, num_experts = x.shape[0], len(rows.ids)
        self.check_pool(num_experts, top_k)
        self.check_ids(ids, num_tokens)
        with torch.autocast(x.device.type, enabled=False):  # it would score in half precision
            logits = self.scores_among(self.jitter(x) if self.training else x, rows, ids, open_experts)
            noisy = self.add_noise(logits, x, rows) if self.training else None
        ranked = logits if noisy is None else noisy.logits
        scored = self.scored_experts(rows)
        allowed, masked = open_experts, ranked
        if scored is not None:
            both = scored if open_experts is None else scored & open_experts
            unserved = ~both.any(-1, keepdim=True)
            allowed = both if open_experts is None else both | (open_experts & unserved)
            masked = ranked.masked_fill(~scored, 0.0)
        comparable = masked
        if allowed is not None:
            allowed = allowed.expand(num_tokens, num_experts)
            masked = masked.masked_fill(~allowed, -torch.inf)
        check_scores(x, comparable, allowed, mask)
        if mask is not None:  # padding must not turn into NaN, whatever is open to it
            masked = torch.where(mask.unsqueeze(1), masked, torch.zeros_like(masked))
        assignment = self.assign(masked, allowed, mask, top_k, rows)
        return Routing(
            num_tokens=num_tokens,
            num_experts=num_experts,
            logits=logits,
            noisy_logits=None if noisy is None else noisy.logits,
            noise_std=None if noisy is None else noisy.std,
            mask=mask,
            open_experts=allowed,
            **assignment._asdict(),
        )

    def check_ids(self, ids: Tensor | None, num_tokens: int) -> None:
        """Raise ValueError unless there is one integer id for each token where, and only where, it needs them."""
        if (ids is None) != (self.needs_ids is None):
            wanted = "no ids" if self.needs_ids is None else f"a {self.needs_ids} id for each token (ids=...)"
            raise ValueError(f"{type(self).__name__} needs {wanted}")
        if ids is not None and (ids.shape != (num_tokens,) or ids.is_floating_point() or ids.dtype == torch.bool):
            raise ValueError(f"integer ids of shape ({num_tokens},) are needed, got {ids.dtype} {tuple(ids.shape)}")

    def update(self, pool: ExpertPool, namespace: str, routing: Routing) -> None:
        """What a router adjusts by itself after an optimizer step, from the step's routing; nothing by default."""

    def scored_experts(self, rows: Rows) -> Tensor | None:
        """(E,) bool: experts that have a score at all; None for all.

        Gates fitted to data leave out unfitted ones, unless a token has no other open expert.
        """
        return None

    def freeze_shared(self, frozen: bool = True) -> None:
        """Freeze (or unfreeze) the parts that all experts share."""
        for name in self.shared_parts:
            parameter = self.get_parameter(name)
            parameter.requires_grad_(not frozen)
            parameter.grad = None


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision moves routing decisions: scores are kept in float32 or better."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def adjustable_experts(pool: ExpertPool, routing: Routing) -> Tensor:
    """(E,) bool: the experts that :meth:`Router.update` may adjust: live, and open to at least one real token.

    Raises:
        ValueError: if the pool has grown since the routing.
    """
    if routing.num_experts != pool.num_experts:
        raise ValueError(
            f"the routing is of {routing.num_experts} experts, the pool has {pool.num_experts}: "
            "update the router before the pool grows"
        )
    live = [not pool.record(expert_id).frozen for expert_id in pool.ids]
    return torch.tensor(live, device=routing.logits.device) & open_pairs(routing).any(0)


def open_pairs(routing: Routing) -> Tensor:
    """(T, E) bool: the experts that were open to each real token; none to padding."""
    pairs = torch.ones(routing.num_tokens, routing.num_experts, dtype=torch.bool, device=routing.logits.device)
    if routing.open_experts is not None:
        pairs = pairs & routing.open_experts
    return pairs if routing.mask is None else pairs & routing.mask.unsqueeze(1)


def check_scores(x: Tensor, logits: Tensor, allowed: Tensor | None, mask: Tensor | None) -> None:
    """Raise on non-finite scores or on a real token without an open expert; asynchronous where a sync would hurt.

    Raises:
        NonFiniteError: on NaN or infinite scores; it says whether the input was already so.
        ValueError: if every expert is closed for some real token.
    """
    finite = torch.isfinite(logits).all(1)
    served = torch.ones_like(finite) if allowed is None else allowed.any(1)
    if mask is not None:
        finite, served = finite | ~mask, served | ~mask
    if torch.compiler.is_compiling() or x.is_cuda:
        torch.ops.aten._assert_async.msg(finite.all(), "non-finite input or router logits")
        torch.ops.aten._assert_async.msg(served.all(), "every expert is masked for some token")
        return
    if not finite.all():
        token = int((~finite).nonzero()[0])
        where = "logits" if torch.isfinite(x[token]).all() else "input"
        raise NonFiniteError(f"non-finite {where} at token {token} of {x.shape[0]}")
    if not served.all():
        token = int((~served).nonzero()[0])
        raise ValueError(f"every expert is masked for token {token} of {x.shape[0]}")


def require_served(served: Tensor, why: str) -> None:
    """Raise ValueError(why) unless each token (T,) is served; asynchronous where a sync would hurt."""
    if torch.compiler.is_compiling() or served.is_cuda:
        torch.ops.aten._assert_async.msg(served.all(), why)
    elif not served.all():
        raise ValueError(f"{why}: token {int((~served).nonzero()[0])} of {len(served)}")
