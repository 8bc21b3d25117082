"""A compact causal transformer whose feed-forward parts, or attention heads, are pools of experts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modmoe.conversion import SwiGLU
from modmoe.gating import DomainRouter
from modmoe.gating.merging import MergingRouter
from modmoe.growth import count_parameters
from modmoe.language.attention import BlockCache, Cache, CausalAttention, HeadMixture, Step
from modmoe.language.blocks import Block, Norm, make_norm
from modmoe.layer import MoELayer
from modmoe.losses import load_balancing_loss, z_loss

EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a language model, without its experts.

    Args:
        vocab_size: V.
        context: the longest sequence.
        features: D.
        num_blocks: of attention and feed-forward.
        num_heads: of ordinary attention.
        hidden_features: H of a dense SwiGLU part.
        num_kv_heads: see CausalAttention.
        norm: "rms" or "layer".
        norm_eps: of all norms.
        positions: "rotary", or "learned" embeddings that are added to the tokens'.
        rope_theta: base of the rotary angles.
    Raises:
        ValueError: on a size below 1, or unknown positions.
    """

    vocab_size: int = 256
    context: int = 128
    features: int = 64
    num_blocks: int = 4
    num_heads: int = 4
    hidden_features: int = 192
    num_kv_heads: int | None = None
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    positions: str = "rotary"
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if min(self.vocab_size, self.context, self.features, self.num_blocks, self.hidden_features) < 1:
            raise ValueError(f"every size must be at least 1: {self}")
        if self.positions not in ("rotary", "learned"):
            raise ValueError(f"positions are 'rotary' or 'learned', got '{self.positions}'")


@dataclass
class Balance:
    """What routers are told about their load, see :meth:`MoELanguageModel.auxiliary_loss`.

    Args:
        load: weight of the load-balancing loss of each layer.
        z: weight of the router z-loss of each layer.
        first_choice: count first choices only, as GShard does.
    """

    load: float = 0.0
    z: float = 0.0
    first_choice: bool = False


