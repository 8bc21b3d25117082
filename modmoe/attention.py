"""Mixture of attention heads: a layer whose experts are heads over keys and values that they share."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from modmoe.experts import AttentionExpert, Expert
from modmoe.gating import Router
from modmoe.kernels.choice import Choice, default_backend
from modmoe.kernels.select import Backend, combine, compute_assignments
from modmoe.layer import MoELayer
from modmoe.pool import ExpertPool
from modmoe.routing import Routing
from modmoe.rows import Group


class MoAttention(MoELayer):
    """y_t = sum_e w_te softmax(x_t W_q,e K^T / sqrt(H)) V W_o,e, over the heads e that the router chooses for token t.

    The keys K = X W_k and values V = X W_v of a sequence X are computed once, whatever the router says. W_k and W_v
    belong to no expert, and ``freeze()`` without ids freezes them too. Until then they are trained, so a frozen head's
    rows stay what they are but its output moves with them. It is called with sequences (..., S, D); where a mask
    (..., S) says that a token is none, nobody attends to it, and its output is zero.

    Args:
        pool: of AttentionExpert.
        router: scores and selects.
        causal: True to let a token attend to itself and those before it, False to the whole sequence.
        backend: see MoELayer.
        namespace: see MoELayer.
    Raises:
        ValueError: on experts of another kind, on a router that does not choose K heads for each token, on causal
            attention with a router that looks ahead, and as MoELayer.
    Source:
        Zhang et al. 2022, mixture of attention heads (MoA). Their router is TopKRouter(order="softmax_topk",
        renormalize=True), its sum held constant in the backward pass, which is not so here.
    """

    def __init__(
        self,
        pool: ExpertPool,
        router: Router,
        causal: bool = False,
        backend: Backend = "auto",
        namespace: str | None = None,
    ):
        if causal and (reason := why_not_causal(router)):
            raise ValueError(reason)
        super().__init__(pool, router, backend=backend, namespace=namespace)
        assert isinstance(pool.expert, AttentionExpert)  # check_pair
        self.head = pool.expert
        self.causal = causal
        like = pool.growable("expert", self.head.query.name).like
        sizes = (self.head.in_features, self.head.head_features)
        self.key = nn.Linear(*sizes, bias=False, device=like.device, dtype=like.dtype)
        self.value = nn.Linear(*sizes, bias=False, device=like.device, dtype=like.dtype)

    @classmethod
    def check_pair(cls, router: Router, expert: Expert) -> None:
        if not isinstance(expert, AttentionExpert):
            raise ValueError(f"a pool of AttentionExpert is needed, got {expert}")
        if router.form != "choices":
            raise ValueError(
                f"heads need the same number of choices for each token, and whole tokens: {type(router).__name__} "
                f"gives {router.form}"
            )

    def compute(self, x: Tensor, routing: Routing) -> Tensor:
        """The output of each assignment's head, not weighted: (..., S, D) -> (N, D), zero where dropped."""
        flat = self._tokens(x, routing)
        groups = [group.to(flat.dtype) for group in self.pool.groups()]
        return self._heads(flat.view(x.shape), routing, groups, self.backend)

    def _choose(self, flat: Tensor, routing: Routing) -> Choice:
        return default_backend(self.head.query, self.pool.num_experts, len(flat), flat.dtype, flat.device)

    def mix(self, x: Tensor, routing: Routing) -> Tensor:
        """What the routed heads give together, by a routing of x: (..., S, D) -> (..., S, D), zero in padding."""
        return combine(self.compute(x, routing), routing).view(x.shape)

    def expert_output(self, expert_id: int, x: Tensor) -> Tensor:
        """One head's own output for every token of x, whatever the router says: (..., S, D) -> (..., S, D)."""
        rows = self.pool.namespace("expert", [expert_id])
        group = Group((expert_id,), (0,), False, {name: rows[name] for name in rows})
        only = torch.zeros(x.shape[:-1].numel(), dtype=torch.int64, device=x.device)
        routing = Routing.assigned(only, 1, x.dtype)
        return self._heads(x, routing, [group], "reference").view(x.shape)

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What all heads share: the keys and the values (..., S, H) of x (..., S, D)."""
        return self.key(x), self.value(x)

    def freeze(self, ids: Sequence[int] | None = None) -> None:
        """Freeze heads; without ids all of them, and the keys and values, and the parts that the router shares."""
        super().freeze(ids)
        if ids is None:
            for shared in (self.key, self.value):
                shared.requires_grad_(False)
                shared.zero_grad(set_to_none=True)  # an optimizer would still apply what is left there

    def _heads(self, x: Tensor, routing: Routing, groups: Sequence[Group], backend: str) -> Tensor:
        """(..., S, D) -> (N, D): queries by a kernel, attention, outputs by a kernel."""
        if x.dim() < 2:
            raise ValueError(f"sequences (..., S, {self.head.in_features}) are needed, got {tuple(x.shape)}")
        length, k = x.shape[-2], routing.choices.shape[1]
        num_sequences = x.shape[:-2].numel()
        flat = x.reshape(-1, x.shape[-1])
        queries = compute_assignments(groups, self.head.query, flat, routing, backend)
        keys, values = self.prepare(x.reshape(num_sequences, length, x.shape[-1]))
        visible = _visible(routing.mask, num_sequences, length, self.causal, x.device)
        context = attend(queries.view(num_sequences, length, k, queries.shape[1]), keys, values, visible).flatten(0, 2)
        # from here on an assignment reads its own context in place of its token
        places = torch.arange(len(context), device=x.device)
        return compute_assignments(groups, self.head.output, context, replace(routing, token_index=places), backend)


def why_not_causal(router: Router) -> str | None:
    """Why a causal layer cannot use the router; None if it can."""
    return None if router.causal else f"causal attention needs a causal router, {type(router).__name__} looks ahead"


def attend(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """softmax(q_tk K^T / sqrt(H)) V over what token t may see.

    Args:
        queries: (B, S, K, H), several for each token.
        keys: (B, S, H).
        values: (B, S, H).
        visible: (B or 1, S, S) bool, [b, t, s] True where token t sees token s; at least one for each t.
    Returns:
        (B, S, K, H).
    """
    # In plain operations, not scaled_dot_product_attention, whose fused kernels have no second derivative.
    logits = torch.einsum("btkh,bsh->btks", queries, keys) / queries.shape[-1] ** 0.5
    weights = logits.masked_fill(~visible.unsqueeze(2), -torch.inf).softmax(-1)
    return torch.einsum("btks,bsh->btkh", weights.to(values.dtype), values)


def _visible(mask: Tensor | None, num_sequences: int, length: int, causal: bool, device: torch.device) -> Tensor:
    visible = torch.ones(1, length, length, dtype=torch.bool, device=device)
    if causal:
        visible = visible.tril()
    if mask is not None:
        itself = torch.eye(length, dtype=torch.bool, device=device)  # padding too sees something: no row is empty
        visible = visible & (mask.view(num_sequences, 1, length) | itself)
    return visible
