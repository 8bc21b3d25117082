"""The streams: sizes, classes, no leak between training and test, and what Avalanche makes of them."""

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks.scenarios.generic_scenario import MaskedAttributeError
from avalanche.models import as_multitask
from avalanche.training.plugins import EvaluationPlugin, LwFPlugin
from avalanche.training.supervised import Naive
from torch import nn

from modmoe.continual.datasets import load_images
from modmoe.continual.streams import (
    STREAMS,
    StreamSettings,
    TaskData,
    load_stream,
    num_classes,
    permute_pixels,
    rotate_images,
    rotation,
    shares_classes,
    split_classes,
    split_digits,
    to_benchmark,
    to_online,
)
from modmoe.errors import DataNotFoundError


def test_sizes_and_classes():
    tasks = split_digits(seed=0)
    assert [task.classes for task in tasks] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    # 1,797 images; a quarter of them, rounded up by scikit-learn, is 450
    assert sum(len(task.test_y) for task in tasks) == 450
    assert sum(len(task.train_y) for task in tasks) == 1347
    assert all(task.train_x.min() == 0 and task.train_x.max() == 1 for task in tasks)


def test_a_seed_fixes_the_split_and_another_changes_it():
    first, again, other = split_digits(3), split_digits(3), split_digits(4)
    assert torch.equal(first[2].train_x, again[2].train_x)
    assert not torch.equal(first[2].test_x[:20], other[2].test_x[:20])


def test_training_and_test_images_are_disjoint_draws():
    tasks = split_digits(0)
    total = torch.cat([torch.cat([task.train_x, task.test_x]) for task in tasks])
    assert len(total) == 1797
    assert abs(total.double().mean().item() * 16 - 4.884165) < 1e-4  # the mean pixel of the whole data set


def test_benchmark_holds_the_same_data():
    tasks = split_digits(0, num_tasks=2)
    stream = to_benchmark(tasks).train_stream
    assert len(stream) == 2
    x, y, *_ = stream[1].dataset[7]
    assert torch.equal(x, tasks[1].train_x[7])
    assert int(y) == int(tasks[1].train_y[7])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"num_tasks": 3}, "must divide the 10 classes"), ({"test_share": 1.0}, "test_share must lie in")],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        split_digits(0, **kwargs)


# -- cutting a data set into tasks -------------------------------------------------------------------------


