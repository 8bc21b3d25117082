"""Low-rank updates as experts; :func:`modmoe.lora_layer` puts them beside the linear layer that they update."""

from torch import Tensor

from modmoe.experts.base import Expert, TwoLayers
from modmoe.growable import Init, RowSpec


class LoRAExpert(Expert):
    """alpha / r * x A B, with B = 0 in a new expert.

    Args:
        in_features: D.
        out_features: D_out.
        rank: r; may differ between cohorts (``pool.add_experts(rank=16)``), each is scaled by its own alpha / r.
        alpha: the numerator of the scale; None for r, a scale of 1 for experts of this description's rank.
    Raises:
        ValueError: on a size below 1, or an alpha that is not positive.
    Source:
        Hu et al. 2021 (LoRA). Their A is drawn normal; here it is uniform in +-1/sqrt(D), as in their code.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float | None = None):
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.alpha = float(rank) if alpha is None else alpha
        if min(in_features, out_features, rank) < 1 or self.alpha <= 0:
            raise ValueError(f"every size of an expert must be at least 1 and alpha positive: {self}")

    def __repr__(self) -> str:
        return f"LoRAExpert({self.in_features}, {self.out_features}, rank={self.rank}, alpha={self.alpha})"

    @property
    def output_rows(self) -> tuple[str, ...]:
        return ("b",)

    def sizes(self) -> dict[str, int]:
        return {"rank": self.rank}

    def row_specs(self) -> dict[str, RowSpec]:
        return {
            "a": RowSpec((self.in_features, "rank"), Init("uniform", self.in_features)),
            "b": RowSpec(("rank", self.out_features), Init("constant")),
        }

    def two_layers(self) -> TwoLayers:
        def scaled(low: Tensor) -> Tensor:
            return low * (self.alpha / low.shape[-1])  # the cohort's own rank, not the description's

        return TwoLayers((("a", None),), ("b", None), scaled, lambda grad, low: (scaled(grad),))
