"""Decoders: the code of a task and an input x in, the numbers of a distribution out; alone, and as experts of a pool.

Both compute relu(relu(z W_z + x W_x + b) W_mid + b_mid) W_out + b_out. The product with z is the same for all targets
of a task, so it is made once for each, and not for every point.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from modmoe.experts import Expert
from modmoe.experts.base import ExpertOps
from modmoe.growable import Init, RowSpec


class PointDecoder(nn.Module):
    """One decoder.

    Args:
        code_features: size of z.
        in_features: D.
        hidden_features: H.
        out_features: numbers that come out.
    """

    def __init__(self, code_features: int, in_features: int, hidden_features: int, out_features: int):
        super().__init__()
        self.from_code = nn.Linear(code_features, hidden_features)
        self.from_x = nn.Linear(in_features, hidden_features, bias=False)
        nn.init.normal_(self.from_x.weight, std=in_features**-0.5)  # steep enough to bend within [-1, 1]
        self.middle = nn.Linear(hidden_features, hidden_features)
        self.out = nn.Linear(hidden_features, out_features)

    def forward(self, code: Tensor, x: Tensor, extra: Tensor | None = None) -> Tensor:
        """Decode.

        Args:
            code: (S, B, code_features).
            x: (B, N, D).
            extra: (B, N, H), added to the first layer; or None.
        Returns:
            (S, B, N, out_features).
        """
        at_points = self.from_x(x) if extra is None else self.from_x(x) + extra
        hidden = F.relu(self.from_code(code).unsqueeze(2) + at_points)
        return self.out(F.relu(self.middle(hidden)))


class DecoderExpert(Expert):
    """A decoder as an expert: the input is (z, x), side by side.

    Args:
        code_features: size of z.
        point_features: D, of x.
        hidden_features: H; may differ between cohorts.
        out_features: numbers that come out.
    Raises:
        ValueError: on a size below 1.
    """

    def __init__(self, code_features: int, point_features: int, hidden_features: int, out_features: int):
        self.code_features, self.point_features = code_features, point_features
        self.in_features = code_features + point_features
        self.hidden_features, self.out_features = hidden_features, out_features
        if min(code_features, point_features, hidden_features, out_features) < 1:
            raise ValueError(f"every size of a decoder must be at least 1: {self}")

    def __repr__(self) -> str:
        sizes = f"{self.code_features}, {self.point_features}, {self.hidden_features}, {self.out_features}"
        return f"DecoderExpert({sizes})"

    @property
    def output_rows(self) -> tuple[str, ...]:
        return ("w_out", "b_out")

    def sizes(self) -> dict[str, int]:
        return {"hidden_features": self.hidden_features}

    def row_specs(self) -> dict[str, RowSpec]:
        from_code, from_hidden = Init("uniform", self.code_features), Init("uniform", "hidden_features")
        return {
            "w_code": RowSpec((self.code_features, "hidden_features"), from_code),
            "w_x": RowSpec((self.point_features, "hidden_features"), Init("normal", std=self.point_features**-0.5)),
            "b_in": RowSpec(("hidden_features",), from_code),
            "w_mid": RowSpec(("hidden_features", "hidden_features"), from_hidden),
            "b_mid": RowSpec(("hidden_features",), from_hidden),
            "w_out": RowSpec(("hidden_features", self.out_features), from_hidden),
            "b_out": RowSpec((self.out_features,), from_hidden),
        }

    def compute(self, x: Tensor, ops: ExpertOps) -> Tensor:
        code, point = x.split([self.code_features, self.point_features], -1)
        return self._deeper(F.relu(ops.linear(code, "w_code", "b_in") + ops.linear(point, "w_x")), ops)

    def decode(self, codes: Tensor, x: Tensor, ops: ExpertOps) -> Tensor:
        """What :meth:`compute` gives for every pair of a code and a target of the same task.

        Args:
            codes: (K, S, B, code_features), one for each expert.
            x: (B, N, D).
            ops: of a batched backend with K experts.
        Returns:
            (K, S, B, N, out_features).
        """
        num_tasks, num_targets = x.shape[:2]
        at_code = ops.linear(codes.flatten(1, 2), "w_code", "b_in").unflatten(1, codes.shape[1:3])
        at_x = ops.linear(x.flatten(0, 1), "w_x").unflatten(1, (1, num_tasks, num_targets))
        # in place, as nobody else holds the sum; before flatten, as writing into a view costs a copy in backward
        hidden = F.relu(at_code.unsqueeze(3) + at_x, inplace=True)
        raw = self._deeper(hidden.flatten(1, 3), ops)
        return raw.unflatten(1, (*codes.shape[1:3], num_targets))

    @staticmethod
    def _deeper(hidden: Tensor, ops: ExpertOps) -> Tensor:
        return ops.linear(F.relu(ops.linear(hidden, "w_mid", "b_mid"), inplace=True), "w_out", "b_out")
