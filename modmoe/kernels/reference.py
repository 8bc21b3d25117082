"""The reference backend: a loop over experts. It defines what is right."""

import torch.nn.functional as F
from torch import Tensor

from modmoe.experts.base import Expert


class LoopOps:
    """Rows of one expert, for the assignments of that expert alone: x (n_e, D)."""

    def __init__(self, rows: dict[str, Tensor]):
        self.rows = rows

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        y = x @ self.rows[weight]
        return y if bias is None else y + self.rows[bias]

    def conv2d(self, x: Tensor, weight: str, bias: str, stride: int, padding: int) -> Tensor:
        return F.conv2d(x, self.rows[weight], self.rows[bias], stride, padding)


def run_reference(expert: Expert, tensors: dict[str, Tensor], x: Tensor, local: Tensor) -> Tensor:
    """Each expert computes its own assignments.

    Args:
        expert: the expert kind.
        tensors: row name -> (G, ...), the rows of G experts.
        x: (N, D) one row for each assignment.
        local: (N,) int64 in [0, G), or -1 for an assignment that no expert here computes.
    Returns:
        (N, D_out), zero where local is -1.
    """
    num_experts = next(iter(tensors.values())).shape[0]
    # unbind: indexing W[e] would make the backward of each expert build a gradient of the full size
    rows = {name: tensor.unbind(0) for name, tensor in tensors.items()}
    y = x.new_zeros(x.shape[0], expert.out_features)
    for e in range(num_experts):
        index = (local == e).nonzero().squeeze(1)
        ops = LoopOps({name: unbound[e] for name, unbound in rows.items()})
        y = y.index_add(0, index, expert.compute(x.index_select(0, index), ops))
    return y
