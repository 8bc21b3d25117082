"""Episodes: who is in them, who is not, and the pixel prototypes by hand."""

import math

import pytest
import torch
from torch import Tensor

from modmoe.meta.families import Episode, FewShotImages, nearest_prototype, split_classes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(counts: list[int], side: int = 1) -> tuple[Tensor, Tensor]:
    """Pictures that hold nothing but their own number; class c has the label 10 c and counts[c] of them, shuffled."""
    labels = torch.cat([torch.full((count,), 10 * c) for c, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=seeded())]
    return torch.arange(len(labels)).float().reshape(-1, 1, 1).expand(-1, side, side).clone(), labels


def test_prototypes_by_hand():
    support = torch.tensor([0.0, 2.0, 5.0, 7.0]).reshape(1, 4, 1, 1)
    query = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)
    classes = torch.zeros(1, 2).long()
    episode = Episode(support, torch.tensor([[0, 0, 1, 1]]), query, torch.tensor([[0, 0]]), 2, classes, classes)
    # means 1 and 6; 3 is 2 and 3 away, 4 is 3 and 2
    torch.testing.assert_close(nearest_prototype(episode), torch.tensor([[[-4.0, -9.0], [-9.0, -4.0]]]))
    assert episode.accuracy(nearest_prototype(episode)).tolist() == [0.5]
    batch = episode.task_batch()
    assert batch.context_x.shape == (1, 4, 1)
    assert batch.context_y[0].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert batch.target_y is not None
    assert batch.target_y[0].tolist() == [[1, 0], [1, 0]]


