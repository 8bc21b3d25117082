"""What an expert kind has to say: its rows, and how it computes."""

from abc import ABC, abstractmethod
from typing import Protocol

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


class Expert(ABC):
    """An expert kind: a description without tensors, shared by all experts of a pool.

    Attributes:
        in_features: size of the input.
        out_features: size of the output.
    """

    in_features: int
    out_features: int

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The sizes that may differ between cohorts, with this description's values."""

    @abstractmethod
    def row_specs(self) -> dict[str, RowSpec]:
        """The rows that each expert owns, by name; each expert owns exactly one of each."""

    @abstractmethod
    def compute(self, x: Tensor, ops: ExpertOps) -> Tensor:
        """The experts' function in the operations of a backend: (..., in_features) -> (..., out_features)."""
