"""Checkpoints of model, optimizer and random states in one file, without pickled code.

The file is safetensors: tensors, and as metadata a JSON manifest with a SHA-256 digest of everything in the file. It
is written beside its place and moved there, so that a crash leaves the previous checkpoint intact.
"""

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from modmoe.errors import CheckpointError

FORMAT_VERSION = 1
REFERENCE = "$tensor"  # key of what stands in the manifest for a tensor of ``extra``


def save_checkpoint(
    path: str | Path, model: nn.Module, optimizer: Optimizer | None = None, extra: Mapping[str, Any] | None = None
) -> None:
    """Write model, optimizer and the random states of Python, NumPy and torch.

    Args:
        path: the file; its folder must exist. An older file there is replaced only once the new one is complete.
        model: its state dict holds tensors only.
        optimizer: its state is kept by parameter name, so the order of parameters does not matter.
        extra: anything that JSON can hold, for instance how far a stream has come, and tensors at any place in it.
    Raises:
        CheckpointError: if it cannot be written; the older file is intact and no temporary one is left.
        ValueError: if the optimizer holds a tensor that is not the model's, or ``extra`` has a key "$tensor".
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    extra_json, extra_tensors = _split_extra(extra or {})
    tensors |= extra_tensors
    manifest: dict[str, Any] = {"format": FORMAT_VERSION, "extra": extra_json, "rng": {}, "optimizer": None}
    if optimizer is not None:
        manifest["optimizer"], state = _optimizer_to_names(optimizer, model)
        tensors |= state
    tensors |= {f"rng.{name}": state for name, state in _torch_rng().items()}
    manifest["rng"] = {"python": _python_rng(), "numpy": _numpy_rng()}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(manifest)
    _write(Path(path), tensors, {"manifest": text, "sha256": _digest(tensors, text)})


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: Optimizer | None = None, rng: bool = True
) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote into a freshly built model and optimizer.

    Pools grow to what they were. The optimizer must have as many parameter groups as the saved one.

    Args:
        path: the file.
        model: built as the saved one was when it was new; it keeps its device and dtype.
        optimizer: None to leave the optimizer's state in the file.
        rng: restore the random states too.
    Returns:
        ``extra``, its tensors on the CPU.
    Raises:
        CheckpointError: if the file is missing, truncated, altered, of a newer format, or does not fit; the first
            four before anything is changed.
    """
    path = Path(path)
    tensors, manifest = _read(path)
    if optimizer is not None and manifest["optimizer"] is None:
        raise CheckpointError(f"{path} holds no optimizer")
    if optimizer is not None and len(optimizer.param_groups) != len(manifest["optimizer"]["groups"]):
        raise CheckpointError(
            f"{path} has {len(manifest['optimizer']['groups'])} parameter groups, "
            f"the optimizer has {len(optimizer.param_groups)}"
        )
    state = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    try:
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit the model: {error}") from error
    if optimizer is not None:
        _optimizer_from_names(optimizer, model, manifest["optimizer"], tensors, path)
    if rng:
        version, internal, gauss = manifest["rng"]["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = manifest["rng"]["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])
    return _join_extra(manifest["extra"], tensors)


# -- optimizer -----------------------------------------------------------------------------------------


def _optimizer_to_names(optimizer: Optimizer, model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups, tensors, scalars = [], {}, {}
    for group in optimizer.param_groups:
        if any(id(parameter) not in names for parameter in group["params"]):
            raise ValueError("the optimizer holds a tensor that is not the model's: call sync_optimizer first")
        options = {key: float(v) if isinstance(v, Tensor) else v for key, v in group.items() if key != "params"}
        groups.append({"names": [names[id(parameter)] for parameter in group["params"]], "options": options})
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                entry = f"{names[id(parameter)]}/{key}"
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{entry}"] = value
                else:
                    scalars[entry] = value
    return {"groups": groups, "scalars": scalars}, tensors


def _optimizer_from_names(
    optimizer: Optimizer, model: nn.Module, saved: dict, tensors: Mapping[str, Tensor], path: Path
) -> None:
    parameters = dict(model.named_parameters())
    missing = sorted({name for group in saved["groups"] for name in group["names"]} - set(parameters))
    if missing:
        raise CheckpointError(f"{path}: the optimizer was saved with tensors that the model lacks: {missing}")
    entries = {n.removeprefix("optimizer."): t for n, t in tensors.items() if n.startswith("optimizer.")}
    optimizer.state.clear()
    for group, kept in zip(optimizer.param_groups, saved["groups"], strict=True):
        group["params"] = [parameters[name] for name in kept["names"]]
        # JSON has no tuples, and Adam's betas are one
        group |= {key: tuple(v) if isinstance(v, list) else v for key, v in kept["options"].items()}
    for entry, value in {**entries, **saved["scalars"]}.items():
        name, _, key = entry.rpartition("/")
        if isinstance(value, Tensor) and value.dim():  # torch keeps 0-d step counters on the CPU
            value = value.to(parameters[name].device)
        optimizer.state[parameters[name]][key] = value


# -- extra -----------------------------------------------------------------------------------------------


def _split_extra(extra: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``extra`` with a reference in each tensor's place, and the tensors by name."""
    tensors: dict[str, Tensor] = {}

    def split(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = f"extra.{len(tensors)}"
            tensors[name] = value
            return {REFERENCE: name}
        if isinstance(value, Mapping):
            if REFERENCE in value:
                raise ValueError(f"extra has a key '{REFERENCE}', which stands for a tensor's place in the file")
            return {key: split(entry) for key, entry in value.items()}
        return [split(entry) for entry in value] if isinstance(value, list | tuple) else value

    return split(extra), tensors


def _join_extra(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if REFERENCE in value:
            return tensors[value[REFERENCE]]
        return {key: _join_extra(entry, tensors) for key, entry in value.items()}
    return [_join_extra(entry, tensors) for entry in value] if isinstance(value, list) else value


# -- random states ---------------------------------------------------------------------------------------


def _torch_rng() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _python_rng() -> list:
    version, internal, gauss = random.getstate()
    return [version, list(internal), gauss]


def _numpy_rng() -> list:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)]


# -- the file ----------------------------------------------------------------------------------------------


def _digest(tensors: Mapping[str, Tensor], manifest: str) -> str:
    digest = hashlib.sha256(manifest.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        save_file(tensors, temporary, metadata)
        for name in (temporary, str(path.parent)):
            if name != temporary:
                os.replace(temporary, path)
            _sync(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}") from error
    finally:
        if temporary is not None:
            with suppress(FileNotFoundError):  # moved to its place
                os.unlink(temporary)


def _sync(name: str) -> None:
    handle = os.open(name, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in _keys(file)}
        text, digest = metadata["manifest"], metadata["sha256"]
        manifest = json.loads(text)
        version = int(manifest["format"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a complete modmoe checkpoint: {error}") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {version}, this modmoe reads up to {FORMAT_VERSION}")
    if _digest(tensors, text) != digest:
        raise CheckpointError(f"{path} was altered: its digest does not match")
    return tensors, manifest


def _keys(file: Any) -> Iterator[str]:
    yield from file.keys()
