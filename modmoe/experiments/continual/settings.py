"""The settings of a continual-learning run."""

from dataclasses import dataclass, field
from typing import Literal

from modmoe.continual.strategies import Baseline

Gate = Literal[
    "gaussian",
    "gaussian_per_expert",
    "prototype",
    "ppca",
    "autoencoder",
    "expert_gate",
    "learned",
    "stick",
    "stick_density",
]
Network = Baseline | Literal["pnn"]
StreamName = Literal[
    "split_digits",
    "permuted_digits",
    "split_mnist5k",
    "split_mnist",
    "split_fashion",
    "online_mnist",
    "rotated_mnist",
    "mnist_fashion_animals",
]


@dataclass
class ContinualSettings:
    """What can be set; what has no effect on a method is ignored by it.

    Args:
        stream: the data, cut into tasks.
        num_tasks: number of tasks; null for the stream's own.
        test_share: share of each class kept for the test, where the data come without a split.
        root: folder of the images that scripts/fetch_data.py gets.
        limit: at most so many images of each class; null for all.
        features: what gates, experts and baselines read: the pixels, or besides them random units, or the responses
            of filters that are learned from the first task's images and frozen (28x28 images only).
        num_filters: of these, or random units.
        filter_images: images of the first task that the filters are learned from; null for all.
        gate: the gate of the method ``pool``, named before the run.
        other_gates: gates that run besides, as ``pool_<gate>``.
        baselines: Avalanche's methods that run besides.
        regularization: added to the Gaussian gates' variances, in squared units of the inputs.
        em_iterations: of the fit of mixtures of probabilistic PCA.
        noise_floor: added to the variances of mixtures of probabilistic PCA, in squared units of the inputs.
        expert: MLPs on the features, or small convolutional networks (5x5 kernels, stride 2) on the pixels; the
            baselines are networks of the same kind.
        hidden_features: hidden size of an MLP expert.
        channels: of a convolutional expert's layers.
        expert_features: output size of an expert, which its head rows read.
        epochs: passes over each task.
        batch_size: samples in a training step.
        learning_rate: of Adam.
        memory: samples that ``replay`` and ``gdumb`` store.
        experience_size: samples in each experience of a single pass without task boundaries, in which new experts
            are grown for novel data; null for whole tasks. Needs tasks of different classes.
    """

    stream: StreamName = "split_digits"
    num_tasks: int | None = None
    test_share: float = 0.25
    root: str = "data"
    limit: int | None = None
    features: Literal["pixels", "random", "patches"] = "pixels"
    num_filters: int = 100
    filter_images: int | None = None
    gate: Gate = "gaussian"
    other_gates: list[Gate] = field(default_factory=lambda: ["gaussian_per_expert", "prototype"])
    baselines: list[Network] = field(default_factory=lambda: ["naive", "replay", "joint"])
    regularization: float = 0.01
    em_iterations: int = 4
    noise_floor: float = 0.002
    expert: Literal["mlp", "conv"] = "mlp"
    hidden_features: int = 32
    channels: list[int] = field(default_factory=lambda: [16, 32])
    expert_features: int = 32
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 0.003
    memory: int = 200
    experience_size: int | None = None

    def __post_init__(self) -> None:
        if self.gate in self.other_gates:
            raise ValueError(f"the gate '{self.gate}' is the main one already: take it out of other_gates")
        refused = sorted({"gdumb", "lwf", "pnn"} & set(self.baselines)) if self.experience_size else []
        if refused:
            raise ValueError(f"{refused} need whole tasks: take them out of baselines, or set experience_size to null")
