"""The recipe for images: equal cost, equal after an interruption, each kind of data, several processes."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from modmoe.cli import main
from modmoe.errors import CheckpointError
from modmoe.experiments.vision import VisionConfig
from modmoe.experiments.vision.data import load_data, training_order
from modmoe.experiments.vision.methods import build
from modmoe.experiments.vision.training import Training, cosine_with_warmup
from modmoe.vision import active_flops

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "vision").glob("*.yaml"))
DIGITS = next(path for path in CONFIGS if path.stem == "digits")
METHODS = ["dense", "vmoe", "soft_moe"]
SMALL = {
    "num_train": 120,
    "num_test": 60,
    "epochs": 2,
    "warmup_epochs": 1,
    "features": 16,
    "depth": 2,
    "batch_size": 30,
}
SMALL |= {"blocks": "last-1", "num_experts": 4, "hidden_features": 48}


def settings_of(path):
    settings = yaml.safe_load(path.read_text())
    assert settings.pop("experiment") == "vision"
    assert settings.pop("seeds") >= 1
    return VisionConfig(**settings)


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_the_schedule_by_hand():
    factors = [cosine_with_warmup(step, 6, 2) for step in range(6)]
    # two steps up, then (1 + cos(pi t)) / 2 at t = 0, 1/4, 1/2, 3/4
    assert factors == pytest.approx([0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_processes_share_each_batch():
    whole = training_order(10, 4, seed=3)
    assert [len(batch) for batch in whole] == [4, 4]
    assert len({place for batch in whole for place in batch}) == 8
    shares = [training_order(10, 4, 3, rank, 2) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert sorted(shares[0][number] + shares[1][number]) == sorted(batch)
    assert [len(batch) for batch in training_order(3, 8, 0)] == [3]
    with pytest.raises(ValueError, match="batches of 2 images cannot be shared by 3 processes"):
        training_order(10, 2, 0, 0, 3)


def test_the_methods_of_the_digits_cost_exactly_the_same():
    config = settings_of(DIGITS)
    data = load_data(config, 0)
    flops = {method: active_flops(build(method, config, data)) for method in METHODS}
    # 16 tokens of 64: patches 2 * 16 * 4 * 64, attention 4 * (8 * 16 * 64^2 + 4 * 16^2 * 64), feed-forward
    # 4 * 4 * 16 * 64 * 128, head 2 * 64 * 10
    expected = 8_192 + 4 * (524_288 + 65_536) + 2_097_152 + 1_280
    assert flops == dict.fromkeys(METHODS, expected)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_is_of_equal_cost(path):
    assert path.read_text().startswith("#"), "a header says cost, seeds and the last result"
    config = settings_of(path)
    sizes = {"digits": (1, 8), "mnist": (1, 28), "image_folder": (3, config.image_size)}
    shape = dict(zip(("in_channels", "image_size"), sizes[config.data], strict=True))
    data = load_data(VisionConfig(), 0)._replace(**shape)
    with torch.device("meta"):  # nothing is computed
        flops = [active_flops(build(method, config, data)) for method in config.methods]
    assert max(flops) <= 1.01 * min(flops)  # rounding of the experts' sizes


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("vision")
    options = [text for key, value in SMALL.items() for text in (f"--{key}", str(value))]
    assert main(["run", str(DIGITS), "--seeds", "1", "--out", str(out), *options]) == 0
    return json.loads((out / "metrics.json").read_text())["methods"], out


def test_methods_and_metrics(results):
    methods, out = results
    assert list(methods) == METHODS
    for metrics in methods.values():
        assert set(metrics) == {"accuracy", "train_seconds", "parameters", "active_parameters", "active_flops"}
    assert len({metrics["active_flops"]["mean"] for metrics in methods.values()}) == 1
    assert methods["vmoe"]["active_parameters"]["mean"] < methods["vmoe"]["parameters"]["mean"]
    assert "experts of each class, blocks.1.mlp" in (out / "report.html").read_text()
    assert list((out / "tensorboard" / "seed0" / "vmoe").glob("events*"))


def test_usage_of_experts_by_class():
    records = VisionConfig(**SMALL, methods=["vmoe", "soft_moe"]).run(0, lambda text: None)
    for record in records.values():
        usage = record.matrices["experts of each class, blocks.1.mlp"]
        assert usage.values.shape == (10, 4)
        np.testing.assert_allclose(usage.values.sum(1), 1.0)
        assert len(record.series["load_cv/blocks.1.mlp"]) == len(record.series["accuracy"]) == 2
    assert max(records["vmoe"].series["dropped_fraction/blocks.1.mlp"]) > 0.0


@pytest.mark.slow
def test_the_digits_are_learned():
    records = replace(settings_of(DIGITS), epochs=30).run(0, lambda text: None)
    assert all(record.metrics["accuracy"] > 0.93 for record in records.values())


def test_bfloat16_trains_nearly_as_float32():
    loss = {}
    for precision in ("float32", "bfloat16"):
        config = VisionConfig(**SMALL, methods=["vmoe"], precision=precision)
        loss[precision] = config.run(0, lambda text: None)["vmoe"].series["loss"]
    assert loss["bfloat16"] != loss["float32"]
    assert loss["bfloat16"] == pytest.approx(loss["float32"], rel=0.02)


def test_the_average_of_the_weights():
    config = VisionConfig(**SMALL, ema_decay=0.75)
    torch.manual_seed(0)
    data = load_data(config, 0)
    training = Training(build("vmoe", config, data), data, config, 0)
    x, y = data.train[list(range(30))]
    weights = []
    for _ in range(3):
        training.model.train()
        training._step(training.model, x, y)
        weights.append(training.model.head.weight.detach().clone())
    # the first weights as they are, then 3/4 of the average and 1/4 of the new
    expected = 0.75 * (0.75 * weights[0] + 0.25 * weights[1]) + 0.25 * weights[2]
    torch.testing.assert_close(training.tested.head.weight, expected)


# -- interruptions -----------------------------------------------------------------------------------------------------


class Interrupted(Exception):  # noqa: N818 - no error of the program
    pass


@pytest.mark.parametrize("method", ["vmoe", "soft_moe"])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(method, tmp_path):
    config = VisionConfig(**SMALL | {"epochs": 4}, methods=[method], checkpoints=str(tmp_path / "a"))
    whole = config.run(3, lambda text: None)[method]

    def interrupt(text):
        if text.endswith("epoch 2"):
            raise Interrupted

    broken = replace(config, checkpoints=str(tmp_path / "b"))
    with pytest.raises(Interrupted):
        broken.run(3, interrupt)
    torch.manual_seed(99)
    done = []
    resumed = broken.run(3, done.append)[method]
    assert [text for text in done if "epoch" in text] == [f"{method}, epoch 3", f"{method}, epoch 4"]
    assert resumed.series == whole.series
    usage = "experts of each class, blocks.1.mlp"
    assert np.array_equal(resumed.matrices[usage].values, whole.matrices[usage].values)
    assert resumed.metrics["train_seconds"] > 0
    # a finished run is only tested again
    assert broken.run(3, lambda text: None)[method].series == whole.series
    with pytest.raises(CheckpointError, match=r"a run with other settings \(learning_rate\): remove it"):
        replace(broken, learning_rate=0.1).run(3, lambda text: None)


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Eight images of each class for training and two for the test, of different sizes: a is red, b is blue."""
    generator = torch.Generator().manual_seed(0)
    for part, number in (("train", 8), ("val", 2)):
        for channel, name in ((0, "a"), (2, "b")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(number):
                image = torch.randint(0, 80, (3, 20 + i, 24), generator=generator, dtype=torch.uint8)
                image[channel] += 150
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_an_image_folder_is_learned(folder):
    config = VisionConfig(
        **SMALL | {"num_train": None, "num_test": None, "epochs": 15, "batch_size": 8},
        data="image_folder",
        root=str(folder),
        image_size=16,
        patch_size=8,
        slots=1,
        ema_decay=0.5,
        methods=["vmoe"],
    )
    record = config.run(0, lambda text: None)["vmoe"]
    assert record.metrics["accuracy"] == 1.0
    assert record.matrices["experts of each class, blocks.1.mlp"].row_names == ["a", "b"]
    few = load_data(replace(config, num_train=6), 0)
    assert len(few.train) == 6
    assert {label for _, label in few.train} == {0, 1}  # the files are sorted by class, the choice is not


def test_mnist_in_torchvision_s_files(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, number in (("train", 40), ("t10k", 10)):
        images = generator.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", np.arange(number, dtype=np.uint8) % 10)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + values.tobytes())
    config = VisionConfig(data="mnist", root=str(tmp_path), num_test=4)
    data = load_data(config, 0)
    x, y = data.train[[0, 11]]
    assert x.shape == (2, 1, 28, 28)
    assert (x.dtype, y.tolist(), len(data.test)) == (torch.float32, [0, 1], 4)
    assert 0.0 <= x.min() < 0.01 < 0.99 < x.max() <= 1.0


# -- several processes -------------------------------------------------------------------------------------------------

WORKER = """
import os, sys, torch
from modmoe.experiments.vision import parallel
from modmoe.experiments.vision import VisionConfig
from modmoe.experiments.vision.data import load_data
from modmoe.experiments.vision.methods import build
from modmoe.experiments.vision.training import Training
torch.set_num_threads(1)
config = VisionConfig(**{settings!r}, methods=["vmoe"])
data = load_data(config, 0)
torch.manual_seed(int(os.environ["RANK"]))
training = Training(build("vmoe", config, data), data, config, 0)
training.run(lambda text: None)
torch.save((training.series["accuracy"], training.model.state_dict()), sys.argv[1] + str(parallel.rank()))
"""


@pytest.mark.slow
def test_two_processes_hold_the_same_weights(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("{settings!r}", repr(SMALL)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613"]
    subprocess.run([*command, str(script), str(tmp_path / "state")], check=True, env=environment, timeout=300)
    (first, one), (second, two) = (torch.load(tmp_path / f"state{rank}") for rank in range(2))
    assert first == second
    assert all(torch.equal(one[name], two[name]) for name in one)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input(tmp_path, folder, capsys):
    def run(**changes):
        VisionConfig(**SMALL | changes).run(0, lambda text: None)

    with pytest.raises(ValueError, match="the gate alone costs more than the dense block"):
        run(hidden_features=2, num_experts=8)
    with pytest.raises(FileNotFoundError, match=r"scripts/fetch_data\.py mnist --root .*nowhere"):
        run(data="mnist", root=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"train is missing: an image folder holds train/<class>/"):
        run(data="image_folder", root=str(tmp_path / "nowhere"))
    (folder / "val" / "a").rename(folder / "val" / "c")
    with pytest.raises(ValueError, match=r"train has the classes \['a', 'b'\] \.\.\., val has \['b', 'c'\]"):
        run(data="image_folder", root=str(folder))
    for changes, message in (
        ({"methods": []}, "methods are at least one"),
        ({"epochs": 2, "warmup_epochs": 2}, "warmup_epochs below epochs"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\)"),
        ({"patch_size": 3}, "patches of 3x3 do not divide an image of 8x8"),
        ({"data": "mnist", "patch_size": 5}, "patches of 5x5 do not divide an image of 28x28"),
        ({"blocks": "odd"}, "unknown block pattern 'odd'"),
        ({"depth": 2}, "'last-2' does not fit a model of 2 blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            VisionConfig(**changes)
    assert main(["run", str(DIGITS), "--blocks", "last2"]) != 0
    assert "unknown block pattern 'last2'" in capsys.readouterr().err
