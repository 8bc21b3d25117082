"""The two-layer MLP expert."""

from modmoe.experts.base import ACTIVATION_GRADIENTS, ACTIVATIONS, Expert, TwoLayers, check_activation
from modmoe.growable import Init, RowSpec


class MLPExpert(Expert):
    """act(x W_in + b_in) W_out + b_out, with biases unless they are refused.

    Args:
        in_features: D.
        hidden_features: H; may differ between cohorts (``pool.add_experts(hidden_features=64)``).
        out_features: None for D.
        activation: one of "gelu", "gelu_tanh" (the approximation of GPT-2), "relu", "silu", "tanh".
        bias: False for neither b_in nor b_out.
    Raises:
        ValueError: on a size below 1 or an unknown activation.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
    ):
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.out_features = in_features if out_features is None else out_features
        if min(self.in_features, self.hidden_features, self.out_features) < 1:
            raise ValueError(f"every size of an expert must be at least 1: {self}")
        check_activation(activation)
        self.activation = activation
        self.bias = bias

    def __repr__(self) -> str:
        return f"MLPExpert({self.in_features}, {self.hidden_features}, {self.out_features})"

    @property
    def output_rows(self) -> tuple[str, ...]:
        return ("w_out", "b_out") if self.bias else ("w_out",)

    def sizes(self) -> dict[str, int]:
        return {"hidden_features": self.hidden_features}

    def row_specs(self) -> dict[str, RowSpec]:
        fan_in, fan_hidden = Init("uniform", self.in_features), Init("uniform", "hidden_features")
        specs = {
            "w_in": RowSpec((self.in_features, "hidden_features"), fan_in),
            "b_in": RowSpec(("hidden_features",), fan_in),
            "w_out": RowSpec(("hidden_features", self.out_features), fan_hidden),
            "b_out": RowSpec((self.out_features,), fan_hidden),
        }
        return {name: spec for name, spec in specs.items() if self.bias or name.startswith("w_")}

    def two_layers(self) -> TwoLayers:
        gradient = ACTIVATION_GRADIENTS[self.activation]
        return TwoLayers(
            inner=(("w_in", "b_in" if self.bias else None),),
            outer=("w_out", "b_out" if self.bias else None),
            activate=ACTIVATIONS[self.activation],
            gradient=lambda grad, x: (gradient(grad, x),),
        )
