"""A task's gate over a pool that may be partly frozen when the task comes, and what several gates make of a pool."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from modmoe.gating.base import at_least_float32
from modmoe.gating.token_choice import DenseRouter
from modmoe.growable import FORMAT_VERSION, decode_book, encode_book
from modmoe.kernels.batched import BatchedOps
from modmoe.layer import MoELayer
from modmoe.pool import ExpertPool
from modmoe.rows import Rows

SHARED = "shared"
"""The gate of a level that no task owns, and the input of experts that no task owns."""


class TaskRouter(DenseRouter):
    """softmax(x W^T + b) over the open experts, with rows of its own for experts that were frozen before it.

    A gate row is frozen with its expert, in every gate on the pool. For a task that comes later this would fix its
    weighing of the older experts at random values; so the gate corrects the scores of those, a correction that
    starts at 0 and is the task's, not the expert's.

    Args:
        in_features: D.
        frozen_ids: the experts that were frozen when the gate was made.
    Source:
        Ma et al. 2018 (MMoE), the gating networks; with a bias, which growth needs (see DenseRouter).
    """

    shared_parts = ("late_weight", "late_bias")
    late_ids: Tensor

    def __init__(self, in_features: int, frozen_ids: Sequence[int] = ()):
        super().__init__(in_features)
        self._set_late(torch.tensor(list(frozen_ids), dtype=torch.int64))

    def _set_late(self, ids: Tensor, dtype: torch.dtype | None = None) -> None:
        self.register_buffer("late_ids", ids)
        self.late_weight = self.late_bias = None
        if len(ids):
            self.late_weight = nn.Parameter(torch.zeros(len(ids), self.in_features, dtype=dtype, device=ids.device))
            self.late_bias = nn.Parameter(torch.zeros(len(ids), dtype=dtype, device=ids.device))

    def score(self, x: Tensor, rows: Rows) -> Tensor:
        scores = super().score(x, rows)
        if self.late_weight is None or self.late_bias is None:
            return scores
        position = {expert_id: index for index, expert_id in enumerate(rows.ids)}
        pairs = [(late, position[i]) for late, i in enumerate(self.late_ids.tolist()) if i in position]
        if not pairs:
            return scores
        late, where = (torch.tensor(side, device=x.device) for side in zip(*pairs, strict=True))
        weight, bias = at_least_float32(self.late_weight), at_least_float32(self.late_bias)
        correction = nn.functional.linear(at_least_float32(x), weight[late], bias[late])
        return scores.index_add(1, where, correction)

    def freeze_shared(self, frozen: bool = True) -> None:
        if self.late_weight is not None:
            super().freeze_shared(frozen)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        ids = state_dict.get(prefix + "late_ids")
        if ids is not None and len(ids) != len(self.late_ids):  # a fresh model has none
            self._set_late(ids.to(self.late_ids.device), state_dict[prefix + "late_bias"].dtype if len(ids) else None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class GatedLevel(nn.Module):
    """Several gates on one pool: y^k = sum_e softmax(W^k x + b^k)_e f_e(x), each expert computed once for all of them.

    The gate of a task is open to the experts of its task and to those of no task; the gate ``"shared"`` to those of no
    task and of the tasks in ``writers``.

    Args:
        pool: the experts.
        writers: names of tasks.
    Source:
        Ma et al. 2018 (MMoE); Tang et al. 2020 (PLE), whose gates see their own and the shared experts.
    """

    def __init__(self, pool: ExpertPool, writers: Sequence[str] = ()):
        super().__init__()
        self.pool = pool
        self.writers = tuple(writers)
        self.gates = nn.ModuleDict()
        self._last: dict[str, Tensor] = {}

    def add_gate(self, name: str) -> None:
        """Add the gate of a task, or of ``"shared"``."""
        router = TaskRouter(self.pool.expert.in_features, self.pool.frozen_ids).to(self.pool.like)
        self.gates[name] = MoELayer(self.pool, router, namespace=f"gate_{name}")

    def gate(self, name: str) -> MoELayer:
        """The layer of one gate alone, on the same pool."""
        layer = self.gates[name]
        assert isinstance(layer, MoELayer)
        return layer

    def open_ids(self, name: str) -> tuple[int, ...]:
        """The experts that a gate may use, in the order of the pool.

        Raises:
            ValueError: if there are none.
        """
        tasks = self.writers if name == SHARED else (name,)
        pairs = zip(self.pool.ids, self.pool.tasks(), strict=True)
        ids = tuple(expert_id for expert_id, task in pairs if task is None or task in tasks)
        if not ids:
            raise ValueError(f"no expert is open to the gate '{name}': the pool has {list(self.pool.tasks())}")
        return ids

    def forward(self, x: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each gate mixes.

        Args:
            x: (B, D) float, read by all; or one for each task and for ``"shared"``: a gate reads its own, and so do
                the experts of a task, all others ``x["shared"]``.
        Returns:
            gate name -> (B, D_out).
        """
        outputs = self.expert_outputs(x)
        position = {expert_id: index for index, expert_id in enumerate(self.pool.ids)}
        mixed, self._last = {}, {}
        for name in self.gates:
            layer, ids = self.gate(name), self.open_ids(name)
            # scored among themselves: closed experts change nothing, not even the rounding
            rows = self.pool.namespace(layer.namespace, ids)
            weights = layer.router(x if isinstance(x, Tensor) else x[name], rows).probs
            where = torch.tensor([position[expert_id] for expert_id in ids], device=weights.device)
            # picked even where all are open: another layout of the same numbers would be added up in another order
            open_outputs = outputs.index_select(1, where)
            mixed[name] = torch.bmm(weights.to(outputs.dtype).unsqueeze(1), open_outputs).squeeze(1)
            kept = weights.detach()
            self._last[name] = kept.new_zeros(len(kept), len(position)).index_copy(1, where, kept)
        return mixed

    def gate_weights(self, name: str) -> Tensor:
        """(B, E): the weights of a gate in the last call, without a graph, 0 where an expert is closed.

        Raises:
            ValueError: if there was none since the level was made, copied or loaded.
        """
        if name not in self._last:
            raise ValueError(f"the gate '{name}' has not been used yet: call the model first")
        return self._last[name]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_last": {}}  # a checkpoint has no use for the last batch

    def expert_outputs(self, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        """(B, E, D_out): every expert's output, in the order of ``pool.ids``; x as in :meth:`forward`."""
        parts, positions = [], []
        for group in self.pool.groups():
            if isinstance(x, Tensor):
                inputs = x
            else:
                tasks = [self.pool.record(expert_id).task for expert_id in group.ids]
                inputs = torch.stack([x[SHARED if task is None else str(task)] for task in tasks])
            parts.append(self.pool.expert.compute(inputs, BatchedOps(group.to(inputs.dtype).tensors)))
            positions += group.positions
        outputs = torch.cat(parts) if len(parts) > 1 else parts[0]
        if positions != sorted(positions):
            order = torch.tensor(positions, device=outputs.device).argsort()
            outputs = outputs.index_select(0, order)
        return outputs.transpose(0, 1)

    def get_extra_state(self) -> Tensor:
        """Which tasks' experts the gate "shared" is open to."""
        return encode_book({"version": FORMAT_VERSION, "writers": self.writers})

    def set_extra_state(self, state: Tensor) -> None:
        self.writers = decode_book(state, lambda book: tuple(book["writers"]))
