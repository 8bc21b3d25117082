"""Under learn2learn's own MetaDataset, Taskset, transforms and loaders."""

import pickle
import random

import numpy as np
import pytest
import torch

from modmoe.meta.families import (
    FiveFamilies,
    FunctionTaskset,
    GaussianProcessFamily,
    LabelledImages,
    benchmark_tasksets,
    few_shot_taskset,
    meta_dataset,
)

learn2learn = pytest.importorskip("learn2learn")


def pictures(num_classes: int, each: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Picture i holds i; its label is i % num_classes + 5."""
    index = torch.arange(num_classes * each)
    return index.float().reshape(-1, 1, 1).expand(-1, 2, 2).clone(), index % num_classes + 5


def test_its_transforms_run_on_our_data_set():
    images, labels = pictures(6, 4)
    dataset = meta_dataset(images, labels)
    assert dataset.labels_to_indices[7] == [2, 8, 14, 20]
    assert dataset.indices_to_labels[8] == 7
    transforms = learn2learn.data.transforms
    steps = [transforms.NWays(dataset, 3), transforms.KShots(dataset, 2), transforms.LoadData(dataset)]
    x, y = learn2learn.data.Taskset(dataset, steps, num_tasks=5)[0]
    assert x.shape == (6, 1, 2, 2)
    assert y.unique(return_counts=True)[1].tolist() == [2, 2, 2]
    assert torch.equal(x[:, 0, 0, 0].long() % 6 + 5, y)
    # our book is the one that it would have made by itself
    theirs = learn2learn.data.MetaDataset(LabelledImages(images, labels))
    assert {k: list(v) for k, v in theirs.labels_to_indices.items()} == dataset.labels_to_indices


def test_a_few_shot_task_parts_into_shots_and_queries():
    images, labels = pictures(6, 5)
    tasks = few_shot_taskset(images[:-2], labels[:-2], ways=4, shots=1, queries=4, num_tasks=20)
    for x, y in tasks:
        number = x[:, 0, 0, 0].long()
        blocks, classes = y.reshape(4, 5), (number % 6).reshape(4, 5)
        assert (blocks == blocks[:, :1]).all()
        assert sorted(blocks[:, 0].tolist()) == [0, 1, 2, 3]
        assert (classes == classes[:, :1]).all()
        assert sorted(classes[:, 0].tolist()) == [0, 1, 2, 3]  # the last two classes have four pictures left
        assert len(x.flatten(1).unique(dim=0)) == 20
        (support, _), (queries, names) = learn2learn.data.partition_task(x, y, shots=1)
        assert len(support) == 4
        assert names.bincount().tolist() == [4] * 4
        assert not (support[:, None] == queries[None]).flatten(2).all(2).any()
    with pytest.raises(ValueError, match="5 ways of 5 pictures each: only 4 of 6 classes have as many"):
        few_shot_taskset(images[:-2], labels[:-2], ways=5, shots=1, queries=4)


def test_functions_as_a_taskset():
    tasks = FunctionTaskset(lambda g: FiveFamilies().sample(1, 5, 7, g).batch, num_tasks=30, seed=1)
    again = FunctionTaskset(lambda g: FiveFamilies().sample(1, 5, 7, g).batch, num_tasks=30, seed=1)
    other = FunctionTaskset(lambda g: FiveFamilies().sample(1, 5, 7, g).batch, num_tasks=30, seed=2)
    assert len(list(tasks)) == len(tasks) == 30
    x, y = tasks[3]
    assert x.shape == y.shape == (12, 1)
    assert tasks.num_context == 5
    assert torch.equal(x[:5], tasks.batch(3).context_x[0])
    assert torch.equal(tasks[3][1], again[3][1])
    assert not torch.equal(x, tasks[4][0])
    # neighbouring seeds share no task
    assert not any(torch.equal(tasks[i][0], other[j][0]) for i in range(5) for j in range(5))
    random.seed(0)
    first = tasks.sample()[0]
    random.seed(0)
    assert torch.equal(again.sample()[0], first)
    assert any(torch.equal(first, tasks[i][0]) for i in range(30))


def test_maml_adapts_on_such_a_task():
    tasks = FunctionTaskset(lambda g: FiveFamilies(["line"]).sample(1, 10, 20, g, "a").batch, num_tasks=5)
    maml = learn2learn.algorithms.MAML(torch.nn.Linear(1, 1), lr=0.3)
    for x, y in tasks:
        learner, loss = maml.clone(), torch.nn.functional.mse_loss
        before = loss(learner(x[10:]), y[10:])
        for _ in range(30):
            learner.adapt(loss(learner(x[:10]), y[:10]))
        assert loss(learner(x[10:]), y[10:]) < max(0.05, 0.5 * before.item())  # noise .01


def test_what_is_no_single_whole_task_is_refused():
    for draw in (
        lambda g: GaussianProcessFamily().sample(2, 3, 4, g).batch,
        lambda g: GaussianProcessFamily().sample(1, (1, 3), 4, g).batch,
    ):
        with pytest.raises(ValueError, match="one task with target_y and without a mask"):
            FunctionTaskset(draw, 3)
    with pytest.raises(ValueError, match="num_tasks is 1 or more"):
        FunctionTaskset(lambda g: GaussianProcessFamily().sample(1, 3, 4, g).batch, 0)
    with pytest.raises(IndexError, match="task 2 of 2"):
        FunctionTaskset(lambda g: GaussianProcessFamily().sample(1, 3, 4, g).batch, 2)[2]
    with pytest.raises(ValueError, match=r"images are \(n, height, width\) and labels \(n,\)"):
        LabelledImages(torch.rand(3, 2), torch.arange(3))


def test_mini_imagenet_through_its_loader(tmp_path):
    """On files of its format: six classes of four pictures."""
    rng = np.random.default_rng(0)
    for part in ("train", "validation", "test"):
        names = {f"n{c}": list(range(4 * c, 4 * c + 4)) for c in range(6)}
        content = {"image_data": rng.integers(0, 256, (24, 84, 84, 3), dtype=np.uint8), "class_dict": names}
        (tmp_path / f"mini-imagenet-cache-{part}.pkl").write_bytes(pickle.dumps(content))
    tasksets = benchmark_tasksets("mini-imagenet", tmp_path, ways=5, shots=2)
    x, y = tasksets.test.sample()
    assert x.shape == (20, 3, 84, 84)
    assert y.unique(return_counts=True)[1].tolist() == [4] * 5


def test_benchmarks_name_what_is_missing(tmp_path):
    (tmp_path / "omniglot-py/images_background").mkdir(parents=True)
    missing = "images_background.zip, omniglot-py/images_evaluation.zip, omniglot-py/images_evaluation missing"
    with pytest.raises(FileNotFoundError, match=missing):
        benchmark_tasksets("omniglot", tmp_path)
    (tmp_path / "mini-imagenet-cache-train.pkl").touch()
    with pytest.raises(FileNotFoundError, match=r"validation\.pkl, mini-imagenet-cache-test\.pkl"):
        benchmark_tasksets("mini-imagenet", tmp_path)
    with pytest.raises(ValueError, match="unknown benchmark 'cifar', choose from omniglot, mini-imagenet"):
        benchmark_tasksets("cifar", tmp_path)
