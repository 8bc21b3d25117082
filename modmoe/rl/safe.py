"""Save and load an SB3 algorithm without pickled code."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import recursive_getattr
from torch import Tensor
from torch.optim import Optimizer

from modmoe.checkpoint import load_checkpoint, save_checkpoint
from modmoe.errors import CheckpointError
from modmoe.rl.growth import check_model, in_rollout
from modmoe.rl.mace import MACE
from modmoe.rl.mace_policy import MACEPolicy
from modmoe.rl.policy import MoEPolicy

COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "num_actor_updates")


def save_safely(model: BaseAlgorithm, path: str | Path) -> None:
    """Write a model's policy, optimizers, entropy coefficient and counters as tensors and JSON (safetensors).

    Args:
        model: an algorithm of SB3 with a mixture policy, or a MACE (with its random generator). Its replay buffer is
            not written, as in SB3's ``save``.
        path: the file.
    Raises:
        CheckpointError: if it cannot be written.
        ValueError: in the middle of a rollout, or on a policy without experts.
    """
    policy = check_savable(model)
    extra = {
        "algorithm": type(model).__name__,
        "policy": type(policy).__name__,
        "counters": {name: getattr(model, name) for name in COUNTERS if hasattr(model, name)},
        "optimizers": {name: _as_json(optimizer.state_dict()) for name, optimizer in _optimizers(model)},
        "variables": {name: recursive_getattr(model, name) for name in _variables(model)},
        "generator": model.rng.bit_generator.state if isinstance(model, MACE) else None,
    }
    save_checkpoint(path, policy, None, extra)


def load_safely(path: str | Path, model: BaseAlgorithm, rng: bool = False) -> None:
    """Read what :func:`save_safely` wrote into a model that was built as the saved one was when it was new.

    Nothing is ever unpickled. Pools grow to what they were.

    Args:
        path: the file.
        model: of the same algorithm, policy and ``policy_kwargs``, but for growth.
        rng: restore the random states of Python, NumPy and torch too.
    Raises:
        CheckpointError: on any other file: a zip of SB3's ``save`` or anything else that may hold a pickle is
            refused unread; and on a file that is damaged or of another algorithm or policy.
        ValueError: on a policy without experts.
    """
    policy = check_savable(model)
    _refuse_pickles(Path(path))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    extra = load_checkpoint(path, policy, rng=rng)
    saved, own = (extra.get("algorithm"), extra.get("policy")), (type(model).__name__, type(policy).__name__)
    if saved != own:
        policy.load_state_dict(before)
        raise CheckpointError(f"{path} holds {saved[0]} with {saved[1]}, the model is {own[0]} with {own[1]}")
    for name, optimizer in _optimizers(model):
        state = extra["optimizers"][name]
        state["state"] = {int(index): values for index, values in state["state"].items()}
        optimizer.load_state_dict(state)
    for name, value in extra["variables"].items():
        recursive_getattr(model, name).data.copy_(value)
    for name, value in extra["counters"].items():
        setattr(model, name, value)
    if isinstance(model, MACE):
        model.rng.bit_generator.state = extra["generator"]
    else:
        model.policy_kwargs = {**model.policy_kwargs, "num_experts": check_model(model).options.num_experts}


def check_savable(model: BaseAlgorithm) -> MoEPolicy | MACEPolicy:
    """The policy of a model that is not in the middle of a rollout.

    Raises:
        ValueError: in the middle of a rollout, or on a policy without experts.
    """
    if not isinstance(model, MACE):
        return check_model(model)
    if in_rollout(model):
        raise ValueError("the model is in the middle of a rollout: save and load it outside learn()")
    return model.policy


def _optimizers(model: BaseAlgorithm) -> Iterator[tuple[str, Optimizer]]:
    for name in model._get_torch_save_params()[0]:
        found = recursive_getattr(model, name)
        if isinstance(found, Optimizer):
            yield name, found


def _variables(model: BaseAlgorithm) -> list[str]:
    names = model._get_torch_save_params()[1]
    return [name for name in names if isinstance(recursive_getattr(model, name), Tensor)]


def _as_json(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "state": {str(index): values for index, values in state["state"].items()}}


def _refuse_pickles(path: Path) -> None:
    """Raise CheckpointError on a file that starts like a zip or a pickle, without reading on."""
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors: eight bytes of length, which may look like anything, and then JSON
        return
    if start[:4] == b"PK\x03\x04":
        raise CheckpointError(
            f"{path} is a zip, as Stable-Baselines3's save() or torch.save() write: it may hold pickled code, which is "
            "never run here. From a source that you trust, load it with the algorithm's own load(), or only its "
            "tensors with model.set_parameters(), and write it anew with save_safely()"
        )
    if start[:1] == b"\x80":
        raise CheckpointError(f"{path} is a pickle, which may run any code when it is read: refused")