class MoELanguageModel(nn.Module):
    """Tokens -> logits of the next token: embedding, blocks (pre-norm), norm, and a head of its own.

    Experts grow, freeze and leave by ``modmoe.grow``, ``freeze`` and ``remove``; call ``sync_optimizer`` after.

    Args:
        size: see ModelSize.
        make_layer: -> a layer in place of the dense SwiGLU part of the blocks named in ``moe_blocks``.
        moe_blocks: numbers of blocks, counted from 0; None for all.
        make_attention: -> an attention of experts in these blocks; the feed-forward parts stay as they are then,
            unless make_layer is given too.
        balance: the auxiliary losses.
    Raises:
        ValueError: on a router that looks ahead, or a block that is not there.
    """

    def __init__(
        self,
        size: ModelSize,
        make_layer: Callable[[], nn.Module] | None = None,
        moe_blocks: Iterable[int] | None = None,
        make_attention: Callable[[], HeadMixture] | None = None,
        balance: Balance | None = None,
    ):
        super().__init__()
        chosen = set(range(size.num_blocks)) if moe_blocks is None else set(moe_blocks)
        if not chosen <= set(range(size.num_blocks)):
            raise ValueError(f"blocks {sorted(chosen)} are named, the model has 0 to {size.num_blocks - 1}")
        self.size = size
        self.balance = Balance() if balance is None else balance
        self.embedding = nn.Embedding(size.vocab_size, size.features)
        self.position = nn.Embedding(size.context, size.features) if size.positions == "learned" else None
        for table in (self.embedding, self.position):
            if table is not None:
                nn.init.normal_(table.weight, std=EMBEDDING_STD)
        blocks = []
        for number in range(size.num_blocks):
            expert = number in chosen
            attention = make_attention() if expert and make_attention is not None else None
            if attention is None:
                attention = CausalAttention(size.features, size.num_heads, size.num_kv_heads)
            feed_forward = make_layer() if expert and make_layer is not None else None
            if feed_forward is None:
                feed_forward = SwiGLU(size.features, size.hidden_features)
            blocks.append(Block(size.features, attention, feed_forward, size.norm, size.norm_eps))
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(size.norm, size.features, size.norm_eps)
        self.head = nn.Linear(size.features, size.vocab_size, bias=False)

    @property
    def layers(self) -> list[MoELayer]:
        """Every layer of experts, in order."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    # -- computing -----------------------------------------------------------------------------------------------------

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, domains: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits of the token after each.

        Args:
            tokens: (B, S) integers in [0, V).
            mask: (B, S) bool, True for real tokens; positions count these. Nobody sees the others.
            domains: (B,) integers for a DomainRouter, -1 where unknown; None where there is none.
            cache: what was computed of the P tokens before; takes these in. Empty (``Cache()``) at first.
        Returns:
            (B, S, V) float; anything in padding.
        Raises:
            ValueError: on a wrong shape or dtype, a token outside the vocabulary, or P + S beyond the context.
        """
        self._check(tokens, mask, cache)
        step = self._step(tokens, mask, domains, cache)
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position(step.positions)
        caches: list[BlockCache | None] = [None] * len(self.blocks)
        if cache is not None:
            cache.mask = step.whole_mask
            cache.blocks = cache.blocks or [BlockCache() for _ in self.blocks]
            caches = list(cache.blocks)
        for block, part in zip(self.blocks, caches, strict=True):
            x = block(x, step, part)
        return self.head(self.norm(x))

    def _check(self, tokens: Tensor, mask: Tensor | None, cache: Cache | None) -> None:
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool or not tokens.numel():
            raise ValueError(f"integer tokens of shape (B, S) are needed, got {tokens.dtype} {tuple(tokens.shape)}")
        if mask is not None and (mask.shape != tokens.shape or mask.dtype != torch.bool):
            wanted = tuple(tokens.shape)
            raise ValueError(f"a bool mask of shape {wanted} is needed, got {mask.dtype} {tuple(mask.shape)}")
        length = tokens.shape[1] + (0 if cache is None else cache.length)
        if length > self.size.context:
            raise ValueError(f"a sequence of {length} tokens is past the context of {self.size.context}")
        if not tokens.is_cuda:  # there, reading a value would wait for all that came before
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.size.vocab_size:
                raise ValueError(f"tokens lie in [0, {self.size.vocab_size}), got {low} to {high}")

    def _step(self, tokens: Tensor, mask: Tensor | None, domains: Tensor | None, cache: Cache | None) -> Step:
        """What blocks are told."""
        length, device = tokens.shape[1], tokens.device
        whole, visible = mask, None
        if cache is not None:
            whole = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
            whole = whole if cache.mask is None else torch.cat([cache.mask, whole], 1)
        positions = torch.arange(length, device=device).unsqueeze(0)
        if whole is not None:
            positions = (whole.cumsum(1) - 1).clamp(min=0)[:, -length:]
            order = torch.arange(whole.shape[1], device=device)
            itself = order == order[-length:].unsqueeze(1)  # padding too sees something: no row is empty
            visible = (order <= order[-length:].unsqueeze(1)) & (whole.unsqueeze(1) | itself)
        theta = self.size.rope_theta if self.size.positions == "rotary" else None
        if domains is not None:
            domains = domains.unsqueeze(1).expand_as(tokens)
        return Step(mask, whole, visible, positions, theta, domains)

    # -- training ------------------------------------------------------------------------------------------------------

    def loss(self, tokens: Tensor, domains: Tensor | None = None) -> Tensor:
        """The mean cross-entropy of each token but the first, in nats, and in training the auxiliary losses.

        Args:
            tokens: (B, S + 1) integers in [0, V).
            domains: as in :meth:`forward`.
        Returns:
            () float.
        """
        logits = self(tokens[:, :-1], domains=domains)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().long())
        return loss + self.auxiliary_loss() if self.training else loss

    def auxiliary_loss(self) -> Tensor:
        """The sum over layers of their load-balancing loss and z-loss, weighted, of the last call.

        It runs over the live experts: frozen ones, and layers of which all are frozen, are left out.

        Returns:
            () float.
        """
        total = self.head.weight.new_zeros(())
        for layer in self.layers:
            routing, pool = layer.routing, layer.pool
            live = torch.tensor([i not in pool.frozen_ids for i in pool.ids], device=total.device)
            if routing is None or not live.any():
                continue
            if self.balance.load:
                choices = routing.requested_choices[:, :1] if self.balance.first_choice else routing.requested_choices
                total = total + self.balance.load * load_balancing_loss(routing.probs, choices, routing.mask, live)
            if self.balance.z:
                total = total + self.balance.z * z_loss(routing.logits[:, live], routing.mask)
        return total

    def update_routers(self) -> None:
        """Let every router adjust what it keeps besides its gradients; call it after each optimizer step."""
        for layer in self.layers:
            layer.update_router()

    @torch.no_grad()
    def active_parameters(self) -> int:
        """Parameters that compute one token, the gates' included; one expert where they are merged, or domains'.

        To merge experts, all are read besides, once for each segment; a token of an unknown domain uses all of them.
        """
        active = count_parameters(self).active
        for layer in self.layers:
            if isinstance(layer.router, MergingRouter | DomainRouter):
                size = sum(tensor.numel() for group in layer.pool.groups() for tensor in group.tensors.values())
                active -= round(size * (1 - 1 / layer.pool.num_experts))
        return active
