"""Expert kinds of policies: by name, and several networks that one expert owns side by side."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, cat

from modmoe.experts import Expert, SwiGLUExpert
from modmoe.experts.base import ExpertOps
from modmoe.experts.deep_mlp import DeepMLPExpert
from modmoe.growable import Init, RowSpec


class SideBySideExpert(Expert):
    """Several networks on the same input, all of them one expert's own: y = [f_1(x), f_2(x), ...].

    An actor and its critic, or the two critics of SAC, are then routed, grown, frozen and removed together. Row r of
    the network p is named p_r.

    Args:
        parts: name -> expert kind; all take the same features.
        gains: name -> factor of the output rows' initial size, and a bias of 0; 1 where not given.
    Raises:
        ValueError: on no parts, or parts of different inputs or sizes.
    """

    def __init__(self, parts: Mapping[str, Expert], gains: Mapping[str, float] | None = None):
        if len({part.in_features for part in parts.values()}) != 1:
            raise ValueError(f"networks side by side take the same features, got {dict(parts)}")
        self.parts = dict(parts)
        self.gains = dict(gains or {})
        self.in_features = next(iter(self.parts.values())).in_features
        self.out_features = sum(part.out_features for part in self.parts.values())
        self.needs_sequence = any(part.needs_sequence for part in self.parts.values())  # type: ignore[misc]
        if any(part.sizes() != self.sizes() for part in self.parts.values()):
            raise ValueError(f"networks side by side have the same sizes, got {dict(parts)}")

    def __repr__(self) -> str:
        return f"SideBySideExpert({self.parts})"

    @property
    def output_rows(self) -> tuple[str, ...]:
        names = [[f"{name}_{row}" for row in part.output_rows] for name, part in self.parts.items()]
        return tuple(row for rows in names for row in rows) if all(names) else ()

    def sizes(self) -> dict[str, int]:
        return next(iter(self.parts.values())).sizes()

    def row_specs(self) -> dict[str, RowSpec]:
        return {
            f"{name}_{row}": scaled(spec, self.gains[name], part.sizes())
            if row in part.output_rows and name in self.gains
            else spec
            for name, part in self.parts.items()
            for row, spec in part.row_specs().items()
        }

    def compute(self, x: Tensor, ops: ExpertOps) -> Tensor:
        return cat([part.compute(x, _PartOps(ops, f"{name}_")) for name, part in self.parts.items()], -1)


class _PartOps:
    """A backend's operations on the rows of one of several networks."""

    def __init__(self, ops: ExpertOps, prefix: str):
        self.ops, self.prefix = ops, prefix

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        return self.ops.linear(x, self.prefix + weight, bias and self.prefix + bias)

    def conv2d(self, x: Tensor, weight: str, bias: str, stride: int, padding: int) -> Tensor:
        return self.ops.conv2d(x, self.prefix + weight, self.prefix + bias, stride, padding)


def scaled(spec: RowSpec, gain: float, sizes: Mapping[str, int]) -> RowSpec:
    """The same rows drawn ``gain`` times as large, a bias (one axis) as 0."""
    init = spec.init
    if len(spec.shape) == 1:
        return dataclasses.replace(spec, init=Init("constant"))
    if init.kind == "uniform":
        fan_in = sizes[init.fan_in] if isinstance(init.fan_in, str) else init.fan_in
        return dataclasses.replace(spec, init=dataclasses.replace(init, fan_in=round(fan_in / gain**2)))
    return dataclasses.replace(spec, init=dataclasses.replace(init, std=init.std * gain))


ExpertFactory = Callable[[int, int], Expert]


def make_expert(
    expert: str | ExpertFactory,
    in_features: int,
    out_features: int,
    hidden_features: int | Sequence[int],
    options: Mapping[str, object],
) -> Expert:
    """Build an expert kind by name ("mlp" or "swiglu"), or by a function of (in_features, out_features).

    Raises:
        ValueError: on an unknown name, or hidden layers that the kind cannot have.
    """
    if not isinstance(expert, str):
        return expert(in_features, out_features)
    if expert == "mlp":
        hidden = [hidden_features] if isinstance(hidden_features, int) else hidden_features
        return DeepMLPExpert(in_features, hidden, out_features, **options)  # type: ignore[arg-type]
    if expert == "swiglu":
        if not isinstance(hidden_features, int):
            raise ValueError(f"a swiglu expert has one hidden layer, got hidden_features={list(hidden_features)}")
        return SwiGLUExpert(in_features, hidden_features, out_features, **options)  # type: ignore[arg-type]
    raise ValueError(f"unknown expert '{expert}': 'mlp', 'swiglu', or a function of (in_features, out_features)")
