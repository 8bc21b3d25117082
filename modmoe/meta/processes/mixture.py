"""A mixture of neural processes in one pool: MoE-NP style."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modmoe.growable import Init, RowSpec
from modmoe.kernels.batched import BatchedOps
from modmoe.meta.predictive import Predictive
from modmoe.meta.processes.decoder import DecoderExpert
from modmoe.meta.processes.encoder import PointEncoder, pool_points
from modmoe.meta.processes.latent import Decoded, Latent, LatentProcess, Points
from modmoe.meta.task_batch import TaskBatch
from modmoe.pool import ExpertPool
from modmoe.rows import Group, Task

SLOT_FEATURES = 32


class MoENeuralProcess(LatentProcess):
    """p(y | x, D) = E_p(z_1..K | D) prod_i sum_k p(e_i = k | x_i, z) p(y_i | x_i, z_k).

    Every context point is softly assigned to the experts (slots), each expert's z_k comes from its share of the
    points, its decoder gives a distribution and a score at x from z_k alone, and the gate is the softmax of the scores.
    An expert owns its slot's row, the head of its z_k and its decoder with the score; points' features are shared.

    ``loss`` has three objectives: "exact" (e and draws of z summed out; see LatentProcess), "elbo" and "gumbel", which
    take z from p(z | context and targets), subtract sum_k KL of z_k, and bound the sum over e or draw it, relaxed; see
    ``modmoe.meta.processes.objectives``.

    Growth: a new expert takes part in the softmaxes of slots and gate, so it changes the answer. Answers with
    ``experts=`` those of before are the same to the last bit if ``freeze()`` came before it, with the same draws.

    Args:
        in_features: D.
        out_features: M, for regression.
        num_experts: K >= 1 to start with.
        hidden_features: H of the encoder.
        code_features: size of each z_k.
        decoder_features: H of each decoder. K narrow ones cost what a wide one does: with H = 32, three of them and
            their heads have the size of an NP of 128 (67k parameters).
        num_classes: None for regression; see NeuralProcess.
        task: of the first experts, in the pool's book.
    Raises:
        ValueError: as NeuralProcess, and if K < 1.
    Source:
        MoE-NP, Wang and van Hoof 2022, in our reconstruction. Ours differs: slots; a score from each expert's own z_k
        and x in place of a gate on all z, which could not grow; the sum over e exact by default.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        num_experts: int = 3,
        hidden_features: int = 128,
        code_features: int = 24,
        decoder_features: int = 32,
        num_classes: int | None = None,
        task: Task | None = None,
    ):
        super().__init__(in_features, out_features, num_classes)
        self.encoder = PointEncoder(in_features, self.likelihood.out_features, hidden_features)
        self.slot_of_point = nn.Linear(hidden_features, SLOT_FEATURES)
        self.slot_of_set = nn.Linear(hidden_features, SLOT_FEATURES, bias=False)
        self.decoder_features = decoder_features
        self.kind = DecoderExpert(code_features, in_features, decoder_features, self.likelihood.size + 1)
        self.pool = ExpertPool(self.kind, num_experts, task)
        from_slot, from_code = Init("uniform", SLOT_FEATURES), Init("uniform", hidden_features + 1)
        self.pool.declare("slot", {"weight": RowSpec((SLOT_FEATURES,), from_slot), "bias": RowSpec((), from_slot)})
        head = {
            "weight": RowSpec((hidden_features + 1, 2 * code_features), from_code),
            "bias": RowSpec((2 * code_features,), from_code),
        }
        self.pool.declare("latent", head)

    @property
    def objectives(self) -> tuple[str, ...]:
        return ("exact", "elbo", "gumbel")

    # -- computing ---------------------------------------------------------------------------------

    def forward(
        self,
        batch: TaskBatch,
        num_samples: int = 32,
        generator: torch.Generator | None = None,
        experts: Sequence[int] | None = None,
    ) -> Predictive:
        """As NeuralProcess.forward; components are the experts in the order of ``experts`` (ids; None for the pool's).

        Raises:
            ValueError: as there, on unknown ids, and if experts is empty or names one twice.
        """
        self.check(batch, num_samples)
        ids = self._chosen(experts)
        context = self.read(batch)
        z = self.latent(context, ids).draw(num_samples, generator, shared=True)
        return self.answer(z, context, batch.target_x, ids=ids)

    def assign(self, points: Points, ids: Sequence[int] | None = None) -> Tensor:
        """(B, C, K): the share of each point that goes to each expert's slot; 0 where no point is.

        Args:
            points: from :meth:`read`.
            ids: the experts that share; None for all.
        """
        rows = self.pool.namespace("slot", ids)
        everyone = points.present.to(points.features.dtype).unsqueeze(2)
        if len(rows.ids) == 1:
            return everyone
        mean = pool_points(points.features, everyone)[0, :, :-1]
        hidden = torch.relu(self.slot_of_point(points.features) + self.slot_of_set(mean).unsqueeze(1))
        return (hidden @ rows["weight"].t() + rows["bias"]).softmax(-1) * everyone

    def latent(self, points: Points, ids: Sequence[int] | None = None) -> Latent:
        codes = pool_points(points.features, self.assign(points, ids))
        return Latent.read(BatchedOps(dict(self.pool.namespace("latent", ids))).linear(codes, "weight", "bias"))

    def decode(self, z: Tensor, context: Points, target_x: Tensor, ids: Sequence[int] | None = None) -> Decoded:
        outputs, order = [], []
        for group, places in self._groups(self.pool.ids if ids is None else tuple(ids)):
            codes = z if places == list(range(len(z))) else z[places]
            outputs.append(self.kind.decode(codes, target_x, BatchedOps(group.tensors)))
            order += places
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if order != list(range(len(order))):
            joined = joined[sorted(range(len(order)), key=order.__getitem__)]
        scores, raw = joined.permute(2, 1, 3, 0, 4).split([1, self.likelihood.size], -1)  # (B, S, N, K, .)
        return Decoded(raw, scores.squeeze(-1).log_softmax(-1))

    def expert_output(self, expert_id: int, z: Tensor, x: Tensor) -> Tensor:
        """One expert's score and numbers from its own rows alone: once it is frozen, the same to the last bit for ever.

        Args:
            expert_id: an id.
            z: (S, B, code_features).
            x: (B, N, D).
        Returns:
            (S, B, N, 1 + size): the score before the softmax, then what the likelihood takes.
        """
        ops = BatchedOps(dict(self.pool.namespace("expert", [expert_id])))
        return self.kind.decode(z.unsqueeze(0), x, ops)[0]

    def _chosen(self, experts: Sequence[int] | None) -> tuple[int, ...]:
        ids = self.pool.ids if experts is None else tuple(experts)
        if not ids or len(set(ids)) != len(ids):
            raise ValueError(f"experts names at least one expert and none twice, got {list(ids)}")
        for expert_id in ids:
            self.pool.record(expert_id)  # raises on an unknown id
        return ids

    def _groups(self, ids: tuple[int, ...]) -> list[tuple[Group, list[int]]]:
        """The pool's groups cut to ``ids``, and the places of their experts in ``ids``."""
        cut = []
        for group in self.pool.groups():
            index = [i for i, expert_id in enumerate(group.ids) if expert_id in ids]
            if index:
                part = group if len(index) == len(group.ids) else take(group, index)
                cut.append((part, [ids.index(expert_id) for expert_id in part.ids]))
        return cut

    # -- growing -----------------------------------------------------------------------------------

    def grow(self, n: int = 1, task: Task | None = None, decoder_features: int | None = None) -> list[int]:
        """Add n fresh experts; call :func:`modmoe.sync_optimizer` after it. Returns their ids.

        Args:
            n: at least 1.
            task: theirs, in the pool's book.
            decoder_features: H of their decoders; None for that of the first.
        Raises:
            ValueError: as ExpertPool.add_experts; nothing is changed then.
        """
        size = self.decoder_features if decoder_features is None else decoder_features
        return self.pool.add_experts(n, task=task, hidden_features=size)

    def freeze(self, ids: Sequence[int] | None = None) -> None:
        """Freeze experts; without ids all of them, and what they share: the features of points and slots.

        With ids, shared features go on learning, and so does z_k of a frozen expert, but not what it makes of it.
        Call :func:`modmoe.sync_optimizer` after it.
        """
        self.pool.freeze(ids)
        if ids is None:
            for module in (self.encoder, self.slot_of_point, self.slot_of_set):
                module.requires_grad_(False)
                module.zero_grad(set_to_none=True)  # an optimizer would still apply what is left there


def take(group: Group, index: list[int]) -> Group:
    """Some experts of a group."""
    return Group(
        tuple(group.ids[i] for i in index),
        tuple(group.positions[i] for i in index),
        group.frozen,
        {name: tensor[index] for name, tensor in group.tensors.items()},
    )