def toy(side=4, num_classes=4, n=8):
    """Random images; as many for training as for the test."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, n, side * side, generator=generator), torch.arange(n) % num_classes
    return TaskData(x[0], y, x[1], y)


def test_split_classes_keeps_every_sample_once():
    data = toy()
    tasks = split_classes(data, 2)
    assert [task.classes for task in tasks] == [[0, 1], [2, 3]]
    assert torch.equal(tasks[1].train_x, data.train_x[[2, 3, 6, 7]])  # the labels are 0 1 2 3 0 1 2 3
    assert torch.equal(tasks[0].test_x, data.test_x[[0, 1, 4, 5]])
    assert not shares_classes(tasks)
    assert num_classes(tasks) == 4


def test_permuted_pixels_are_the_same_pixels_in_another_order():
    data = toy()
    tasks = permute_pixels(data, 3, seed=0)
    assert torch.equal(tasks[0].train_x, data.train_x)
    for task in tasks[1:]:
        assert not torch.equal(task.train_x, data.train_x)
        assert torch.equal(task.train_x.sort(1).values, data.train_x.sort(1).values)
        # one order for all of a task's images: find it on the first training image, apply it to the test images
        order = [int((data.train_x[0] == pixel).nonzero()) for pixel in task.train_x[0]]
        assert torch.equal(task.test_x, data.test_x[:, order])
    assert shares_classes(tasks)
    assert num_classes(tasks) == 4
    assert torch.equal(tasks[2].train_x, permute_pixels(data, 3, seed=0)[2].train_x)
    assert not torch.equal(tasks[2].train_x, permute_pixels(data, 3, seed=1)[2].train_x)


def test_rotation_by_90_degrees_moves_whole_pixels():
    image = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(0))
    turned = (image.flatten(1) @ rotation(90, 28)).view(3, 28, 28)
    torch.testing.assert_close(turned, image.rot90(1, (1, 2)))  # counter-clockwise, as numpy and torch count
    assert torch.equal(rotation(0, 28), torch.eye(784))


def test_rotation_by_hand():
    corner = torch.zeros(3, 3)
    corner[0, 2] = 1  # one pixel right of the centre and one up
    turned = (corner.view(1, 9) @ rotation(45, 3)).view(3, 3)
    # the top centre (0 right, 1 up) is read where it came from, at (.707, .707): .707 * .707 = .5 of the corner,
    # and so is the centre right, (1, 0), which came from (.707, -.707): .707 * 0 of it
    assert turned[0, 1].item() == pytest.approx(0.5, abs=1e-6)
    assert turned[1, 2].item() == pytest.approx(0, abs=1e-6)
    # the corner itself would come from (1.414, 0), beside the frame; nothing reaches the lower rows
    assert turned[1:].abs().sum().item() == pytest.approx(0, abs=1e-6)


def test_rotated_tasks_keep_labels_and_range():
    data = toy(side=6)
    tasks = rotate_images(data, 5)
    assert torch.equal(tasks[0].train_x, data.train_x)
    torch.testing.assert_close(tasks[3].test_x, data.test_x @ rotation(108, 6))  # 3 * 180 / 5
    assert all(torch.equal(task.train_y, data.train_y) for task in tasks)
    assert all(task.train_x.min() >= 0 and task.train_x.max() <= 1 for task in tasks)
    assert shares_classes(tasks)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_classes(toy(), 3), "must divide the 4 classes"),
        (lambda: split_classes(toy(), 0), "must divide the 4 classes"),
        (lambda: split_classes(replace(toy(), train_y=toy().train_y + 1), 2), "classes must be 0, 1, 2"),
        (lambda: permute_pixels(toy(), 0, 0), "at least 1, got 0"),
        (lambda: rotate_images(toy(), 0), "at least 1, got 0"),
        (lambda: rotate_images(replace(toy(), train_x=torch.rand(8, 15)), 2), "15 pixels are no square"),
    ],
)
def test_data_that_cannot_be_cut(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- the named streams -------------------------------------------------------------------------------------

PER_CLASS = 4  # in the made-up folders


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """MNIST, Fashion-MNIST and the animals as files of noise."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for folder in ("MNIST", "FashionMNIST"):
        (root / folder / "raw").mkdir(parents=True)
        for part, per_class in (("train", PER_CLASS), ("t10k", 2)):
            images = rng.integers(0, 256, (10 * per_class, 28, 28), dtype=np.uint8)
            labels = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), per_class))
            for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
                header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
                (root / folder / "raw" / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    (root / "animals").mkdir()
    images, labels = rng.integers(0, 256, (50, 28, 28), dtype=np.uint8), np.arange(50) % 10
    np.savez(root / "animals/animals.npz", images=images, labels=labels, names=["x"] * 10)
    return str(root)


DOMAIN_INCREMENTAL = {"permuted_digits", "rotated_mnist"}


@pytest.mark.parametrize("name", STREAMS)
def test_every_stream(name, root):
    settings = StreamSettings(root=root, limit=3)
    tasks = load_stream(name, 0, settings)
    assert len(tasks) == (3 if name == "mnist_fashion_animals" else 5)
    assert shares_classes(tasks) == (name in DOMAIN_INCREMENTAL)
    assert num_classes(tasks) == (30 if name == "mnist_fashion_animals" else 10)
    for task in tasks:
        assert task.train_x.dtype == torch.float32
        assert 0 <= task.train_x.min() < task.train_x.max() <= 1
        assert task.train_x.shape[1] == task.test_x.shape[1] == (64 if "digits" in name else 784)
        assert task.train_y.dtype == torch.int64
        assert task.train_y.unique(return_counts=True)[1].tolist() == [3] * len(task.classes)  # the limit
        assert task.test_y.unique().tolist() == task.classes
        assert task.test_y.bincount().max() <= 3
        assert not (task.train_x[:, None] == task.test_x).all(2).any()  # no image on both sides
    again, other = load_stream(name, 0, settings), load_stream(name, 1, settings)
    assert all(
        torch.equal(a.train_x, b.train_x) and torch.equal(a.test_y, b.test_y) for a, b in zip(tasks, again, strict=True)
    )
    assert not torch.equal(tasks[-1].train_x, other[-1].train_x)


def test_without_limit_streams_hold_all_of_the_standard_split(root):
    tasks = load_stream("split_mnist", 0, StreamSettings(root=root))
    assert [len(task.train_y) for task in tasks] == [2 * PER_CLASS] * 5
    x = load_images("mnist", root)[0]
    assert sorted(map(tuple, torch.cat([task.train_x for task in tasks]).tolist())) == sorted(map(tuple, x.tolist()))
    assert torch.equal(tasks[2].test_x, load_stream("split_mnist", 9, StreamSettings(root=root))[2].test_x)


def test_domains_have_classes_of_their_own(root):
    tasks = load_stream("mnist_fashion_animals", 0, StreamSettings(root=root))
    assert [task.classes for task in tasks] == [list(range(first, first + 10)) for first in (0, 10, 20)]
    assert torch.equal(tasks[1].test_x, load_images("fashion_mnist", root, train=False)[0])


def test_split_digits_is_the_stream_of_that_name():
    for task, named in zip(split_digits(3), load_stream("split_digits", 3), strict=True):
        assert torch.equal(task.train_x, named.train_x)
        assert torch.equal(task.test_y, named.test_y)


def test_mnist5k_is_learnable_from_few_images():
    tasks = load_stream("split_mnist5k", 0, StreamSettings(test_share=0.2, limit=100))
    train, means = tasks[1], [tasks[1].train_x[tasks[1].train_y == label].mean(0) for label in (2, 3)]
    predicted = torch.cdist(train.test_x, torch.stack(means)).argmin(1) + 2
    assert (predicted == train.test_y).float().mean() > 0.85  # 2 against 3 by the nearest mean; chance is .5


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("split_cifar", {}, "unknown stream 'split_cifar', choose from split_digits"),
        ("split_digits", {"num_tasks": 0}, "must divide the 10 classes, got 0"),
        ("split_digits", {"limit": 0}, "limit must be at least 1, got 0"),
        ("permuted_digits", {"test_share": 1.5}, "test_share must lie in"),
        ("mnist_fashion_animals", {"num_tasks": 5}, "has 3 tasks, got num_tasks=5"),
    ],
)
def test_bad_settings(name, settings, message):
    with pytest.raises(ValueError, match=message):
        load_stream(name, 0, StreamSettings(**settings))


