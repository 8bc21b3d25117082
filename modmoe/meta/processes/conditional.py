"""Conditional neural processes: the context becomes one code, and the targets are independent given it."""

import torch
from torch import Tensor

from modmoe.meta.predictive import Predictive
from modmoe.meta.processes.base import NeuralProcess
from modmoe.meta.processes.decoder import PointDecoder
from modmoe.meta.processes.encoder import PointEncoder, pool_points
from modmoe.meta.task_batch import TaskBatch


class MDNCNP(NeuralProcess):
    """p(y_i | x_i, context) = sum_k g_k(x_i, r) N(y_i; f_k(x_i, r)), r the mean of the context's features.

    One decoder gives all K components and their gate; with classes, the components are distributions over these.

    Args:
        in_features: D.
        out_features: M, for regression.
        num_components: K >= 1.
        hidden_features: H of the encoder.
        decoder_features: H of the decoder; None for the encoder's.
        num_classes: None for regression; see NeuralProcess.
    Raises:
        ValueError: as NeuralProcess, and if K < 1.
    Source:
        Mixture density networks, Bishop 1994, on the code of a CNP.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        num_components: int = 3,
        hidden_features: int = 128,
        decoder_features: int | None = None,
        num_classes: int | None = None,
    ):
        super().__init__(in_features, out_features, num_classes)
        if num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {num_components}")
        self.num_components = num_components
        self.num_scores = num_components if num_components > 1 else 0  # one component needs no gate
        self.encoder = PointEncoder(in_features, self.likelihood.out_features, hidden_features)
        size = self.num_scores + num_components * self.likelihood.size
        decoder_features = hidden_features if decoder_features is None else decoder_features
        self.decoder = PointDecoder(hidden_features + 1, in_features, decoder_features, size)

    @property
    def objectives(self) -> tuple[str, ...]:
        return ("exact",)

    def forward(self, batch: TaskBatch, num_samples: int = 32, generator: torch.Generator | None = None) -> Predictive:
        self.check(batch, num_samples)
        x, y = batch.clean_context()
        everyone = batch.present.to(x.dtype).unsqueeze(2)
        numbers = self.decoder(pool_points(self.encoder(x, y), everyone), batch.target_x).transpose(0, 1)
        scores, raw = numbers.tensor_split([self.num_scores], -1)
        if not self.num_scores:
            scores = numbers.new_zeros(*numbers.shape[:3], 1)
        return self.likelihood.predictive(raw.unflatten(3, (self.num_components, -1)), scores.log_softmax(-1))

    def loss(
        self,
        batch: TaskBatch,
        objective: str = "exact",
        num_samples: int = 4,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        target_y = self.check_training(batch, objective, num_samples)
        return -self(batch).log_marginal(target_y).mean()


class CNP(MDNCNP):
    """p(y_i | x_i, context) = N(y_i; f(x_i, r)) with r the mean of the context's features.

    Args:
        in_features: D.
        out_features: M, for regression.
        hidden_features: H of the encoder.
        decoder_features: H of the decoder; None for the encoder's.
        num_classes: None for regression; see NeuralProcess.
    Raises:
        ValueError: as NeuralProcess.
    Source:
        Garnelo et al. 2018 (CNP), equations 1 to 4. Ours adds a number for the size of the context to r.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        hidden_features: int = 128,
        decoder_features: int | None = None,
        num_classes: int | None = None,
    ):
        super().__init__(in_features, out_features, 1, hidden_features, decoder_features, num_classes)
