"""Image completion: pixels as points, by hand and back."""

import math

import pytest
import torch

from modmoe.meta.families import ImageCompletion


def test_a_picture_by_hand():
    tasks = ImageCompletion(torch.tensor([[[0, 51, 102], [153, 204, 255]]], dtype=torch.uint8))
    batch = tasks.tasks(torch.tensor([0]), 6, torch.Generator().manual_seed(0))
    # rows at -1 and 1, columns at -1, 0 and 1; 51 is a fifth of 255
    assert batch.target_x[0].tolist() == [[-1, -1], [-1, 0], [-1, 1], [1, -1], [1, 0], [1, 1]]
    assert batch.target_y is not None
    assert batch.target_y.flatten().tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    # all six pixels are shown, in some order, each with its own grey: 3 (row + 1) / 2 + column + 1, times .2
    row, column = batch.context_x[0].unbind(1)
    torch.testing.assert_close(batch.context_y[0, :, 0], 0.2 * (1.5 * (row + 1) + column + 1))
    assert len(batch.context_x[0].unique(dim=0)) == 6


def test_pictures_come_back():
    images = torch.rand(7, 5, 4)
    tasks = ImageCompletion(images)
    index = torch.tensor([3, 0, 3])
    batch = tasks.tasks(index, (0, 20), torch.Generator().manual_seed(0))
    assert batch.target_y is not None
    assert torch.equal(tasks.to_images(batch.target_y), images[index])
    shown = tasks.context_images(batch)
    there = ~shown.isnan()
    assert torch.equal(there.flatten(1).sum(1), batch.present.sum(1))
    assert torch.equal(shown[there], images[index][there])


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1)])
def test_sides_of_one_pixel(shape):
    tasks = ImageCompletion(torch.rand(2, *shape))
    batch = tasks.sample(3, shape[0] * shape[1])
    assert batch.target_y is not None
    assert torch.equal(tasks.context_images(batch), tasks.to_images(batch.target_y))


@pytest.mark.parametrize("context", [0, 1])
def test_empty_and_one_pixel_contexts(context):
    tasks = ImageCompletion(torch.rand(2, 3, 3))
    batch = tasks.sample(4, context)
    assert batch.context_x.shape == (4, context, 2)
    assert (~tasks.context_images(batch).isnan()).sum() == 4 * context


def test_every_pixel_and_picture_is_drawn_equally_often():
    tasks = ImageCompletion((torch.arange(12) / 12).reshape(3, 2, 2))
    batch = tasks.sample(6000, 1, torch.Generator().manual_seed(0))
    counts = (batch.context_y.flatten() * 12).round().long().bincount(minlength=12)
    assert (counts - 500).abs().max() < 4 * math.sqrt(6000 / 12 * 11 / 12)


def test_equal_seeds_give_equal_tasks():
    tasks = ImageCompletion(torch.rand(9, 4, 4))
    one, again, other = (tasks.sample(5, (1, 9), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one.context_x, again.context_x)
    assert torch.equal(one.present, again.present)
    assert not torch.equal(one.context_x, other.context_x)


def test_bad_pictures_and_contexts():
    with pytest.raises(ValueError, match=r"images are \(n, height, width\) with a pixel at least, got \(2, 3\)"):
        ImageCompletion(torch.rand(2, 3))
    with pytest.raises(ValueError, match="float within"):
        ImageCompletion(torch.full((1, 2, 2), 1.5))
    with pytest.raises(ValueError, match="float within"):
        ImageCompletion(torch.full((1, 2, 2), math.nan))
    with pytest.raises(ValueError, match="a picture has 4 pixels, asked for 5"):
        ImageCompletion(torch.rand(1, 2, 2)).sample(1, 5)
    with pytest.raises(ValueError, match="num_tasks is 1 or more, got 0"):
        ImageCompletion(torch.rand(1, 2, 2)).sample(0, 1)
