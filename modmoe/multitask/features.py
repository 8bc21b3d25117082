"""From the columns of a table to one vector."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FeatureFront(nn.Module):
    """[dense features, one embedding for each categorical feature], side by side.

    Args:
        num_dense: how many dense features a sample has, at least 0.
        cardinalities: how many values each categorical feature has.
        embedding_features: size of each embedding; they start as normal(0, 1 / sqrt(embedding_features)).
    Raises:
        ValueError: if there are no features at all, or a size is out of range.
    """

    offsets: Tensor

    def __init__(self, num_dense: int, cardinalities: Sequence[int] = (), embedding_features: int = 8):
        super().__init__()
        if num_dense < 0 or min(cardinalities, default=1) < 1 or embedding_features < 1:
            raise ValueError(
                "num_dense must be at least 0, cardinalities and embedding_features at least 1, "
                f"got {num_dense}, {list(cardinalities)} and {embedding_features}"
            )
        if num_dense == 0 and not cardinalities:
            raise ValueError("a sample needs at least one feature, dense or categorical")
        self.num_dense = num_dense
        self.cardinalities = tuple(cardinalities)
        self.out_features = num_dense + len(self.cardinalities) * embedding_features
        starts = [sum(self.cardinalities[:i]) for i in range(len(self.cardinalities))]
        self.register_buffer("offsets", torch.tensor(starts, dtype=torch.int64), persistent=False)
        self.table = None  # one table for all features: one look-up
        if self.cardinalities:
            self.table = nn.Embedding(sum(self.cardinalities), embedding_features)
            nn.init.normal_(self.table.weight, std=1 / math.sqrt(embedding_features))

    def forward(self, dense: Tensor | None = None, categorical: Tensor | None = None) -> Tensor:
        """Put the features together.

        Args:
            dense: (B, num_dense) float; None where there are none.
            categorical: (B, number of categorical features) int64, each in [0, its cardinality); None where there
                are none.
        Returns:
            (B, out_features) float.
        Raises:
            ValueError: on a missing or unexpected part, a wrong shape or dtype, or a value out of range.
        """
        parts = []
        for name, x, width in (("dense", dense, self.num_dense), ("categorical", categorical, len(self.cardinalities))):
            shape = None if x is None else tuple(x.shape)
            if (width == 0) != (x is None) or (shape is not None and shape[1:] != (width,)):
                wanted = "no" if width == 0 else f"(B, {width})"
                raise ValueError(f"{wanted} {name} features are needed, got {'none' if shape is None else shape}")
        if dense is not None:
            parts.append(dense)
        if categorical is not None and self.table is not None:
            if categorical.is_floating_point() or categorical.dtype == torch.bool:
                raise ValueError(f"categorical features must be integers, got {categorical.dtype}")
            if not torch.compiler.is_compiling() and not categorical.is_cuda:
                self._check_range(categorical)
            parts.append(self.table(categorical + self.offsets).flatten(1))
        return torch.cat(parts, dim=1)

    def _check_range(self, categorical: Tensor) -> None:
        """A value out of range would silently read another feature's embedding."""
        limits = torch.tensor(self.cardinalities)
        wrong = ((categorical < 0) | (categorical >= limits)).any(0).nonzero().flatten().tolist()
        if wrong:
            column = wrong[0]
            low, high = int(categorical[:, column].min()), int(categorical[:, column].max())
            raise ValueError(
                f"categorical feature {column} must lie in [0, {self.cardinalities[column]}), got {low} to {high}"
            )
