"""Frozen feature extractors: by hand, against slow references, fit once, save and load, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from modmoe.continual.features import (
    CHUNK,
    ConcatFeatures,
    PatchFeatures,
    RandomFeatures,
    averaging_matrix,
    spherical_kmeans,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 40, size: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, size, size, generator=generator(seed))


def small(**settings) -> PatchFeatures:
    return PatchFeatures(**{"image_size": 8, "num_filters": 5, "patch_size": 3, "pool": 2, **settings})


# -- random features ---------------------------------------------------------------------------------------------------


def test_random_features_by_hand():
    features = RandomFeatures(2, 2)
    features.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    features.bias.copy_(torch.tensor([0.5, 0.5]))
    # 3 - 1 + .5 and 1 - 3 + .5 < 0
    assert features(torch.tensor([[3.0, 1.0]])).tolist() == [[2.5, 0.0]]


def test_random_features_have_the_scale_of_their_input():
    # W x is normal with variance 2 |x|^2 / D; its positive part has half of the second moment
    x = torch.randn(400, 50, generator=generator())
    features = RandomFeatures(50, 2000)
    features.bias.zero_()
    assert features(x).square().mean().item() == pytest.approx(1.0, rel=0.1)


def test_random_features_are_seeded_and_frozen():
    state = torch.get_rng_state()
    first, again, other = RandomFeatures(4, 3), RandomFeatures(4, 3), RandomFeatures(4, 3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)
    assert not list(first.parameters())


# -- patch features ----------------------------------------------------------------------------------------------------


def test_one_filter_by_hand():
    # One filter (-1, 1; -1, 1) of 2x2 patches of a 2x2 image, padded by 1 to 4x4: 3x3 places. The image is
    # (0, 1; 0, 1). In the middle: mean 1/2, sample variance 4 (1/4) / 3 = 1/3, and with epsilon 2/3 the contrast is 1:
    # r = 2. Elsewhere the patch rows are
    #   top: (0 0; 0 0) r 0, (0 0; 0 1) and (0 0; 1 0) for the corners of the right column; by symmetry below.
    # A patch with a single 1 has variance (1/4 - 1/16) 4/3 = 1/4, contrast 1/sqrt(11/12), r = +-1.044466; the left
    # column of places sees zeros only, r = 0; the right middle place sees (1 0; 1 0), r = -2.
    features = PatchFeatures(image_size=2, num_filters=1, patch_size=2, pool=1, epsilon=2 / 3)
    features.kernel.copy_(torch.tensor([[[[-1.0, 1.0], [-1.0, 1.0]]]]))
    features.fitted.fill_(True)
    single = 1 / math.sqrt(1 / 4 + 2 / 3)
    # responses over threshold 1/2: positive 2 - 1/2 once and single - 1/2 twice, negative the same; nine places
    side = (1.5 + 2 * (single - 0.5)) / 9
    assert_close(features(torch.tensor([[0.0, 1.0, 0.0, 1.0]])), torch.tensor([[side, side]]))


@pytest.mark.parametrize("stride", [1, 2])
def test_features_equal_a_convolution(stride: int):
    features, x = small(stride=stride), images()
    features.fit(x)
    padded = F.pad(x, (1, 1, 1, 1))
    patches = F.unfold(padded, 3, stride=stride)
    deviation = (patches.var(1) + features.epsilon).sqrt().unsqueeze(1)
    normalized = (patches - patches.mean(1, keepdim=True)) / deviation
    size = math.isqrt(patches.shape[2])
    responses = (features.kernel.flatten(1) @ normalized + features.bias.unsqueeze(1)).unflatten(2, (size, size))
    sides = [F.adaptive_avg_pool2d(F.relu(sign * responses - 0.5), 2) for sign in (1, -1)]
    slow = (torch.cat(sides, 1).flatten(1) - features.mean) * features.scale
    assert_close(features(x), slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("places", "pool"), [(8, 4), (9, 4), (29, 4), (5, 5), (3, 1)])
def test_averaging_equals_adaptive_pooling(places: int, pool: int):
    maps = torch.randn(2, 3, places, places, generator=generator())
    assert_close(maps.flatten(2) @ averaging_matrix(places, pool), F.adaptive_avg_pool2d(maps, pool).flatten(2))


def test_features_are_standardised_on_the_first_task():
    features, x = small(), images(300)
    features.fit(x)
    y = features(x)
    assert_close(y.mean(0), torch.zeros(features.out_features), rtol=0, atol=1e-4)
    assert y.std(0).max() <= 1
    assert y.std(0).mean() > 0.8


def test_filters_do_not_see_brightness():
    features, x = small(), images()
    features.fit(x)
    assert_close(features.kernel.sum((1, 2, 3)), torch.zeros(5), rtol=0, atol=1e-5)


def test_spherical_kmeans_finds_directions():
    directions = torch.eye(3)[torch.arange(300) % 3]
    x = directions * (1 + torch.rand(300, 1, generator=generator())) + 0.01 * torch.randn(300, 3, generator=generator())
    centres = spherical_kmeans(x, 3, torch.Generator().manual_seed(1))
    assert_close(centres.norm(dim=1), torch.ones(3))
    best = (x @ centres.T).amax(1) / x.norm(dim=1)
    assert best.mean() > 0.7


def test_shapes_and_chunks():
    features, x = small(), images(2 * CHUNK + 3)
    features.fit(x)
    y = features(x)
    assert y.shape == (2 * CHUNK + 3, features.out_features) == (2 * CHUNK + 3, 2 * 5 * 4)
    assert torch.equal(features(x.flatten(1)), y)
    assert_close(features(x[5:6]), y[5:6], rtol=1e-5, atol=1e-5)
    assert features(x[:0]).shape == (0, features.out_features)


def test_seeded_and_frozen():
    state = torch.get_rng_state()
    first, again, other = small(), small(), small(seed=1)
    for features in (first, again, other):
        features.fit(images())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.kernel, again.kernel)
    assert not torch.equal(first.kernel, other.kernel)
    assert not list(first.parameters())


def test_save_and_load():
    features, x = small(), images()
    features.fit(x)
    loaded = small()
    loaded.load_state_dict(features.state_dict())
    assert torch.equal(loaded(x), features(x))
    with pytest.raises(RuntimeError, match="PatchFeatures is fitted"):
        loaded.fit(x)


def test_fit_happens_once_and_before_forward():
    features = small()
    with pytest.raises(RuntimeError, match=r"no filters yet: call fit\(x\)"):
        features(images())
    features.fit(images())
    before = features.kernel.clone()
    with pytest.raises(RuntimeError, match="other filters would change what earlier tasks see"):
        features.fit(images(seed=1))
    assert torch.equal(features.kernel, before)


def test_bad_images():
    features = small()
    with pytest.raises(ValueError, match=r"shape \(B, 64\) or \(B, 1, 8, 8\) are needed, got \(2, 3, 8, 8\)"):
        features.fit(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="5 filters need as many patches with structure, got 0"):
        features.fit(torch.ones(2, 64))
    assert not features.fitted
    features.fit(images())
    with pytest.raises(ValueError, match=r"got \(2, 63\)"):
        features(torch.zeros(2, 63))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_filters": 0}, "at least 1 and a patch fit the image, got 8, 0, 3, 2 and 1"),
        ({"patch_size": 9}, "at least 1 and a patch fit the image, got 8, 5, 9, 2 and 1"),
        ({"epsilon": 0.0}, "epsilon must be positive, got 0.0"),
    ],
)
def test_bad_settings(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_bad_sizes_of_random_features():
    with pytest.raises(ValueError, match="in_features and out_features must be at least 1, got 0 and 3"):
        RandomFeatures(0, 3)


# -- side by side ------------------------------------------------------------------------------------------------------


def test_concat_by_hand():
    double = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        double.weight.copy_(2 * torch.eye(2))
    assert ConcatFeatures(double, nn.Identity())(torch.tensor([[1.0, 2.0]])).tolist() == [[2.0, 4.0, 1.0, 2.0]]


def test_concat_fits_its_parts():
    features, x = ConcatFeatures(small(), nn.Identity()), images()
    features.fit(x)
    y = features(x)
    assert y.shape == (40, 40 + 64)
    assert torch.equal(y[:, 40:], x.flatten(1))