def test_an_episode_holds_what_it_says():
    images, labels = numbered([6, 9, 5, 7, 6])
    episode = FewShotImages(images, labels).sample(200, 3, 2, 3, seeded())
    assert episode.support_x.shape == (200, 6, 1, 1)
    assert episode.query_x.shape == (200, 9, 1, 1)
    assert episode.support_y[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert episode.query_y[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    index = torch.cat([episode.support_x, episode.query_x], 1).flatten(1).long()
    label = torch.cat([episode.support_y, episode.query_y], 1)
    assert torch.equal(labels[index], episode.classes.gather(1, label))
    for task in range(200):
        assert len(index[task].unique()) == 15  # nothing twice, no query picture in the support
        assert len(episode.classes[task].unique()) == 3


def test_classes_and_pictures_are_drawn_evenly():
    images, labels = numbered([4, 8])
    episode = FewShotImages(images, labels).sample(4000, 2, 1, 1, seeded())
    first = (episode.classes[:, 0] == 0).sum()
    assert abs(first - 2000) < 4 * math.sqrt(1000)
    counts = episode.support_x.flatten().long().bincount(minlength=12)
    expected = torch.where(labels == 0, 1000.0, 500.0)  # 4000 among 4 and among 8
    assert ((counts - expected).abs() < 4 * expected.sqrt()).all()


def test_classes_with_too_few_pictures_are_left_out():
    images, labels = numbered([3, 2, 3, 1])
    episode = FewShotImages(images, labels).sample(50, 2, 1, 2, seeded())
    assert set(episode.classes.flatten().tolist()) == {0, 20}
    with pytest.raises(ValueError, match="3 ways of 3 pictures each: only 2 of 4 classes have as many"):
        FewShotImages(images, labels).sample(1, 3, 1, 2)


def test_rotations_are_classes_of_their_own():
    images = torch.rand(8, 3, 3)
    images[:, 0, 0] = 2  # the corner tells the turn
    images[:, 0, 2] = images[:, 2, 0] = images[:, 2, 2] = 0
    data = FewShotImages(images, torch.arange(8) % 2, rotations=True)
    assert data.num_classes == 8
    episode = data.sample(300, 8, 1, 2, seeded())
    pairs = 4 * episode.classes + episode.turns
    assert torch.equal(pairs.sort(1).values, torch.arange(8).expand(300, 8))
    corner = {0: (0, 0), 1: (2, 0), 2: (2, 2), 3: (0, 2)}  # a quarter turn against the clock
    for turn, (row, column) in corner.items():
        turned = episode.turns.gather(1, episode.query_y) == turn
        assert (episode.query_x[turned][:, row, column] == 2).all()
    # turned back, they are the pictures they were
    back = torch.rot90(episode.support_x[episode.turns == 3], -3, (1, 2))
    assert (back.unsqueeze(1) == images).all(3).all(2).any(1).all()


def test_equal_seeds_give_equal_episodes():
    data = FewShotImages(*numbered([9] * 7, side=2), rotations=True)
    one, again, other = (data.sample(4, 5, 1, 2, seeded(s)) for s in (1, 1, 2))
    for name in ("support_x", "query_x", "classes", "turns"):
        assert torch.equal(getattr(one, name), getattr(again, name))
    assert not torch.equal(one.query_x, other.query_x)
    moved = one.to("cpu")
    assert moved.num_tasks == 4
    assert torch.equal(moved.query_x, one.query_x)


def test_an_empty_support():
    episode = FewShotImages(*numbered([3] * 4)).sample(5, 3, 0, 2, seeded())
    assert episode.support_x.shape == (5, 0, 1, 1)
    assert episode.task_batch().context_x.shape == (5, 0, 1)
    with pytest.raises(ValueError, match="an empty support has no prototypes"):
        nearest_prototype(episode)


def test_prototypes_separate_what_pixels_separate():
    middles = torch.randn(6, 1, 4, 4, generator=seeded())
    images = (middles + 0.3 * torch.randn(6, 20, 4, 4, generator=seeded(1))).flatten(0, 1)
    data = FewShotImages(images, torch.arange(6).repeat_interleave(20))
    episode = data.sample(50, 5, 5, 5, seeded())
    assert episode.accuracy(nearest_prototype(episode)).mean() > 0.98
    shuffled = FewShotImages(images, torch.arange(120) % 6).sample(200, 5, 5, 1, seeded())
    assert shuffled.accuracy(nearest_prototype(shuffled)).mean() < 0.3  # chance is .2


def test_classes_are_split_without_overlap():
    labels = torch.randint(40, (900,), generator=seeded()) * 3
    train, test = split_classes(labels, 0.3, seed=4)
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(900))
    assert not set(labels[train].tolist()) & set(labels[test].tolist())
    assert len(labels[test].unique()) == 12  # .3 * 40
    assert torch.equal(split_classes(labels, 0.3, seed=4)[1], test)
    assert not torch.equal(split_classes(labels, 0.3, seed=5)[1], test)
    assert [len(part) for part in split_classes(torch.tensor([1, 2]), 0.01, 0)] == [1, 1]


def test_bad_input():
    images, labels = numbered([3, 3])
    with pytest.raises(ValueError, match=r"images are float \(n, height, width\)"):
        FewShotImages(images.byte(), labels)
    with pytest.raises(ValueError, match=r"got torch.float32 \(6, 1, 1\) and \(5,\)"):
        FewShotImages(images, labels[:5])
    with pytest.raises(ValueError, match=r"only square pictures can be turned, these are \(1, 2\)"):
        FewShotImages(torch.rand(6, 1, 2), labels, rotations=True)
    for sizes in ((0, 2, 1, 1), (1, 1, 1, 1), (1, 2, -1, 1), (1, 2, 1, 0)):
        with pytest.raises(ValueError, match="ways 2 or more and shots 0 or more"):
            FewShotImages(images, labels).sample(*sizes)
    with pytest.raises(ValueError, match=r"test_share lies in \(0, 1\), got 1"):
        split_classes(labels, 1, 0)
    with pytest.raises(ValueError, match="one class cannot be split"):
        split_classes(torch.zeros(4).long(), 0.5, 0)
