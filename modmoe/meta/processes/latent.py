"""Neural processes with a latent: targets depend on each other through z, which the context leaves uncertain."""

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modmoe.meta.predictive import Predictive
from modmoe.meta.processes.base import NeuralProcess
from modmoe.meta.processes.decoder import PointDecoder
from modmoe.meta.processes.encoder import CrossAttention, PointEncoder, pool_points
from modmoe.meta.processes.objectives import elbo_points, exact_points, gaussian_kl, gumbel_points, npml
from modmoe.meta.task_batch import TaskBatch

MIN_LATENT_STD = 0.02
CPU_BLOCK, BLOCK = 2**18, 2**26  # hidden numbers of a decoder at a time, in answers: a CPU's cache, some of a GPU


class Latent(NamedTuple):
    """N(z_k; mean, std^2) for each of K latents of each task, (K, B, code_features) each."""

    mean: Tensor
    std: Tensor

    @classmethod
    def read(cls, raw: Tensor) -> "Latent":
        """From 2 * code_features numbers; std is in (0.02, 1)."""
        mean, spread = raw.chunk(2, -1)
        return cls(mean, MIN_LATENT_STD + (1 - MIN_LATENT_STD) * spread.sigmoid())

    def draw(self, num_samples: int, generator: torch.Generator | None, shared: bool) -> Tensor:
        """(K, S, B, code_features) draws; the tasks' noise is the same if ``shared``.

        Each latent's noise is drawn by itself, so that it stays the same when latents are added after it.
        """
        shape = (num_samples, 1 if shared else self.mean.shape[1], self.mean.shape[2])
        like = {"dtype": self.mean.dtype, "device": self.mean.device}
        noise = torch.stack([torch.randn(shape, generator=generator, **like) for _ in range(len(self.mean))])
        return self.mean.unsqueeze(1) + self.std.unsqueeze(1) * noise


class Points(NamedTuple):
    """A set of points as a process has read it: x (B, C, D), features (B, C, H), present (B, C) bool."""

    x: Tensor
    features: Tensor
    present: Tensor


class Decoded(NamedTuple):
    """A decoder's numbers for every target (B, S, N, K, size), and the gate (B, S, N, K), normalised over K."""

    raw: Tensor
    log_gates: Tensor


