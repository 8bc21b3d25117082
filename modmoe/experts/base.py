"""What an expert kind has to say: its rows, and how it computes."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.growable import RowSpec


class ExpertOps(Protocol):
    """The per-expert operations that a backend offers; an expert written in them runs on every backend."""

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        """x W_e + b_e for each assignment with its own expert's rows: (..., D_in) -> (..., D_out).

        Args:
            x: the backend's layout of assignments.
            weight: name of rows (D_in, D_out).
            bias: name of rows (D_out,), or None.
        """
        ...

    def conv2d(self, x: Tensor, weight: str, bias: str, stride: int, padding: int) -> Tensor:
        """Cross-correlation of each assignment's image with its own expert's kernels, as ``F.conv2d``.

        Args:
            x: the backend's layout of assignments: (..., C_in, height, width).
            weight: name of rows (C_out, C_in, kernel height, kernel width).
            bias: name of rows (C_out,).
            stride: in both directions.
            padding: zeros on each side.
        Returns:
            (..., C_out, height', width').
        """
        ...


class TwoLayers(NamedTuple):
    """f(x) = act(x W_1 + b_1, x W_2 + b_2, ...) W_out + b_out: what the fused backends compute.

    Args:
        inner: the names of W and b for each argument of the map; None for no bias.
        outer: the names of W_out and b_out.
        activate: the elementwise map of the inner products, all (..., H), to (..., H).
        gradient: of the map: the gradient of its output and the inner products -> the gradients of these.
    """

    inner: tuple[tuple[str, str | None], ...]
    outer: tuple[str, str | None]
    activate: Callable[..., Tensor]
    gradient: Callable[..., tuple[Tensor, ...]]


class Expert(ABC):
    """An expert kind: a description without tensors, shared by all experts of a pool.

    Attributes:
        in_features: size of the input.
        out_features: size of the output.
        one_by_one_on_cpu: True if the CPU computes one expert after the other faster than many at once, as it does
            convolutions (measured); ``backend="auto"`` asks.
        needs_sequence: True if an output depends on the whole sequence, so that ``compute`` alone cannot give it.
    """

    one_by_one_on_cpu: ClassVar[bool] = False
    needs_sequence: ClassVar[bool] = False
    in_features: int
    out_features: int

    @property
    def output_rows(self) -> tuple[str, ...]:
        """Names of rows with which at 0 the output is 0 for every input; none if there are no such rows."""
        return ()

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The sizes that may differ between cohorts, with this description's values."""

    @abstractmethod
    def row_specs(self) -> dict[str, RowSpec]:
        """The rows that each expert owns, by name; each expert owns exactly one of each."""

    def two_layers(self) -> "TwoLayers | None":
        """The experts' function as two matrix products with an elementwise map between; None if it is no such."""
        return None

    def compute(self, x: Tensor, ops: ExpertOps) -> Tensor:
        """The experts' function in the operations of a backend: (..., in_features) -> (..., out_features).

        Kinds that are no two layers override it.
        """
        layers = self.two_layers()
        if layers is None:
            raise NotImplementedError(f"{type(self).__name__} says neither two_layers nor compute")
        return ops.linear(layers.activate(*(ops.linear(x, *names) for names in layers.inner)), *layers.outer)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": F.tanh,
}


def silu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of F.silu at x, given that of its output; differentiable itself, which aten's is not."""
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, x)
    gate = x.sigmoid()
    return grad * gate * (1 + x * (1 - gate))


# the gradients of these, given that of the output and the input
ACTIVATION_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "silu": silu_gradient,
    "tanh": lambda grad, x: torch.ops.aten.tanh_backward(grad, x.tanh()),
}


def check_activation(name: str) -> None:
    """Raise ValueError unless it is one of ``ACTIVATIONS``."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation '{name}', choose one of {sorted(ACTIVATIONS)}")
