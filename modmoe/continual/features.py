"""Frozen feature extractors for PoolClassifier: random, or learned without labels from the first task."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_PATCHES = 100_000  # that the filters are learned from
NUM_SCALED = 2_000  # images that the features' scale is taken from
KMEANS_STEPS = 10
CHUNK = 16  # images at a time: their responses should stay in the CPU's cache (six times as fast as 100)
WHITENING = 0.1  # added to the variances of patches before whitening
MIN_VARIANCE = 1e-3  # of a patch that filters are learned from: flat ones hold nothing but noise
THRESHOLD = 0.5
SCALE_FLOOR = 0.05  # of the mean standard deviation, so that dead features are not blown up


class RandomFeatures(nn.Module):
    """relu(W x + b) with random W and b.

    Args:
        in_features: D, of the flattened input.
        out_features: F.
        seed: of W (normal with variance 2 / D) and b (normal with variance 1/4); no global random state is used.
    Raises:
        ValueError: on a size below 1.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int, seed: int = 0):
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features and out_features must be at least 1, got {in_features} and {out_features}")
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(out_features, in_features, generator=generator) * math.sqrt(2 / in_features)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", 0.5 * torch.randn(out_features, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) with D numbers each -> (B, F)."""
        return F.linear(x.flatten(1), self.weight, self.bias).relu()


