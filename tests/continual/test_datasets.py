"""Reading IDX files and image folders: by hand-made files, and what is said about damaged or missing ones."""

import gzip

import numpy as np
import pytest
import torch

from modmoe.continual.datasets import (
    load_digits,
    load_images,
    load_mnist5k,
    read_idx,
    stratified_split,
)
from modmoe.errors import DataNotFoundError


def idx(array):
    """The array as an IDX file of bytes."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_images(root, name, train=30, test=20, pack=False):
    """A folder as torchvision leaves it: random images, labels 0, 1, ..., 9, 0, ...."""
    rng, folder = np.random.default_rng(0), root / name / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", (np.arange(count) % 10).astype(np.uint8))):
            name = folder / f"{part}-{kind}-ubyte"
            if pack:
                name.with_name(name.name + ".gz").write_bytes(gzip.compress(idx(array), mtime=0))
            else:
                name.write_bytes(idx(array))


def write_animals(root, per_class=5):
    images = np.random.default_rng(0).integers(0, 256, (10 * per_class, 28, 28), dtype=np.uint8)
    (root / "animals").mkdir()
    np.savez(root / "animals/animals.npz", images=images, labels=np.repeat(np.arange(10), per_class), names=["x"] * 10)
    return images


def test_read_idx_by_hand(tmp_path):
    # unsigned bytes (8), two dimensions, 2 rows of 3, and 256 is 0x0100: the sizes are big-endian
    (tmp_path / "a").write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes([1, 2, 3, 4, 5, 255]))
    assert read_idx(tmp_path / "a").tolist() == [[1, 2, 3], [4, 5, 255]]
    (tmp_path / "b").write_bytes(bytes([0, 0, 8, 1, 0, 0, 1, 0]) + bytes(256))
    assert read_idx(tmp_path / "b").shape == (256,)


def test_read_idx_unpacks_gzip_whatever_the_name(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "packed").write_bytes(gzip.compress(idx(array), mtime=0))
    assert np.array_equal(read_idx(tmp_path / "packed"), array)


GOOD = idx(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no IDX file of bytes: it starts with nothing"),
        (b"<html>", "no IDX file of bytes: it starts with 3c 68 74 6d"),
        (b"\0\0\x0d" + GOOD[3:], "no IDX file of bytes"),  # 13 stands for 4-byte floats
        (b"\0\0\x08\0", "no IDX file of bytes"),
        (GOOD[:-1], r"holds 17 bytes, its header \(2, 3\) asks for 18"),  # 4 + 2 * 4 + 2 * 3
        (GOOD + b"\0", "holds 19 bytes"),
        (GOOD[:9], "holds 9 bytes"),
        (gzip.compress(GOOD, mtime=0)[:-9], "damaged gzip"),  # without a time: workers must name a case alike
        (b"\x1f\x8bnonsense", "damaged gzip"),
    ],
)
def test_read_idx_refuses_damaged_files(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "file")


@pytest.mark.parametrize("pack", [False, True])
def test_images_come_flat_between_0_and_1(tmp_path, pack):
    write_images(tmp_path, "FashionMNIST", pack=pack)
    x, y = load_images("fashion_mnist", tmp_path, train=True)
    assert x.shape == (30, 784)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    raw = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    assert x[4, 29].item() == pytest.approx(raw[4, 1, 1] / 255)  # 29 = 1 * 28 + 1
    assert y[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert len(load_images("fashion_mnist", tmp_path, train=False)[0]) == 20


def test_animals_are_split_by_class_and_always_alike(tmp_path):
    images = write_animals(tmp_path, per_class=5)
    (train, train_y), (test, test_y) = (load_images("animals", tmp_path, train) for train in (True, False))
    assert train_y.bincount().tolist() == [4] * 10  # 80% of 5
    assert test_y.bincount().tolist() == [1] * 10
    both = torch.cat([train, test]).mul(255).round().to(torch.uint8).numpy()
    assert {row.tobytes() for row in both} == {image.tobytes() for image in images}
    assert torch.equal(test, load_images("animals", tmp_path, False)[0])


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "animals"])
def test_missing_data_name_the_command(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataNotFoundError, match=rf"python scripts/fetch_data\.py {name}$"):
        load_images(name)
    with pytest.raises(FileNotFoundError, match=rf"fetch_data\.py {name} --root elsewhere$"):
        load_images(name, "elsewhere")


def test_bad_names_and_files_that_do_not_match(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'cifar', choose from mnist"):
        load_images("cifar", tmp_path)
    write_images(tmp_path, "MNIST")
    (tmp_path / "MNIST/raw/train-labels-idx1-ubyte").write_bytes(idx(np.zeros(29, np.uint8)))
    with pytest.raises(ValueError, match=r"images of shape \(30, 28, 28\) for 29 labels"):
        load_images("mnist", tmp_path)


def test_mnist5k_holds_500_real_images_of_each_class():
    x, y = load_mnist5k()
    assert x.shape == (5000, 784)
    assert y.bincount().tolist() == [500] * 10
    assert (x.min(), x.max()) == (0, 1)
    # MNIST's mean pixel is 0.1307; a sample of 5,000 comes within 0.005
    assert abs(x.mean().item() - 0.1307) < 0.005


def test_digits_and_their_split():
    x, y = load_digits()
    assert x.shape == (1797, 64)
    train, test = stratified_split(y, 0.25, seed=0)
    assert sorted(torch.cat([train, test]).tolist()) == list(range(1797))
    assert len(test) == 450  # a quarter is 449.25, rounded up
    with pytest.raises(ValueError, match="test_share must lie in"):
        stratified_split(y, 0.0, seed=0)
