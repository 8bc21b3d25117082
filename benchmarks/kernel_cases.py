"""The cases of the kernel benchmark: sizes, and routings that are the same in every run."""

import re
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from modmoe import Routing

SEQUENCE = 128  # tokens of one sequence, where an arm computes sequences
ZIPF_RATIO = 15.0  # the largest load over the mean
LARGE = 3 * 10**8  # multiplications of one product in the forward pass
EMPTY_EVERY = 4  # in the cases "empty", each fourth expert gets nothing

PATTERN = re.compile(
    r"(?P<tokens>\d+),(?P<d>\d+),(?P<h>\d+),(?P<experts>\d+),(?P<k>\d+)"
    r"(,(?P<kind>zipf|empty|frozen|cohorts)(?P<amount>\d*))?(?P<bf16>,bf16)?"
)


@dataclass(frozen=True)
class Case:
    """One case.

    Args:
        name: T,d,h,E,k in numbers, then nothing (loads equal to within one), or ``,zipf``, ``,empty``,
            ``,frozen<percent>`` or ``,cohorts<number>``; then ``,bf16`` for a case on a GPU.
    Raises:
        ValueError: on any other name.
    """

    name: str

    def __post_init__(self) -> None:
        if PATTERN.fullmatch(self.name) is None or (self.kind in ("frozen", "cohorts") and not self.amount):
            raise ValueError(f"'{self.name}' is no T,d,h,E,k with ,zipf or ,empty or ,frozen90 or ,cohorts64")

    @cached_property
    def parts(self) -> dict[str, str | None]:
        match = PATTERN.fullmatch(self.name)
        return match.groupdict() if match else {}

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """T, d, h, E, k."""
        tokens, d, h, experts, k = (int(self.parts[name] or 0) for name in ("tokens", "d", "h", "experts", "k"))
        return tokens, d, h, experts, k

    @property
    def kind(self) -> str:
        """ "" for balanced loads with nothing frozen and one cohort, or "zipf", "empty", "frozen" or "cohorts"."""
        return self.parts["kind"] or ""

    @property
    def amount(self) -> int:
        """The percentage of frozen experts, or the number of cohorts."""
        return int(self.parts["amount"] or 0)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.parts["bf16"] else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.parts["bf16"] else torch.float32

    @property
    def is_large(self) -> bool:
        """Whether arms that compute more than is asked for are left out: minutes, for what smaller cases show."""
        tokens, d, h, _, k = self.sizes
        return tokens * k * d * h > LARGE

    @property
    def sequence(self) -> tuple[int, int]:
        """B, S with B S = T."""
        tokens = self.sizes[0]
        length = min(tokens, SEQUENCE)
        return (tokens // length, length) if tokens % length == 0 else (1, tokens)

    def choices(self) -> Tensor:
        """(T, K) int64: the experts of each token, all different."""
        tokens, _, _, experts, k = self.sizes
        generator = torch.Generator().manual_seed(0)
        if self.kind == "zipf":
            loads = zipf_loads(tokens * k, experts, tokens, ZIPF_RATIO)
            # runs no longer than T, column by column: no token meets an expert twice
            chosen = torch.repeat_interleave(torch.arange(experts), torch.tensor(loads)).view(k, tokens).t()
            return chosen[torch.randperm(tokens, generator=generator)]
        return balanced_choices(self, generator, EMPTY_EVERY if self.kind == "empty" else 0)

    def balanced(self) -> Tensor:
        """(T, K) int64: as :meth:`choices`, with loads equal to within one in each sequence."""
        return balanced_choices(self, torch.Generator().manual_seed(0))


def balanced_choices(case: Case, generator: torch.Generator, empty_every: int = 0) -> Tensor:
    """(T, K) int64: experts dealt out in turn, then each sequence's tokens shuffled."""
    tokens, _, _, experts, k = case.sizes
    open_experts = torch.tensor([e for e in range(experts) if not empty_every or e % empty_every])
    dealt = open_experts[torch.arange(tokens * k) % len(open_experts)].view(tokens, k)
    num_sequences, length = case.sequence
    order = [torch.randperm(length, generator=generator) + number * length for number in range(num_sequences)]
    return dealt[torch.cat(order)]


def zipf_loads(total: int, num_experts: int, largest: int, ratio: float) -> list[int]:
    """Loads proportional to rank^-s, with s such that the largest is ``ratio`` times the mean.

    Args:
        total: what they add up to.
        num_experts: E.
        largest: none may be larger.
        ratio: see above.
    Raises:
        ValueError: if the ratio would need a larger load.
    """
    top = round(ratio * total / num_experts)
    if top > largest:
        raise ValueError(f"a load of {top} is needed, and one expert takes at most {largest} tokens")
    low, high = 0.0, 50.0
    for _ in range(100):
        s = (low + high) / 2
        share = 1 / sum(rank**-s for rank in range(1, num_experts + 1))
        low, high = (s, high) if share * num_experts < ratio else (low, s)
    weights = [rank**-high for rank in range(1, num_experts + 1)]
    ends, seen = [], 0.0
    for weight in weights:
        seen += weight
        ends.append(round(total * seen / sum(weights)))
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def routing_of(choices: Tensor, weight: Tensor, num_experts: int) -> Routing:
    """The record of given choices.

    Args:
        choices: (T, K) int64.
        weight: (N,) the combine weights; may be a leaf that needs a gradient.
        num_experts: E.
    """
    tokens, k = choices.shape
    scores = weight.new_zeros(tokens, num_experts)
    return Routing(
        token_index=torch.arange(tokens, device=choices.device).repeat_interleave(k),
        expert_index=choices.reshape(-1),
        weight=weight,
        num_tokens=tokens,
        num_experts=num_experts,
        logits=scores,
        probs=scores,
        top_k=k,
        has_drops=False,
    )
