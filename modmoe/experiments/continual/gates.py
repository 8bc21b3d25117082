"""The gates by name, and what the report calls them."""

from collections.abc import Callable
from dataclasses import dataclass

from modmoe.continual.baselines import expert_gate
from modmoe.gating import (
    AutoencoderRouter,
    FittedRouter,
    GaussianRouter,
    LearnedRouter,
    PPCARouter,
    PrototypeRouter,
    StickRouter,
)


@dataclass(frozen=True)
class GateInput:
    """What a gate has to know of the data.

    Args:
        num_features: that gate and experts read.
        num_pixels: of these; they stand last.
        num_classes: of the whole stream.
        regularization: of the Gaussian gates' variances.
        em_iterations: of mixtures of probabilistic PCA.
        noise_floor: of these.
    """

    num_features: int
    num_pixels: int
    num_classes: int
    regularization: float
    em_iterations: int
    noise_floor: float

    @property
    def pixels(self) -> tuple[int, int] | None:
        """The columns of the pixels where there are others, or None."""
        first = self.num_features - self.num_pixels
        return (first, self.num_features) if first else None


def _mixture(settings: GateInput, num_features: int) -> PPCARouter:
    return PPCARouter(num_features, iterations=settings.em_iterations, noise_floor=settings.noise_floor)


GATES: dict[str, Callable[[GateInput], FittedRouter]] = {
    "gaussian": lambda i: GaussianRouter(i.num_features, regularization=i.regularization),
    "gaussian_per_expert": lambda i: GaussianRouter(i.num_features, False, regularization=i.regularization),
    "prototype": lambda i: PrototypeRouter(i.num_features),
    "ppca": lambda i: _mixture(i, i.num_features),
    "autoencoder": lambda i: AutoencoderRouter(i.num_features),
    "expert_gate": lambda i: expert_gate(i.num_features),
    "learned": lambda i: LearnedRouter(i.num_features, _mixture(i, i.num_features)),
    "stick": lambda i: StickRouter(i.num_features, i.num_classes),
    "stick_density": lambda i: StickRouter(
        i.num_features, i.num_classes, density=_mixture(i, i.num_pixels), density_slice=i.pixels
    ),
}
GATE_NAMES = {
    "gaussian": "Gaussian for each class",
    "gaussian_per_expert": "one Gaussian for each expert",
    "prototype": "nearest class mean",
    "ppca": "mixture of probabilistic PCA for each class",
    "autoencoder": "autoencoder for each class",
    "expert_gate": "autoencoder for each task, as in Expert Gate, but chosen sample by sample",
    "learned": "network for each expert, trained until it settles against draws from older densities",
    "stick": "frozen heads, newest first",
    "stick_density": "frozen heads, newest first, with a mixture of probabilistic PCA for each class",
}
