"""Few-shot classifiers on features of one kind of network, all with about as many parameters.

Axes: B tasks, S support pictures, Q query pictures, W ways, D features.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from modmoe.experiments.sizes import nearest_size
from modmoe.meta import TaskBatch
from modmoe.meta.evidence import BayesianExpertClassifier
from modmoe.meta.families import Episode, nearest_prototype
from modmoe.meta.processes import MoENeuralProcess

Method = Literal["pixel_prototypes", "protonet", "maml", "moe_np", "bem"]
METHODS: list[Method] = ["pixel_prototypes", "protonet", "maml", "moe_np", "bem"]

ABOUT: dict[Method, str] = {
    "pixel_prototypes": "the class whose mean picture is nearest in pixels; nothing is learned",
    "protonet": "prototypical network: the nearest mean of learned features",
    "maml": "MAML: all layers adapt in {steps} steps at learned rates, second order",
    "moe_np": "MoE-NP style process of three experts over learned features",
    "bem": "three Bayesian experts over learned features, weighed by their evidence on the support",
}

FEATURES = 64  # D
PARAMETERS = 50_000  # about, of every learned method: the channels are chosen for it
NUM_EXPERTS = 3
DRAWS, SAMPLES = 2, 16  # of moe_np's latent, in training and in evaluation
INNER_STEPS, INNER_RATE = 3, 0.1


class Embedding(nn.Sequential):
    """Three convolutions that each halve a picture, then a linear map to D features.

    Args:
        size: height and width of the square pictures.
        channels: of each convolution.
        normalise: bring the features of each picture to mean 0 and variance 1.
    """

    def __init__(self, size: int, channels: int, normalise: bool):
        layers: list[nn.Module] = []
        in_channels = 1
        for _ in range(3):
            layers += [
                nn.Conv2d(in_channels, channels, 3, stride=2, padding=1),
                nn.GroupNorm(1, channels),  # unlike BatchNorm it has no statistics that tasks would share
                nn.ReLU(),
            ]
            in_channels, size = channels, math.ceil(size / 2)
        layers += [nn.Flatten(), nn.Linear(channels * size * size, FEATURES)]
        if normalise:
            layers.append(nn.LayerNorm(FEATURES, elementwise_affine=False))
        super().__init__(*layers)

    def tasks(self, pictures: Tensor) -> Tensor:
        """(B, S, H, V) -> (B, S, D)."""
        return self(pictures.flatten(0, 1).unsqueeze(1)).unflatten(0, pictures.shape[:2])


class FewShotModel(nn.Module):
    """(episode) -> log-probabilities of the queries' classes (B, Q, W)."""

    def loss(self, episode: Episode) -> Tensor:
        """() float: cross-entropy of the queries."""
        return F.nll_loss(self(episode).flatten(0, 1), episode.query_y.flatten())


class PixelPrototypes(FewShotModel):
    """Without parameters."""

    def forward(self, episode: Episode) -> Tensor:
        return nearest_prototype(episode).log_softmax(2)


class ProtoNet(FewShotModel):
    """softmax of minus the squared distances to the class means of features (Snell et al. 2017, equations 1 and 2)."""

    def __init__(self, size: int, ways: int, channels: int):
        super().__init__()
        self.embedding = Embedding(size, channels, normalise=False)

    def forward(self, episode: Episode) -> Tensor:
        batch = featured(episode, self.embedding)
        means = batch.context_y.mT @ batch.context_x / batch.context_y.sum(1).unsqueeze(2)
        return (-torch.cdist(batch.target_x, means).square()).log_softmax(2)


class MAMLClassifier(FewShotModel):
    """All layers and a linear head adapt on the support, with a learned rate for each tensor and step.

    Written with torch.func, so that all tasks of a batch adapt at once.
    """

    def __init__(self, size: int, ways: int, channels: int):
        super().__init__()
        self.network = nn.Sequential(Embedding(size, channels, normalise=False), nn.ReLU(), nn.Linear(FEATURES, ways))
        self.names = [name for name, _ in self.network.named_parameters()]
        self.log_rates = nn.Parameter(torch.full((INNER_STEPS, len(self.names)), math.log(INNER_RATE)))

    def forward(self, episode: Episode) -> Tensor:
        adapted = vmap(self._adapt_and_answer)(episode.support_x, episode.support_y, episode.query_x)
        return adapted.log_softmax(2)

    def _adapt_and_answer(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        def loss(weights: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(functional_call(self.network, weights, (support_x.unsqueeze(1),)), support_y)

        weights: dict[str, Tensor] = dict(self.network.named_parameters())
        for rates in self.log_rates.exp():
            gradients = grad(loss)(weights)
            moved = zip(self.names, rates, strict=True)
            weights = {name: weights[name] - rate * gradients[name] for name, rate in moved}
        return functional_call(self.network, weights, (query_x.unsqueeze(1),))


class ProcessClassifier(FewShotModel):
    """A MoENeuralProcess whose points are features with labels."""

    def __init__(self, size: int, ways: int, channels: int):
        super().__init__()
        self.embedding = Embedding(size, channels, normalise=True)
        self.process = MoENeuralProcess(
            FEATURES,
            num_experts=NUM_EXPERTS,
            hidden_features=FEATURES,
            code_features=16,
            decoder_features=24,
            num_classes=ways,
        )

    def forward(self, episode: Episode) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return self.process(featured(episode, self.embedding), SAMPLES, generator).mean.clamp_min(1e-12).log()

    def loss(self, episode: Episode) -> Tensor:
        return self.process.loss(featured(episode, self.embedding), num_samples=DRAWS)


class EvidenceClassifier(FewShotModel):
    """Bayesian experts, each with a feature map of its own on the shared features."""

    def __init__(self, size: int, ways: int, channels: int):
        super().__init__()
        self.embedding = Embedding(size, channels, normalise=True)
        self.experts = BayesianExpertClassifier(FEATURES, NUM_EXPERTS, hidden_features=24, num_features=24)

    def forward(self, episode: Episode) -> Tensor:
        return self.experts(featured(episode, self.embedding)).mean.clamp_min(1e-12).log()


def featured(episode: Episode, embedding: Embedding) -> TaskBatch:
    """The episode as a task whose x are features, (B, S or Q, D)."""
    batch = episode.task_batch()
    support, query = embedding.tasks(episode.support_x), embedding.tasks(episode.query_x)
    return TaskBatch(support, batch.context_y, query, batch.target_y)


def make_model(method: Method, size: int, ways: int, seed: int) -> FewShotModel:
    """An untrained model.

    Args:
        method: which.
        size: height and width of the pictures.
        ways: W.
        seed: of its weights and of its draws in training.
    """
    if method == "pixel_prototypes":
        return PixelPrototypes()
    kinds: dict[Method, Callable[[int, int, int], FewShotModel]] = {
        "protonet": ProtoNet,
        "maml": MAMLClassifier,
        "moe_np": ProcessClassifier,
        "bem": EvidenceClassifier,
    }
    channels = nearest_size(lambda channels: kinds[method](size, ways, channels), PARAMETERS)
    torch.manual_seed(seed)
    return kinds[method](size, ways, channels)
