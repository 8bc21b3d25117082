"""A small network for each expert as its gate, trained until it settles and never again."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.gating.autoencoder import uniform
from modmoe.gating.base import at_least_float32
from modmoe.gating.classwise import DENSITY, DensityRouter, PartOfRows
from modmoe.gating.fitted import FittedRouter, class_generator, sum_by_owner
from modmoe.growable import RowSpec
from modmoe.rows import Rows

BATCH_SIZE = 128
NETWORK = ("hidden", "hidden_bias", "output", "output_bias")


class LearnedRouter(FittedRouter):
    """p(expert t | x) = P_t(own) prod_{s > t} P_s(older), with P_s the softmax of a network g_s of the expert's own.

    g_s(x) = A relu(B x + b) + a has a logit for each class of expert s, and one for "older": all that the experts
    observed before it; the first has none. Its score is kept in the form that growth does not change, as
    StickRouter's is, and w times the density's score is added class by class:

        score_c(x) = log P_t(c) - sum_{s <= t} log P_s(older) + w log p_c(x),  score(t) = log sum_{c of t} exp score_c.

    g_s is trained inside :meth:`observe` (Adam on the cross-entropy) and is a row of expert s, frozen with it. What is
    older is not stored: every epoch draws it anew from the densities of the older classes, in proportion to their
    samples. It draws as many as the expert's own samples n, however many there were before (N); the logit of "older"
    is raised by log(N / n) at the end, which makes the posterior that of the true shares.

    **Stop rule.** A share of the own data and as many fresh draws are held out. Training ends when their loss has not
    fallen by more than ``tolerance`` below the best for ``patience`` epochs, or after ``max_epochs``; the best weights
    are kept. Then nothing writes this gate again. The row ``epochs`` says when it stopped.

    No state is shared by the experts, and the order is that of observing. A removed expert is drawn for no later gate,
    but those that it was drawn for still call it older. Experts may own the same class.

    Draws are only as good as the densities, and a density that fits is hard to beat. As a classifier on the digits in
    5 tasks (3 seeds, w = .1) it has .990 with a PPCARouter (5 components, rank 15) that alone has .985, but .979 with
    a GaussianRouter that alone has .991; networks without a density (w = 0) stay at .95.

    Args:
        in_features: D.
        density: a gate fitted class by class to all D features. Its rows live beside this gate's, their names prefixed
            with ``density_``; its own top_k plays no part.
        hidden_features: H.
        density_weight: w; fixed before the stream.
        learning_rate: of Adam.
        max_epochs: passes over the expert's data at most.
        patience: epochs without an improvement that end training; few end it on a plateau, too.
        tolerance: what counts as an improvement of the held-out loss, in nats.
        held_out_share: of each class, rounded down; with no sample held out, the training samples judge.
        seed: of weights, batches and draws, together with the expert's place in the order; no global random state is
            used.
        top_k: see FittedRouter.
    Raises:
        ValueError: on a density that cannot be drawn from, does not tell classes apart or has another size; and if
            hidden_features, max_epochs or patience is below 1, learning_rate not positive, tolerance or
            density_weight negative, or held_out_share outside (0, 1).
    Source:
        Li et al. 2025, Theory on Mixture-of-Experts in Continual Learning (ICLR): stop updating the gate after enough
        rounds. There one gate serves all tasks; here each expert has its own.
    """

    streaming = False

    def __init__(
        self,
        in_features: int,
        density: DensityRouter,
        hidden_features: int = 64,
        density_weight: float = 0.1,
        learning_rate: float = 1e-3,
        max_epochs: int = 100,
        patience: int = 3,
        tolerance: float = 1e-3,
        held_out_share: float = 0.2,
        seed: int = 0,
        top_k: int = 1,
    ):
        super().__init__(in_features, top_k)
        if not isinstance(density, DensityRouter) or not density.per_class:
            raise ValueError(f"{type(density).__name__} is no density of single classes that can be drawn from")
        if density.in_features != in_features:
            raise ValueError(f"the density has to take all {in_features} features, it takes {density.in_features}")
        if hidden_features < 1 or max_epochs < 1 or patience < 1:
            raise ValueError(
                "hidden_features, max_epochs and patience must be at least 1, "
                f"got {hidden_features}, {max_epochs} and {patience}"
            )
        if learning_rate <= 0 or tolerance < 0 or density_weight < 0:
            raise ValueError(
                "learning_rate must be positive, tolerance and density_weight not negative, "
                f"got {learning_rate}, {tolerance} and {density_weight}"
            )
        if not 0 < held_out_share < 1:
            raise ValueError(f"held_out_share must be in (0, 1), got {held_out_share}")
        self.density = density
        self.hidden_features = hidden_features
        self.density_weight = density_weight
        self.learning_rate = learning_rate
        self.max_epochs = max_epochs
        self.patience = patience
        self.tolerance = tolerance
        self.held_out_share = held_out_share
        self.seed = seed

    def row_specs(self) -> dict[str, RowSpec]:
        D, H = self.in_features, self.hidden_features
        return {
            "label": RowSpec((), trainable=False, count=0, dtype=torch.int64),  # each own class
            "order": RowSpec((), trainable=False, count=0, dtype=torch.int64),  # one for each expert: 0 is the oldest
            "epochs": RowSpec((), trainable=False, count=0, dtype=torch.int64),  # one for each expert
            "hidden": RowSpec((H, D), trainable=False, count=0),  # B, one for each expert
            "hidden_bias": RowSpec((H,), trainable=False, count=0),
            "output": RowSpec((H,), trainable=False, count=0),  # A: each own class in the order of "label", then older
            "output_bias": RowSpec((), trainable=False, count=0),
            **{DENSITY + name: spec for name, spec in self.density.row_specs().items()},
        }

    # -- scoring -------------------------------------------------------------------------------------------------------

    def class_log_joint(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Log-probability of each class, but for a term that all share; with w times the density's class score."""
        return self._class_scores(at_least_float32(x), rows), rows["label"]

    def score(self, x: Tensor, rows: Rows) -> Tensor:
        x = at_least_float32(x)
        return sum_by_owner(self._class_scores(x, rows), rows.owner("label"), len(rows.ids), x)

    def _class_scores(self, x: Tensor, rows: Rows) -> Tensor:
        """(T, R), the classes in the order of the rows "label"."""
        hidden, hidden_bias, output, output_bias = (rows[name].to(x.dtype) for name in NETWORK)
        networks, labels, outputs = rows.owner("order"), rows.owner("label"), rows.owner("output")
        scores = x.new_zeros(len(x), len(labels))
        log_older = x.new_zeros(len(x), 1)
        for index in rows["order"].argsort().tolist():
            own = (labels == networks[index]).nonzero().squeeze(1)
            mine = outputs == networks[index]
            logits = gate_logits(x, hidden[index], hidden_bias[index], output[mine], output_bias[mine])
            log_own, log_rest = logits.log_softmax(1).split([len(own), logits.shape[1] - len(own)], 1)
            log_older = log_older + log_rest.sum(1, keepdim=True)  # one column, or none for the first expert
            scores = scores.index_copy(1, own, log_own - log_older)
        # the density's rows were written together with "label", in the same order
        return scores + self.density_weight * self.density.class_score(x, PartOfRows(rows, DENSITY))

    # -- fitting -------------------------------------------------------------------------------------------------------

    def updated_rows(self, old: dict[str, Tensor], x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self._fit(old, x, labels, order=0, older=[])

    def rows_among(self, others: Rows, old: dict[str, Tensor], x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if len(others["order"]) == 0:
            return self.updated_rows(old, x, labels)
        part = PartOfRows(others, DENSITY)
        stacked = {name: at_least_float32(part[name]) for name in part}
        older = [{name: tensor[index] for name, tensor in stacked.items()} for index in range(len(stacked["label"]))]
        return self._fit(old, x, labels, int(others["order"].max()) + 1, older)

    def _fit(
        self, old: dict[str, Tensor], x: Tensor, labels: Tensor, order: int, older: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """An expert's rows; ``older`` are the densities of the classes before it."""
        generator = class_generator(self.seed, order)
        empty = {name.removeprefix(DENSITY): tensor for name, tensor in old.items() if name.startswith(DENSITY)}
        fitted = self.density.updated_rows(empty, x, labels)
        classes, targets = labels.unique(return_inverse=True)
        num_outputs = len(classes) + (1 if older else 0)

        def with_older(own: Tensor) -> tuple[Tensor, Tensor]:
            """Own samples (by their places in x) and as many older ones, with their targets."""
            if not older:
                return x[own], targets[own]
            drawn = self._draw(older, len(own), generator).to(x)
            return torch.cat([x[own], drawn]), torch.cat([targets[own], targets.new_full((len(own),), len(classes))])

        train, held_out = self._split(targets, generator)
        judge = with_older(held_out)
        # trained on inputs with mean 0 and, all features together, variance 1
        shift = judge[0].mean(0)
        scale = float((judge[0] - shift).square().mean().sqrt()) or 1.0
        network = self._start(num_outputs, generator, x)

        def loss(network: list[Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(gate_logits((batch[0] - shift) / scale, *network), batch[1])

        def epoch() -> list[tuple[Tensor, Tensor]]:
            samples, wanted = with_older(train)
            places = torch.randperm(len(samples), generator=generator).to(x.device)
            return [(samples[batch], wanted[batch]) for batch in places.split(BATCH_SIZE)]

        network, num_epochs = self._train_until_settled(network, epoch, loss, judge)
        hidden, hidden_bias, output, output_bias = network
        hidden = hidden / scale
        if older:
            total = sum(float(row["count"]) for row in older)
            output_bias[-1] += math.log(total / len(x))
        return {
            "label": classes,
            "order": labels.new_tensor([order]),
            "epochs": labels.new_tensor([num_epochs]),
            "hidden": hidden.unsqueeze(0),
            "hidden_bias": (hidden_bias - hidden @ shift).unsqueeze(0),
            "output": output,
            "output_bias": output_bias,
            **{DENSITY + name: tensor for name, tensor in fitted.items()},
        }

    def _start(self, num_outputs: int, generator: torch.Generator, like: Tensor) -> list[Tensor]:
        D, H = self.in_features, self.hidden_features
        shapes = [((H, D), D), ((H,), D), ((num_outputs, H), H), ((num_outputs,), H)]
        return [uniform(shape, fan_in, generator).to(like) for shape, fan_in in shapes]

    def _split(self, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The places of the samples to train on, and of those to judge by."""
        held_out = torch.zeros_like(targets, dtype=torch.bool)
        for target in range(int(targets.max()) + 1):
            mine = (targets == target).nonzero().squeeze(1)
            drawn = torch.randperm(len(mine), generator=generator).to(mine.device)
            held_out[mine[drawn[: int(self.held_out_share * len(mine))]]] = True
        train = (~held_out).nonzero().squeeze(1)
        return train, held_out.nonzero().squeeze(1) if held_out.any() else train

    def _draw(self, older: list[dict[str, Tensor]], n: int, generator: torch.Generator) -> Tensor:
        """(n, D) from the older classes' densities, in proportion to their samples."""
        counts = torch.stack([row["count"] for row in older]).cpu()
        drawn = torch.multinomial(counts, n, replacement=True, generator=generator)
        sizes = drawn.bincount(minlength=len(older)).tolist()
        return torch.cat([self.density.sample(row, k, generator) for row, k in zip(older, sizes, strict=True) if k])

    def _train_until_settled(
        self,
        start: list[Tensor],
        epoch: Callable[[], list[tuple[Tensor, Tensor]]],
        loss: Callable[[list[Tensor], tuple[Tensor, Tensor]], Tensor],
        judge: tuple[Tensor, Tensor],
    ) -> tuple[list[Tensor], int]:
        """The stop rule: the best network by its loss on ``judge``, and the number of epochs until training ended."""
        kept, best, waited, num_epochs = start, float(loss(start, judge)), 0, 0
        network = [tensor.clone().requires_grad_() for tensor in start]
        optimizer = torch.optim.Adam(network, lr=self.learning_rate)
        while waited < self.patience and num_epochs < self.max_epochs:
            for batch in epoch():
                optimizer.zero_grad()
                with torch.enable_grad():
                    loss(network, batch).backward()
                optimizer.step()
            num_epochs += 1
            now, waited = float(loss(network, judge)), waited + 1
            if now < best - self.tolerance:
                kept, best, waited = [tensor.detach().clone() for tensor in network], now, 0
        return kept, num_epochs


def gate_logits(x: Tensor, hidden: Tensor, hidden_bias: Tensor, output: Tensor, output_bias: Tensor) -> Tensor:
    """(T, D) -> (T, O), see LearnedRouter."""
    return F.linear(F.linear(x, hidden, hidden_bias).relu(), output, output_bias)
