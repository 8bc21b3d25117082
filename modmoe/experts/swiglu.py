"""The gated MLP expert of Mixtral, Qwen and DeepSeek."""

import torch.nn.functional as F

from modmoe.experts.base import Expert, TwoLayers, silu_gradient
from modmoe.growable import Init, RowSpec


class SwiGLUExpert(Expert):
    """(silu(x W_gate) * (x W_in)) W_out, with biases b_gate, b_in and b_out only where they are asked for.

    Args:
        in_features: D.
        hidden_features: H; may differ between cohorts (``pool.add_experts(hidden_features=64)``).
        out_features: None for D.
        bias: True for a bias after each of the three products.
    Raises:
        ValueError: on a size below 1.
    Source:
        Shazeer 2020, GLU variants improve transformer (FFN_SwiGLU with beta = 1); without biases in Jiang et al. 2024
        (Mixtral), whose w1, w3 and w2 are W_gate, W_in and W_out, transposed.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int | None = None, bias: bool = False):
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.out_features = in_features if out_features is None else out_features
        self.bias = bias
        if min(self.in_features, self.hidden_features, self.out_features) < 1:
            raise ValueError(f"every size of an expert must be at least 1: {self}")

    def __repr__(self) -> str:
        return f"SwiGLUExpert({self.in_features}, {self.hidden_features}, {self.out_features}, bias={self.bias})"

    @property
    def output_rows(self) -> tuple[str, ...]:
        return ("w_out", "b_out") if self.bias else ("w_out",)

    def sizes(self) -> dict[str, int]:
        return {"hidden_features": self.hidden_features}

    def row_specs(self) -> dict[str, RowSpec]:
        fan_in, fan_hidden = Init("uniform", self.in_features), Init("uniform", "hidden_features")
        specs = {
            "w_gate": RowSpec((self.in_features, "hidden_features"), fan_in),
            "w_in": RowSpec((self.in_features, "hidden_features"), fan_in),
            "w_out": RowSpec(("hidden_features", self.out_features), fan_hidden),
        }
        if self.bias:
            specs["b_gate"] = RowSpec(("hidden_features",), fan_in)
            specs["b_in"] = RowSpec(("hidden_features",), fan_in)
            specs["b_out"] = RowSpec((self.out_features,), fan_hidden)
        return specs

    def two_layers(self) -> TwoLayers:
        b_gate, b_in, b_out = ("b_gate", "b_in", "b_out") if self.bias else (None, None, None)
        return TwoLayers(
            inner=(("w_gate", b_gate), ("w_in", b_in)),
            outer=("w_out", b_out),
            activate=lambda gate, x: F.silu(gate) * x,
            gradient=lambda grad, gate, x: (silu_gradient(grad * x, gate), grad * F.silu(gate)),
        )