class LatentProcess(NeuralProcess):
    """p(y | x, context) = E_p(z | context) prod_i p(y_i | x_i, z), by S draws of z.

    Objectives of ``loss``: "exact", -ln mean_s prod_i p(y_i | x_i, z_s) with z_s ~ p(z | context) (NPML; what the
    answer itself says of the targets); "elbo", -E_q[sum_i ln p(y_i | x_i, z)] + KL[q || p] with q = p(z | context and
    targets), the same encoder on the larger set.
    """

    encoder: PointEncoder
    decoder_features: int

    @abstractmethod
    def latent(self, points: Points) -> Latent:
        """What a set of points says of z."""

    @abstractmethod
    def decode(self, z: Tensor, context: Points, target_x: Tensor) -> Decoded:
        """The distribution of each target given z: (K, S, B, code_features) and (B, N, D)."""

    @property
    def objectives(self) -> tuple[str, ...]:
        return ("exact", "elbo")

    def read(self, batch: TaskBatch) -> Points:
        """The context."""
        x, y = batch.clean_context()
        return Points(x, self.encoder(x, y), batch.present)

    def read_with_targets(self, context: Points, batch: TaskBatch, target_y: Tensor) -> Points:
        """The context, which has been read, together with the targets."""
        features = self.encoder(batch.target_x, target_y)
        present = context.present.new_ones(features.shape[:2])
        return Points(*map(lambda *both: torch.cat(both, 1), context, Points(batch.target_x, features, present)))

    def forward(self, batch: TaskBatch, num_samples: int = 32, generator: torch.Generator | None = None) -> Predictive:
        self.check(batch, num_samples)
        context = self.read(batch)
        z = self.latent(context).draw(num_samples, generator, shared=True)
        return self.answer(z, context, batch.target_x)

    def answer(self, z: Tensor, context: Points, target_x: Tensor, **choice: Any) -> Predictive:
        """The answer by these draws; without gradients some tasks at a time, which saves memory and time.

        Args:
            z: (K, S, B, code_features).
            context: of B tasks.
            target_x: (B, N, D).
            choice: what :meth:`decode` takes besides.
        """
        num_tasks, num_targets = target_x.shape[:2]
        size = len(z) * z.shape[1] * num_targets * self.decoder_features  # of one task
        step = max(1, (CPU_BLOCK if target_x.device.type == "cpu" else BLOCK) // max(1, size))
        if torch.is_grad_enabled() or step >= num_tasks:
            return self.likelihood.predictive(*self.decode(z, context, target_x, **choice))
        parts = [
            self.decode(z[:, :, some], Points(*(tensor[some] for tensor in context)), target_x[some], **choice)
            for some in (slice(start, start + step) for start in range(0, num_tasks, step))
        ]
        return self.likelihood.predictive(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def loss(
        self,
        batch: TaskBatch,
        objective: str = "exact",
        num_samples: int = 4,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        target_y = self.check_training(batch, objective, num_samples)
        context = self.read(batch)
        prior = self.latent(context)
        posterior = prior
        if objective != "exact":
            posterior = self.latent(self.read_with_targets(context, batch, target_y))
        z = posterior.draw(num_samples, generator, shared=False)
        decoded = self.decode(z, context, batch.target_x)
        log_likelihood = self.likelihood.log_prob(decoded.raw, target_y)
        if objective == "exact":
            total = npml(exact_points(log_likelihood, decoded.log_gates))
        else:
            if objective == "elbo":
                points = elbo_points(log_likelihood, decoded.log_gates)
            else:
                points = gumbel_points(log_likelihood, decoded.log_gates, generator)
            total = points.sum(2).mean(1) - gaussian_kl(*posterior, *prior).sum((0, 2))
        return -total.mean() / target_y.shape[1]


class NP(LatentProcess):
    """A neural process: z from the mean of the context's features, one decoder.

    Args:
        in_features: D.
        out_features: M, for regression.
        hidden_features: H of the encoder.
        code_features: size of z.
        decoder_features: H of the decoder; None for the encoder's.
        num_classes: None for regression; see NeuralProcess.
    Raises:
        ValueError: as NeuralProcess.
    Source:
        Garnelo et al. 2018 (neural processes), section 2; NPML from Foong et al. 2020. Ours adds a number for the size
        of the context to the mean.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        hidden_features: int = 128,
        code_features: int = 64,
        decoder_features: int | None = None,
        num_classes: int | None = None,
    ):
        super().__init__(in_features, out_features, num_classes)
        self.decoder_features = hidden_features if decoder_features is None else decoder_features
        self.encoder = PointEncoder(in_features, self.likelihood.out_features, hidden_features)
        self.head = nn.Linear(hidden_features + 1, 2 * code_features)
        self.decoder = PointDecoder(code_features, in_features, self.decoder_features, self.likelihood.size)

    def latent(self, points: Points) -> Latent:
        weights = points.present.to(points.features.dtype).unsqueeze(2)
        return Latent.read(self.head(pool_points(points.features, weights)))

    def decode(self, z: Tensor, context: Points, target_x: Tensor) -> Decoded:
        return one_expert(self.decoder(z[0], target_x))


class AttentiveNP(NP):
    """A neural process whose targets also read the context by attention.

    Args: as NP, and
        num_heads: of the attention; divides hidden_features.
    Raises:
        ValueError: as NP, and if the heads do not divide.
    Source:
        Kim et al. 2019 (attentive neural processes). Ours shares the features of the points between both paths, and
        has no self-attention.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        hidden_features: int = 128,
        code_features: int = 64,
        decoder_features: int | None = None,
        num_classes: int | None = None,
        num_heads: int = 4,
    ):
        super().__init__(in_features, out_features, hidden_features, code_features, decoder_features, num_classes)
        self.attention = CrossAttention(in_features, hidden_features, num_heads)
        self.from_attention = nn.Linear(hidden_features, self.decoder_features)

    def decode(self, z: Tensor, context: Points, target_x: Tensor) -> Decoded:
        read = self.attention(target_x, context.x, context.features, context.present)
        return one_expert(self.decoder(z[0], target_x, self.from_attention(read)))


def one_expert(raw: Tensor) -> Decoded:
    """(S, B, N, size) of the only decoder."""
    raw = raw.transpose(0, 1).unsqueeze(3)
    return Decoded(raw, raw.new_zeros(raw.shape[:4]))
