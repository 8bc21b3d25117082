"""Checkpoints: what goes in comes out, and every fault is an error that names the file."""

import json
import os
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import modmoe
from modmoe.checkpoint import load_checkpoint, save_checkpoint
from modmoe.errors import CheckpointError


def make(num_experts=2):
    torch.manual_seed(0)
    layer = modmoe.MoELayer(modmoe.ExpertPool(modmoe.MLPExpert(4, 6), num_experts), modmoe.TopKRouter(4, 2))
    return layer, torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)


def train(layer, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()


def grown():
    layer, optimizer = make()
    train(layer, optimizer, 3)
    layer.freeze([0])
    layer.add_experts(2, task="b")
    modmoe.sync_optimizer(optimizer, layer)
    train(layer, optimizer, 2)
    return layer, optimizer


@pytest.fixture
def saved(tmp_path):
    layer, optimizer = grown()
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, layer, optimizer, {"step": 5})
    return path, layer, optimizer


def test_training_goes_on_bit_for_bit(saved):
    path, layer, optimizer = saved
    train(layer, optimizer, 4)
    fresh, fresh_optimizer = make(num_experts=3)
    assert load_checkpoint(path, fresh, fresh_optimizer) == {"step": 5}
    train(fresh, fresh_optimizer, 4)
    assert fresh.pool.ids == layer.pool.ids
    assert fresh.pool.frozen_ids == (0,)
    expected, got = layer.state_dict(), fresh.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_random_states_are_restored_or_left_alone(saved):
    path, _, _ = saved
    draws = lambda: (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: E731
    layer, _ = make()
    load_checkpoint(path, layer)
    first = draws()
    load_checkpoint(path, layer)
    assert draws() == first
    load_checkpoint(path, layer, rng=False)
    assert draws() != first


def test_optimizer_state_is_kept_by_name_whatever_the_order(saved):
    path, layer, optimizer = saved
    fresh, _ = make()
    backwards = torch.optim.AdamW(list(fresh.parameters())[::-1], lr=0.5)
    load_checkpoint(path, fresh, backwards)
    assert backwards.param_groups[0]["lr"] == 0.01
    assert backwards.param_groups[0]["betas"] == (0.9, 0.999)
    for (name, old), (_, new) in zip(layer.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(optimizer.state[old]["exp_avg"], backwards.state[new]["exp_avg"]), name


def test_extra_holds_tensors_at_any_place(tmp_path):
    layer, _ = make()
    sums = torch.randn(3, 2, dtype=torch.float64)
    extra = {"sums": sums, "nested": {"parts": [torch.tensor(True), {"n": torch.arange(3)}], "name": "x"}, "none": None}
    save_checkpoint(tmp_path / "run", layer, extra=extra)
    got = load_checkpoint(tmp_path / "run", layer)
    assert got["sums"].dtype == torch.float64
    assert torch.equal(got["sums"], sums)
    flag, counts = got["nested"].pop("parts")
    assert flag.item() is True
    assert counts["n"].tolist() == [0, 1, 2]
    assert (got["nested"], got["none"]) == ({"name": "x"}, None)
    with pytest.raises(ValueError, match=r"extra has a key '\$tensor'"):
        save_checkpoint(tmp_path / "run", layer, extra={"a": [{"$tensor": 1}]})


def altered(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[: len(data) // 2], "is not a complete modmoe checkpoint"),
        (lambda data: b"", "is not a complete modmoe checkpoint"),
        (lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "was altered"),
        (lambda data: b"\x80\x04cos\nsystem\n(S'touch x'\ntR.", "is not a complete modmoe checkpoint"),
    ],
    ids=["truncated", "empty", "flipped bit", "pickle"],
)
def test_damaged_files_change_nothing(saved, change, message):
    path, _, _ = saved
    altered(path, change)
    layer, optimizer = make()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"{path.name} {message}"):
        load_checkpoint(path, layer, optimizer)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_newer_format_names_both_versions(saved):
    path, _, _ = saved
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["manifest"] = json.dumps({**json.loads(metadata["manifest"]), "format": 7})
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match="has format 7, this modmoe reads up to 1"):
        load_checkpoint(path, make()[0])


def test_what_does_not_fit_is_an_error(saved, tmp_path):
    path, layer, _ = saved
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "nowhere", layer)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_checkpoint(path, modmoe.MoELayer(modmoe.ExpertPool(modmoe.MLPExpert(5, 6), 2), modmoe.TopKRouter(5, 2)))
    fresh, _ = make()
    groups = torch.optim.SGD([{"params": [p]} for p in fresh.parameters()], lr=0.1)
    with pytest.raises(CheckpointError, match="has 1 parameter groups, the optimizer has 5"):
        load_checkpoint(path, fresh, groups)
    save_checkpoint(path, layer)
    with pytest.raises(CheckpointError, match="holds no optimizer"):
        load_checkpoint(path, *make())


def test_foreign_tensor_in_the_optimizer_is_refused(tmp_path):
    layer, _ = make()
    optimizer = torch.optim.SGD([*layer.parameters(), torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="not the model's"):
        save_checkpoint(tmp_path / "x", layer, optimizer)
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file_and_no_temporary(saved, monkeypatch):
    path, layer, optimizer = saved
    before = path.read_bytes()

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*No space left"):
        save_checkpoint(path, layer, optimizer)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_kill_in_the_middle_of_a_write_leaves_the_previous_checkpoint(saved):
    path, _, _ = saved
    before = path.read_bytes()
    script = """
        import os, signal, sys, torch, modmoe
        from modmoe import checkpoint
        layer = modmoe.MoELayer(modmoe.ExpertPool(modmoe.MLPExpert(4, 6), 2), modmoe.TopKRouter(4, 2))
        def killed(tensors, name, metadata):
            with open(name, "wb") as file:
                file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.save_file = killed
        checkpoint.save_checkpoint(sys.argv[1], layer)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], check=False)
    assert done.returncode == -9
    assert path.read_bytes() == before
    assert load_checkpoint(path, *make()) == {"step": 5}
