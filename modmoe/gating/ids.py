"""Routers that look at token ids only, by hashing."""

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.gating.base import Router, require_served
from modmoe.growable import GrowableBuffer, Init, RowSpec
from modmoe.pool import ExpertPool
from modmoe.rows import Rows

MIX = 0x45D9F3B  # an odd 27-bit multiplier: its product with 32 bits fits int64
LOW = 0xFFFFFFFF
BY_ID = -1  # the group of an expert that was given none: its stable id modulo the number of groups


class HashRouter(Router):
    """A token id always goes to the same expert, with weight 1: argmax over the open experts e of hash(id, e).

    Rendezvous hashing over the experts' stable ids: an expert that is added takes over about 1/E of the token ids, the
    same share of each older expert, and no id moves between older experts; ids of a removed expert are spread over
    those left. To keep an older token's expert for ever, close the newer ones to it (a task or an ``expert_mask``).
    Nothing is trained.

    Args:
        in_features: D.
        seed: another seed, another hash.
    Raises:
        ValueError: on a negative seed.
    Source:
        Roller et al. 2021, random hash. Theirs is a table over a fixed set of experts; rendezvous hashing (Thaler and
        Ravishankar 1998) is defined on a growing one.
    """

    needs_ids = "token"

    def __init__(self, in_features: int, seed: int = 0):
        super().__init__()
        if seed < 0:
            raise ValueError(f"a seed of at least 0 is needed, got {seed}")
        self.in_features = in_features
        self.seed = seed

    def row_specs(self) -> dict[str, RowSpec]:
        return {}

    @property
    def weight_sum(self) -> str:
        return "1"

    def num_active(self, num_experts: int) -> int:
        return 1

    def check_pool(self, num_experts: int, top_k: int | None = None) -> None:
        if top_k not in (None, 1):
            raise ValueError(f"a hash gives each token one expert, got top_k={top_k}")

    def score(self, x: Tensor, rows: Rows) -> Tensor:
        raise ValueError(f"{type(self).__name__} scores ids and not features: see scores")

    def scores(self, x: Tensor, rows: Rows, ids: Tensor | None) -> Tensor:
        assert ids is not None  # check_ids
        return refuse_non_finite(x, hash_scores(ids, rows.ids, self.seed))

    def select(
        self, logits: Tensor, allowed: Tensor | None, top_k: int | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        choices = logits.argmax(1)
        probs = F.one_hot(choices, logits.shape[1]).to(logits.dtype)
        return choices.unsqueeze(1), probs.new_ones(len(choices), 1), probs


class GroupedRandomRouter(HashRouter):
    """Two levels without training: the domain names a group of experts, the token id an expert in it, with weight 1.

    ``ids`` hold both: ``router.pack(domains, tokens)``. Domain d uses group d. An expert belongs to the group of its
    stable id modulo the number of groups, until :meth:`assign_group` says otherwise: growth moves no expert between
    groups, and only the group that receives an expert gives ids to it (see :class:`HashRouter`).

    Args:
        in_features: D.
        num_groups: how many groups, one for each domain.
        vocab_size: token ids lie in [0, vocab_size).
        seed: another seed, another table.
    Raises:
        ValueError: on a size below 1 or a negative seed; in a call, where a token's group has no open expert.
    Source:
        Ren et al. 2023 (PanGu-Sigma), random routed experts. Theirs stores a table that gives each expert the same
        number of token ids; this one is a hash, even in expectation, and defined on a growing pool.
    """

    def __init__(self, in_features: int, num_groups: int, vocab_size: int, seed: int = 0):
        super().__init__(in_features, seed)
        if min(num_groups, vocab_size) < 1:
            raise ValueError(f"num_groups and vocab_size must be at least 1, got {num_groups} and {vocab_size}")
        self.num_groups = num_groups
        self.vocab_size = vocab_size

    def row_specs(self) -> dict[str, RowSpec]:
        return {"group": RowSpec((), Init("constant", value=BY_ID), trainable=False, dtype=torch.int64)}

    def pack(self, domains: Tensor, tokens: Tensor) -> Tensor:
        """One id for a domain in [0, num_groups) and a token id in [0, vocab_size), of one shape.

        Raises:
            ValueError: on an id out of its range.
        """
        for name, ids, end in (("domain", domains, self.num_groups), ("token", tokens, self.vocab_size)):
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < end:
                raise ValueError(f"{name} ids in [0, {end}) are needed, got {int(ids.min())} to {int(ids.max())}")
        return domains * self.vocab_size + tokens

    def assign_group(self, pool: ExpertPool, namespace: str, expert_id: int, group: int) -> None:
        """Put a live expert into a group.

        Raises:
            ValueError: on a group out of [0, num_groups), or a frozen expert.
        """
        if not 0 <= group < self.num_groups:
            raise ValueError(f"a group in [0, {self.num_groups}) is needed, got {group}")
        write_row(pool, namespace, "group", expert_id, group)

    def scores(self, x: Tensor, rows: Rows, ids: Tensor | None) -> Tensor:
        assert ids is not None  # check_ids
        own = torch.tensor(rows.ids, device=x.device) % self.num_groups
        groups = torch.where(rows["group"] == BY_ID, own, rows["group"])
        inside = groups == torch.div(ids, self.vocab_size, rounding_mode="floor").unsqueeze(1)
        scores = hash_scores(ids % self.vocab_size, rows.ids, self.seed)
        return refuse_non_finite(x, torch.where(inside, scores, scores.new_full((), -1.0)))

    def select(
        self, logits: Tensor, allowed: Tensor | None, top_k: int | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        # scores lie in [0, 1) inside the token's group and are -1 outside; padding has 0 everywhere
        require_served(logits.amax(1) >= 0, "the group has no open expert")
        return super().select(logits, allowed, top_k, rows)


def hash_scores(ids: Tensor, expert_ids: tuple[int, ...], seed: int) -> Tensor:
    """(T, E) float32 in [0, 1): a fixed random number for each pair of a token id and an expert's stable id.

    Args:
        ids: (T,) integers.
        expert_ids: the stable ids.
        seed: at least 0.
    """
    ids = ids.to(torch.int64)
    experts = torch.tensor(expert_ids, dtype=torch.int64, device=ids.device)
    start = mix_bits(torch.tensor(seed, dtype=torch.int64, device=ids.device) + 1)
    tokens = mix_bits(mix_bits((ids & LOW) ^ start) ^ ((ids >> 32) & LOW))
    tokens = tokens.unsqueeze(1)
    pairs = mix_bits(mix_bits(tokens ^ mix_bits(experts ^ (start + 1))) + tokens)
    return (pairs >> 8).float() / 2**24  # 24 bits are exact in float32


def mix_bits(bits: Tensor) -> Tensor:
    """32 bits (as int64) to 32 bits, one to one, each of the input's bits moving about half of the output's."""
    bits = bits & LOW
    for _ in range(2):
        bits = ((bits ^ (bits >> 16)) * MIX) & LOW
    return bits ^ (bits >> 16)


def refuse_non_finite(x: Tensor, scores: Tensor) -> Tensor:
    """Scores that look at ids are NaN where x (T, D) is not finite, so that the router's check finds it."""
    return torch.where(torch.isfinite(x).all(1, keepdim=True), scores, torch.nan)


def write_row(pool: ExpertPool, namespace: str, name: str, expert_id: int, value: float) -> None:
    """Overwrite a live expert's one row (a number) of a buffer.

    Raises:
        ValueError: on an unknown or frozen expert.
    """
    pool.record(expert_id)
    growable = pool.growable(namespace, name)
    assert isinstance(growable, GrowableBuffer)
    growable.write(expert_id, torch.tensor([value], dtype=growable.like.dtype, device=growable.like.device))
