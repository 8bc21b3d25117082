"""The feature map of an evidence-gated expert."""

import torch
from torch import Tensor

from modmoe.experts.base import Expert, ExpertOps
from modmoe.growable import Init, RowSpec

FIRST_LAYER_STD = 1.15  # kinks of the first layer all over inputs of about unit size


class FeatureMapExpert(Expert):
    """phi(x) = tanh(relu(relu(x W_in + b_in) W_hidden + b_hidden) W_out + b_out): bounded features, no last layer.

    The features are bounded so that the prior over functions has a bounded variance wherever x lies.

    Args:
        in_features: D.
        hidden_features: H of both hidden layers; may differ between cohorts.
        num_features: F.
    Raises:
        ValueError: on a size below 1.
    """

    def __init__(self, in_features: int, hidden_features: int, num_features: int):
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.out_features = num_features
        if min(in_features, hidden_features, num_features) < 1:
            raise ValueError(f"every size of an expert must be at least 1: {self}")

    def __repr__(self) -> str:
        return f"FeatureMapExpert({self.in_features}, {self.hidden_features}, {self.out_features})"

    def sizes(self) -> dict[str, int]:
        return {"hidden_features": self.hidden_features}

    def row_specs(self) -> dict[str, RowSpec]:
        # a layer keeps the size of its input: variance 1 / H (2 / H would saturate the tanh)
        keep = Init("normal", std=self.hidden_features**-0.5)
        first = Init("normal", std=FIRST_LAYER_STD * self.in_features**-0.5)
        return {
            "w_in": RowSpec((self.in_features, "hidden_features"), first),
            "b_in": RowSpec(("hidden_features",), Init("normal", std=FIRST_LAYER_STD)),
            "w_hidden": RowSpec(("hidden_features", "hidden_features"), keep),
            "b_hidden": RowSpec(("hidden_features",)),
            "w_out": RowSpec(("hidden_features", self.out_features), keep),
            "b_out": RowSpec((self.out_features,)),
        }

    def compute(self, x: Tensor, ops: ExpertOps) -> Tensor:
        hidden = torch.relu(ops.linear(x, "w_in", "b_in"))
        hidden = torch.relu(ops.linear(hidden, "w_hidden", "b_hidden"))
        return torch.tanh(ops.linear(hidden, "w_out", "b_out"))
