"""A small autoencoder for each class as its gate."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.gating.classwise import ClasswiseRouter
from modmoe.gating.fitted import class_generator
from modmoe.gating.ppca import leading_subspace
from modmoe.growable import RowSpec
from modmoe.rows import Rows

BATCH_SIZE = 128


class AutoencoderRouter(ClasswiseRouter):
    """s_c(x) = -|x - r_c(x)|^2 / (2 width^2), with r_c(x) = A relu(B x + b) + a trained on class c alone.

    Training happens inside :meth:`observe` (Adam on the mean squared error |x - r_c(x + noise)|^2, from the class's
    H // 2 principal directions); the weights are rows of statistics that no later gradient touches. Without noise a
    wide r_c comes close to the identity and rebuilds other classes, too; with it directions in which the class hardly
    varies are pressed towards the class.

    Args:
        in_features: D.
        hidden_features: H.
        epochs: passes over the class's samples.
        learning_rate: of Adam.
        per_class: one autoencoder for each class; False for one for each expert.
        noise: standard deviation of the normal noise on the inputs in training, in units of the features; 0 for none.
        width: in units of the features; 1 makes s_c a log-likelihood with unit variance, but for a constant.
        seed: of weights and batches; no global random state is used.
        top_k: see FittedRouter.
    Raises:
        ValueError: if hidden_features or epochs is below 1, learning_rate or width not positive, or noise negative.
    Source:
        Aljundi et al. 2017, Expert Gate (there one for each task, on the features of a frozen network, without noise;
        see `modmoe.continual.baselines.expert_gate`); Vincent et al. 2008 for the noise.
    """

    streaming = False

    def __init__(
        self,
        in_features: int,
        hidden_features: int = 64,
        epochs: int = 10,
        learning_rate: float = 2e-3,
        per_class: bool = True,
        noise: float = 0.5,
        width: float = 1.0,
        seed: int = 0,
        top_k: int = 1,
    ):
        super().__init__(in_features, per_class, top_k)
        if hidden_features < 1 or epochs < 1:
            raise ValueError(f"hidden_features and epochs must be at least 1, got {hidden_features} and {epochs}")
        if learning_rate <= 0 or width <= 0:
            raise ValueError(f"learning_rate and width must be positive, got {learning_rate} and {width}")
        if noise < 0:
            raise ValueError(f"noise must be at least 0, got {noise}")
        self.hidden_features = hidden_features
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.noise = noise
        self.width = width
        self.seed = seed

    def row_specs(self) -> dict[str, RowSpec]:
        D, H = self.in_features, self.hidden_features
        return {
            **super().row_specs(),
            "encoder": RowSpec((H, D), trainable=False, count=0),
            "encoder_bias": RowSpec((H,), trainable=False, count=0),
            "decoder": RowSpec((D, H), trainable=False, count=0),
            "decoder_bias": RowSpec((D,), trainable=False, count=0),
        }

    def class_score(self, x: Tensor, rows: Rows) -> Tensor:
        names = ("encoder", "encoder_bias", "decoder", "decoder_bias")
        networks = zip(*(rows[name].to(x.dtype) for name in names), strict=True)
        scores = [-0.5 * (x - reconstruct(x, *network)).square().sum(1) / self.width**2 for network in networks]
        return torch.stack(scores, 1) if scores else x.new_zeros(len(x), 0)

    def fit_class(self, old: dict[str, Tensor] | None, x: Tensor, label: int) -> dict[str, Tensor]:
        assert old is None
        generator = class_generator(self.seed, label)
        D, H = self.in_features, self.hidden_features
        mean, encoder = x.mean(0), uniform((H, D), D, generator).to(x)
        decoder = uniform((D, H), H, generator).to(x)
        # a pair of units u and -u is linear: the start reconstructs as H // 2 principal directions do
        rank = min(H // 2, D)
        directions = leading_subspace(x - mean, rank, generator)[1]
        pairs = torch.cat([directions, -directions], 1)
        encoder[: 2 * rank], decoder[:, : 2 * rank], decoder[:, 2 * rank :] = pairs.T, pairs, 0
        network = {"encoder": encoder, "encoder_bias": -encoder @ mean, "decoder": decoder, "decoder_bias": mean}
        for tensor in network.values():
            tensor.requires_grad_()
        optimizer = torch.optim.Adam(network.values(), lr=self.learning_rate)
        with torch.enable_grad():
            for _ in range(self.epochs):
                for batch in torch.randperm(len(x), generator=generator).to(x.device).split(BATCH_SIZE):
                    target = x[batch]
                    noise = self.noise * torch.randn(target.shape, generator=generator).to(x)
                    optimizer.zero_grad()
                    F.mse_loss(reconstruct(target + noise, *network.values()), target).backward()
                    optimizer.step()
        return {"count": x.new_tensor(len(x)), **{name: tensor.detach() for name, tensor in network.items()}}


def reconstruct(x: Tensor, encoder: Tensor, encoder_bias: Tensor, decoder: Tensor, decoder_bias: Tensor) -> Tensor:
    """(T, D) -> (T, D), see AutoencoderRouter."""
    return F.linear(F.linear(x, encoder, encoder_bias).relu(), decoder, decoder_bias)


def uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    """Drawn as ``nn.Linear`` draws: uniform in +-1/sqrt(fan_in)."""
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in)
