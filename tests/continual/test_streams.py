"""The digits' stream: sizes, classes, no leak between training and test."""

import pytest
import torch

from modmoe.continual.streams import split_digits, to_benchmark


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
