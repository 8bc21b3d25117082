"""The expert of one layer, which the multi-task papers use."""

from torch import Tensor

from modmoe.experts.base import ACTIVATIONS, Expert, ExpertOps, check_activation
from modmoe.growable import Init, RowSpec


class LayerExpert(Expert):
    """act(x W + b).

    Args:
        in_features: D.
        out_features: H, the paper's number of hidden units.
        activation: one of "gelu", "gelu_tanh", "relu", "silu", "tanh".
    Raises:
        ValueError: on a size below 1 or an unknown activation.
    Source:
        Ma et al. 2018 (MMoE): each expert of their synthetic experiments is a single layer with ReLU.
    """

    def __init__(self, in_features: int, out_features: int, activation: str = "relu"):
        if min(in_features, out_features) < 1:
            raise ValueError(f"every size of an expert must be at least 1, got {in_features} and {out_features}")
        check_activation(activation)
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation

    def __repr__(self) -> str:
        return f"LayerExpert({self.in_features}, {self.out_features})"

    @property
    def output_rows(self) -> tuple[str, ...]:
        return ("weight", "bias")  # every activation is 0 at 0

    def sizes(self) -> dict[str, int]:
        return {}  # all experts of a pool give equally many features

    def row_specs(self) -> dict[str, RowSpec]:
        init = Init("uniform", self.in_features)
        return {
            "weight": RowSpec((self.in_features, self.out_features), init),
            "bias": RowSpec((self.out_features,), init),
        }

    def compute(self, x: Tensor, ops: ExpertOps) -> Tensor:
        return ACTIVATIONS[self.activation](ops.linear(x, "weight", "bias"))