def test_missing_data_are_named(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"fetch_data\.py mnist --root"):
        load_stream("rotated_mnist", 0, StreamSettings(root=str(tmp_path)))


# -- for Avalanche -----------------------------------------------------------------------------------------


def test_experiences_know_their_classes():
    benchmark = to_benchmark(split_classes(toy(), 2))
    assert [exp.classes_in_this_experience for exp in benchmark.train_stream] == [[0, 1], [2, 3]]
    assert [exp.classes_in_this_experience for exp in benchmark.test_stream] == [[0, 1], [2, 3]]
    assert not hasattr(benchmark.train_stream[1], "task_labels")
    assert len(benchmark.train_stream[1].dataset[0]) == 2  # input and class, no task


def test_task_labels_reach_samples_and_experiences():
    tasks = permute_pixels(toy(), 2, seed=0)
    benchmark = to_benchmark(tasks, task_labels=True)
    assert [exp.task_labels for exp in benchmark.test_stream] == [[0], [1]]
    x, y, task = benchmark.train_stream[1].dataset[5]
    assert torch.equal(x, tasks[1].train_x[5])
    assert (int(y), int(task)) == (1, 1)


def test_task_labels_serve_multi_head_models_and_lwf():
    data = load_stream("permuted_digits", 0, StreamSettings(num_tasks=2, limit=30))
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(body=nn.Linear(64, 32), relu=nn.ReLU(), classifier=nn.Linear(32, 10)))
    model: Any = as_multitask(net, "classifier")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    options = {"train_mb_size": 16, "train_epochs": 5, "evaluator": EvaluationPlugin()}
    strategy = Naive(model=model, optimizer=optimizer, plugins=[LwFPlugin(1.0, 2.0)], **options)
    for experience in to_benchmark(data, task_labels=True).train_stream:
        strategy.train(experience)
    model.eval()
    predicted = model(data[1].test_x, torch.ones(len(data[1].test_y), dtype=torch.int64)).argmax(1)
    assert (predicted == data[1].test_y).float().mean() > 0.6  # chance is .1


@pytest.mark.parametrize("wrap", [list, to_benchmark])
def test_online_experiences_cover_each_task_once(wrap):
    tasks = split_classes(toy(n=20), 2)  # 10 samples a task
    experiences = to_online(wrap(tasks), 4, access_task_boundaries=True)
    assert [len(exp.dataset) for exp in experiences] == [4, 4, 2, 4, 4, 2]
    assert [exp.is_first_subexp for exp in experiences] == [True, False, False] * 2
    assert [exp.is_last_subexp for exp in experiences] == [False, False, True] * 2
    for i, task in enumerate(tasks):
        seen = [x for exp in experiences[3 * i : 3 * i + 3] for x, *_ in exp.dataset]
        assert sorted(x.tolist() for x in seen) == sorted(task.train_x.tolist())


def test_the_last_online_experience_is_marked_when_the_size_divides_the_task():
    experiences = to_online(split_classes(toy(n=20), 2), 5, access_task_boundaries=True)
    assert [exp.is_last_subexp for exp in experiences] == [False, True, False, True]


def test_online_boundaries_are_hidden_unless_asked_for():
    hidden, shown = (to_online([toy()], 4, access_task_boundaries=access)[1].train() for access in (False, True))
    assert shown.is_last_subexp
    with pytest.raises(MaskedAttributeError):
        _ = hidden.is_last_subexp


def test_online_order_follows_the_seed():
    first, again, other = (
        [int(y) for exp in to_online([toy(n=40)], 7, seed=s) for _, y in exp.dataset] for s in (0, 0, 1)
    )
    assert first == again != other
    kept = to_online([toy(n=40)], 7, shuffle=False)
    assert [int(y) for exp in kept for _, y in exp.dataset] == (torch.arange(40) % 4).tolist()
    with pytest.raises(ValueError, match="experience_size must be at least 1, got 0"):
        to_online([toy()], 0)