class PatchFeatures(nn.Module):
    """One layer of filters learned from patches of the first task, pooled to a coarse grid.

    A patch p is normalised, p' = (p - mean p) / sqrt(var p + epsilon), and whitened; filters are the centres of
    spherical k-means on whitened patches. The responses r of all patches of an image (padded with zeros) give two
    maps for each filter, relu(r - 1/2) and relu(-r - 1/2), averaged over pool x pool regions, then standardised by
    statistics of the first task.

    Args:
        image_size: height and width of the one-channel images, values about in [0, 1].
        num_filters: K.
        patch_size: height and width of a patch.
        pool: regions in each direction.
        stride: of the patches.
        seed: of patches and first centres; no global random state is used.
        epsilon: added to a patch's variance.
    Raises:
        ValueError: on a size below 1, a patch larger than the image, or epsilon <= 0.
    Source:
        Coates & Ng 2012, Learning feature representations with k-means (whitening, spherical k-means, two-sided
        soft threshold); here the filters never see a later task.
    """

    kernel: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    averaging: Tensor
    fitted: Tensor

    def __init__(
        self,
        image_size: int = 28,
        num_filters: int = 100,
        patch_size: int = 6,
        pool: int = 4,
        stride: int = 1,
        seed: int = 0,
        epsilon: float = 0.01,
    ):
        super().__init__()
        if min(image_size, num_filters, patch_size, pool, stride) < 1 or patch_size > image_size:
            raise ValueError(
                "image_size, num_filters, patch_size, pool and stride must be at least 1 and a patch fit the image, "
                f"got {image_size}, {num_filters}, {patch_size}, {pool} and {stride}"
            )
        if epsilon <= 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}")
        self.image_size = image_size
        self.num_filters = num_filters
        self.patch_size = patch_size
        self.pool = pool
        self.stride = stride
        self.seed = seed
        self.epsilon = epsilon
        self.out_features = 2 * num_filters * pool**2
        self.register_buffer("kernel", torch.zeros(num_filters, 1, patch_size, patch_size))
        self.register_buffer("bias", torch.zeros(num_filters))
        self.register_buffer("mean", torch.zeros(self.out_features))
        self.register_buffer("scale", torch.ones(self.out_features))
        places = (image_size + 2 * (patch_size // 2) - patch_size) // stride + 1
        self.register_buffer("averaging", averaging_matrix(places, pool), persistent=False)
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Learn whitening, filters and scale, once, from the first task's inputs; labels are not used.

        Args:
            x: (n, image_size^2) or (n, 1, image_size, image_size).
        Raises:
            ValueError: on a wrong shape, or images without structure (every patch is flat).
            RuntimeError: on a second call.
        """
        if self.fitted:
            raise RuntimeError("PatchFeatures is fitted: other filters would change what earlier tasks see")
        images = self._images(x)
        generator = torch.Generator().manual_seed(self.seed)
        patches = self._normalized_patches(images, generator)
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))
        whiten = (vectors * (values.clamp(min=0) + WHITENING).rsqrt()) @ vectors.T
        filters = spherical_kmeans((patches - mean) @ whiten, self.num_filters, generator)
        kernel = filters @ whiten
        self.bias.copy_(-kernel @ mean)
        # a filter without mean does not see a patch's brightness: only the contrast is left to divide by
        kernel = kernel - kernel.mean(1, keepdim=True)
        self.kernel.copy_(kernel.view_as(self.kernel))
        some = torch.randperm(len(images), generator=generator)[:NUM_SCALED].to(images.device)
        features = self._pooled(images[some])
        std = features.std(0, correction=0)
        self.mean.copy_(features.mean(0))
        self.scale.copy_(1 / (std + SCALE_FLOOR * std.mean()))
        self.fitted.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Features of images.

        Args:
            x: (B, image_size^2) or (B, 1, image_size, image_size).
        Returns:
            (B, 2 * num_filters * pool^2).
        Raises:
            ValueError: on a wrong shape.
            RuntimeError: before :meth:`fit`.
        """
        if not self.fitted:
            raise RuntimeError("PatchFeatures has no filters yet: call fit(x) with the first task's inputs")
        return (self._pooled(self._images(x)) - self.mean) * self.scale

    def _images(self, x: Tensor) -> Tensor:
        size = self.image_size
        if tuple(x.shape[1:]) not in ((size * size,), (1, size, size)):
            raise ValueError(
                f"images of shape (B, {size * size}) or (B, 1, {size}, {size}) are needed, got {tuple(x.shape)}"
            )
        return x.reshape(-1, 1, size, size)

    def _normalized_patches(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """(about NUM_PATCHES, patch_size^2) from random places, flat ones left out."""
        size, places = self.patch_size, self.image_size - self.patch_size + 1
        image, row, column = (
            torch.randint(high, (NUM_PATCHES,), generator=generator).to(images.device)
            for high in (len(images), places, places)
        )
        patches = images[:, 0].unfold(1, size, 1).unfold(2, size, 1)[image, row, column].flatten(1)
        patches = patches[patches.var(1) > MIN_VARIANCE]
        if len(patches) < self.num_filters:
            raise ValueError(f"{self.num_filters} filters need as many patches with structure, got {len(patches)}")
        return (patches - patches.mean(1, keepdim=True)) / (patches.var(1, keepdim=True) + self.epsilon).sqrt()

    def _pooled(self, images: Tensor) -> Tensor:
        """(B, 1, S, S) -> (B, 2 K pool^2), before standardising."""
        features = [self._pooled_chunk(chunk) for chunk in images.split(CHUNK)]
        return torch.cat(features) if features else images.new_zeros(0, self.out_features)

    def _pooled_chunk(self, images: Tensor) -> Tensor:
        size, area = self.patch_size, self.patch_size**2
        padded = F.pad(images, (size // 2,) * 4)
        mean = F.avg_pool2d(padded, size, self.stride)
        square = F.avg_pool2d(padded.square(), size, self.stride)
        variance = (square - mean.square()).clamp(min=0) * (area / max(area - 1, 1))
        contrast = (variance + self.epsilon).rsqrt().flatten(2)
        patches = F.unfold(padded, size, stride=self.stride) * contrast
        responses = self.kernel.flatten(1) @ patches + self.bias.unsqueeze(1)  # (B, K, places)
        # with s the soft threshold: relu(r - 1/2) = (|s| + s) / 2 and relu(-r - 1/2) = (|s| - s) / 2; half the work
        soft = F.softshrink(responses, THRESHOLD)
        signed, absolute = soft @ self.averaging, soft.abs_() @ self.averaging
        return torch.cat([absolute + signed, absolute - signed], 1).flatten(1) / 2


def averaging_matrix(places: int, pool: int) -> Tensor:
    """(places^2, pool^2): multiplied from the right it averages a map over regions, as adaptive_avg_pool2d does."""
    rows = F.adaptive_avg_pool2d(torch.eye(places).unsqueeze(0), (places, pool)).squeeze(0)
    return torch.kron(rows, rows)


class ConcatFeatures(nn.Module):
    """The features of several extractors side by side: (B, ...) -> (B, F_1 + F_2 + ...), each flattened.

    Args:
        modules: extractors of the same input; ``nn.Identity()`` gives the input itself.
    """

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def fit(self, x: Tensor) -> None:
        """Fit the parts that are fitted to the first task."""
        for part in self.parts:
            if isinstance(part, PatchFeatures):
                part.fit(x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x).flatten(1) for part in self.parts], 1)


def spherical_kmeans(x: Tensor, num_centres: int, generator: torch.Generator) -> Tensor:
    """Unit vectors d_k that many rows of x point along: rows go to the d_k with the largest x d_k.

    Args:
        x: (n, D).
        num_centres: K, at most n.
        generator: of the first centres (rows of x), on the CPU.
    Returns:
        (K, D).
    """
    start = torch.randperm(len(x), generator=generator)[:num_centres].to(x.device)
    centres = F.normalize(x[start], dim=1)
    for _ in range(KMEANS_STEPS):
        response, nearest = (x @ centres.T).max(1)
        sums = torch.zeros_like(centres).index_add(0, nearest, x * response.unsqueeze(1))
        centres = F.normalize(sums + 0.01 * centres, dim=1)  # a centre without rows stays where it is
    return centres
