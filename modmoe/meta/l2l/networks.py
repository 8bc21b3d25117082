"""Small networks with weights of their own for every task: what an inner loop batched over tasks adapts."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from modmoe.experts.deep_mlp import DeepMLPExpert
from modmoe.growable import Init, RowSpec


class RegressionNetwork(DeepMLPExpert):
    """A multilayer perceptron for functions of few inputs.

    The first layer's weights and biases are drawn with a standard deviation of ``spread``, so that the kinks of a ReLU
    lie all over [-1, 1]; those of the others with 1/sqrt(fan in).

    Args:
        in_features: D.
        hidden_features: H of each hidden layer, at least one.
        out_features: M.
        activation: as of ``MLPExpert``.
        spread: of the first layer, > 0.
    Raises:
        ValueError: on no hidden layer, a size below 1, a spread of 0 or below, or an unknown activation.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sequence[int] = (40, 40),
        out_features: int = 1,
        activation: str = "relu",
        spread: float = 1.15,
    ):
        super().__init__(in_features, hidden_features, out_features, activation)
        self.spread = spread
        if spread <= 0:
            raise ValueError(f"the spread of the first layer must be above 0, got {spread}")

    def row_specs(self) -> dict[str, RowSpec]:
        widths = (self.in_features, *self.hidden_features)
        specs = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
            first = Init("normal", std=self.spread)
            specs[f"w_{layer}"] = RowSpec((fan_in, fan_out), Init("normal", std=fan_in**-0.5) if layer else first)
            specs[f"b_{layer}"] = RowSpec((fan_out,), Init("normal", std=0.05) if layer else first)
        specs["w_out"] = RowSpec((widths[-1], self.out_features), Init("normal", std=widths[-1] ** -0.5))
        specs["b_out"] = RowSpec((self.out_features,), Init("normal", std=0.05))
        return specs


class TaskOps:
    """The experts' operations where every task and expert has weights of its own.

    Args:
        weights: row name -> (B, K, ...).
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        self.weights = weights

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        """(B, 1 or K, N, D_in) -> (B, K, N, D_out)."""
        y = x @ self.weights[weight]
        return y if bias is None else y + self.weights[bias].unsqueeze(2)

    def conv2d(self, x: Tensor, weight: str, bias: str, stride: int, padding: int) -> Tensor:
        """Not offered: torch has no convolution whose kernels differ from image to image in two axes."""
        raise NotImplementedError("an inner loop batched over tasks computes linear experts, not convolutions")
