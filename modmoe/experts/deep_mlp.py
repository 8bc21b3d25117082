"""Networks of any depth."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from modmoe.experts.base import ACTIVATIONS, Expert, ExpertOps, check_activation
from modmoe.growable import Init, RowSpec


class DeepMLPExpert(Expert):
    """Hidden layers with an activation each, then a linear output; drawn about as wide as SB3's orthogonal weights.

    Args:
        in_features: D.
        hidden_features: H of each hidden layer, at least one.
        out_features: D_out.
        activation: as of ``MLPExpert``.
    Raises:
        ValueError: on no hidden layer, a size below 1 or an unknown activation.
    """

    def __init__(self, in_features: int, hidden_features: Sequence[int], out_features: int, activation: str = "tanh"):
        self.in_features = in_features
        self.hidden_features = tuple(hidden_features)
        self.out_features = out_features
        self.activation = activation
        if not self.hidden_features or min(in_features, out_features, *self.hidden_features) < 1:
            raise ValueError(f"at least one hidden layer, and sizes of at least 1, are needed: {self}")
        check_activation(activation)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_features}, {list(self.hidden_features)}, {self.out_features})"

    @property
    def output_rows(self) -> tuple[str, ...]:
        return ("w_out", "b_out")

    def sizes(self) -> dict[str, int]:
        return {}

    def row_specs(self) -> dict[str, RowSpec]:
        widths = (self.in_features, *self.hidden_features)
        specs = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
            # an orthogonal matrix times sqrt(2) has entries of about this size
            specs[f"w_{layer}"] = RowSpec((fan_in, fan_out), Init("normal", std=(2 / max(fan_in, fan_out)) ** 0.5))
            specs[f"b_{layer}"] = RowSpec((fan_out,))
        specs["w_out"] = RowSpec((widths[-1], self.out_features), Init("uniform", widths[-1]))
        specs["b_out"] = RowSpec((self.out_features,))
        return specs

    def compute(self, x: Tensor, ops: ExpertOps) -> Tensor:
        activate = ACTIVATIONS[self.activation]
        for layer in range(len(self.hidden_features)):
            x = activate(ops.linear(x, f"w_{layer}", f"b_{layer}"))
        return ops.linear(x, "w_out", "b_out")
