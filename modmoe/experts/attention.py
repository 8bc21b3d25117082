"""Attention heads as experts; :class:`modmoe.MoAttention` gives them the keys and values that all of them share."""

from torch import Tensor

from modmoe.experts.base import Expert, ExpertOps
from modmoe.growable import Init, RowSpec


class Projection(Expert):
    """x W with the rows of one name: a part of an expert that a kernel can run by itself.

    Args:
        name: of the rows (in_features, out_features).
        in_features: size of the input.
        out_features: size of the output.
    """

    def __init__(self, name: str, in_features: int, out_features: int):
        self.name = name
        self.in_features = in_features
        self.out_features = out_features

    @property
    def output_rows(self) -> tuple[str, ...]:
        return (self.name,)

    def sizes(self) -> dict[str, int]:
        return {}

    def row_specs(self) -> dict[str, RowSpec]:
        return {self.name: RowSpec((self.in_features, self.out_features), Init("uniform", self.in_features))}

    def compute(self, x: Tensor, ops: ExpertOps) -> Tensor:
        return ops.linear(x, self.name)


class AttentionExpert(Expert):
    """One attention head: softmax(x W_q K^T / sqrt(H)) V W_o, with keys K and values V that are not its own.

    What it owns are W_q and W_o, two projections with the attention between them. A backend computes each assignment
    by itself and so cannot run the whole head: :class:`modmoe.MoAttention` runs ``query``, attends, and runs
    ``output``.

    Args:
        in_features: D; the output has the same size.
        head_features: H, the size of queries, keys and values.
    Raises:
        ValueError: on a size below 1.
    Source:
        Zhang et al. 2022, mixture of attention heads (MoA).
    """

    needs_sequence = True

    def __init__(self, in_features: int, head_features: int):
        if min(in_features, head_features) < 1:
            raise ValueError(f"every size of an expert must be at least 1, got {in_features} and {head_features}")
        self.in_features = self.out_features = in_features
        self.head_features = head_features
        self.query = Projection("w_query", in_features, head_features)
        self.output = Projection("w_output", head_features, in_features)

    def __repr__(self) -> str:
        return f"AttentionExpert({self.in_features}, {self.head_features})"

    @property
    def output_rows(self) -> tuple[str, ...]:
        return self.output.output_rows

    def sizes(self) -> dict[str, int]:
        return {}

    def row_specs(self) -> dict[str, RowSpec]:
        return self.query.row_specs() | self.output.row_specs()

    def compute(self, x: Tensor, ops: ExpertOps) -> Tensor:
        """Refuse: a head needs its sequence.

        Raises:
            ValueError: always.
        """
        raise ValueError("an attention head needs the keys and values of its sequence: use MoAttention for MoELayer")
