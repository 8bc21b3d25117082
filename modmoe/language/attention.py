"""Causal attention with rotary positions and a cache: ordinary heads, and heads that are experts."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modmoe.attention import MoAttention, attend
from modmoe.kernels.select import combine, compute_assignments


@dataclass
class BlockCache:
    """What one block has computed of the tokens before: keys and values (..., P, H), and inputs (B, P, D)."""

    keys: Tensor | None = None
    values: Tensor | None = None
    inputs: Tensor | None = None


@dataclass
class Cache:
    """What a model has computed of the tokens before; an empty one is filled by the first call.

    Args:
        blocks: one entry for each block.
        mask: (B, P) bool, True for real tokens; None before the first call.
    """

    blocks: list[BlockCache] = field(default_factory=list)
    mask: Tensor | None = None

    @property
    def length(self) -> int:
        """P: tokens it holds of each sequence, padding included."""
        return 0 if self.mask is None else self.mask.shape[1]


@dataclass(frozen=True)
class Step:
    """What all blocks are told in one call.

    Args:
        mask: (B, S) bool, True for real tokens; None for all.
        whole_mask: (B, P + S) bool, with the P tokens of the cache; None for all.
        visible: (B, S, P + S) bool, who sees whom; None for plain causal attention without a cache.
        positions: (B or 1, S) int64, where each token stands in its sequence.
        theta: base of the rotary angles; None without rotary positions.
        domains: (B, S) int64, see DomainRouter; None where they are unknown or not needed.
    """

    mask: Tensor | None
    whole_mask: Tensor | None
    visible: Tensor | None
    positions: Tensor
    theta: float | None
    domains: Tensor | None


class CausalAttention(nn.Module):
    """softmax(Q K^T / sqrt(H)) V W_o over the token itself and those before it, with h heads of size H = D / h.

    Args:
        features: D.
        num_heads: h, a divisor of D.
        num_kv_heads: heads of keys and values, a divisor of h; None for h.
    Raises:
        ValueError: on sizes that do not divide, or an odd H.
    Source:
        Vaswani et al. 2017; Su et al. 2021 (rotary positions, in the layout of transformers, which rotates halves);
        Ainslie et al. 2023 (grouped keys and values).
    """

    def __init__(self, features: int, num_heads: int, num_kv_heads: int | None = None):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or features % (2 * num_heads):
            raise ValueError(f"{num_heads} heads of an even size are needed, {features} features give none")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide the {num_heads} heads, got {num_kv_heads}")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_features = features // num_heads
        width = num_kv_heads * self.head_features
        self.q_proj = nn.Linear(features, features, bias=False)
        self.k_proj = nn.Linear(features, width, bias=False)
        self.v_proj = nn.Linear(features, width, bias=False)
        self.o_proj = nn.Linear(features, features, bias=False)

    def forward(self, x: Tensor, step: Step, cache: BlockCache | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D); the cache, if there is one, takes the keys and values in."""
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if step.theta is not None:
            cos, sin = (part.unsqueeze(1) for part in rotation(step.positions, self.head_features, step.theta, x.dtype))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = extend(cache, k, v)
        repeats = self.num_heads // self.num_kv_heads
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        visible = None if step.visible is None else step.visible.unsqueeze(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_features)).transpose(1, 2)


class HeadMixture(MoAttention):
    """:class:`modmoe.MoAttention` in a language model: causal, with rotary positions and a cache."""

    def forward(self, x: Tensor, step: Step, cache: BlockCache | None = None) -> Tensor:  # type: ignore[override]
        """(B, S, D) -> (B, S, D); the cache, if there is one, takes the keys and values in."""
        routing = self.route(x, step.mask)
        num_sequences, length, _ = x.shape
        groups = [group.to(x.dtype) for group in self.pool.groups()]
        queries = compute_assignments(groups, self.head.query, self._tokens(x, routing), routing, self.backend)
        queries = queries.view(num_sequences, length, -1, self.head.head_features)
        keys, values = self.prepare(x)
        if step.theta is not None:
            cos, sin = rotation(step.positions, self.head.head_features, step.theta, x.dtype)
            queries, keys = rotate(queries, cos.unsqueeze(2), sin.unsqueeze(2)), rotate(keys, cos, sin)
        if cache is not None:
            keys, values = extend(cache, keys, values)
        visible = step.visible
        if visible is None:
            visible = torch.ones(1, length, length, dtype=torch.bool, device=x.device).tril()
        context = attend(queries, keys, values, visible).flatten(0, 2)
        # from here on an assignment reads its own context in place of its token
        places = torch.arange(len(context), device=x.device)
        outputs = compute_assignments(
            groups, self.head.output, context, replace(routing, token_index=places), self.backend
        )
        return combine(outputs, routing).view(x.shape)


def extend(cache: BlockCache, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """All keys and values (..., P + S, H) with the new ones (..., S, H), which the cache takes in."""
    if cache.keys is not None and cache.values is not None:
        keys, values = torch.cat([cache.keys, keys], -2), torch.cat([cache.values, values], -2)
    cache.keys, cache.values = keys, values
    return keys, values


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + H/2}) of x (..., S, H) by their angles."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def rotation(positions: Tensor, head_features: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (..., S, H) of the angles p theta^(-2 i / H) for positions p (..., S); i and i + H/2 share one."""
    exponents = torch.arange(0, head_features, 2, device=positions.device, dtype=torch.float32) / head_features
    angles = positions.unsqueeze(-1).float() * theta**-exponents
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
