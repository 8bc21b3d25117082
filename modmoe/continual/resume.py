"""Stop in the middle of a stream and go on later, bit for bit."""

from pathlib import Path
from typing import Any

from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.templates.base_sgd import PeriodicEval

from modmoe.checkpoint import load_checkpoint, save_checkpoint
from modmoe.continual.plugin import ExpertPoolPlugin

CLOCK = ("train_iterations", "train_exp_counter", "train_exp_epochs", "train_exp_iterations", "total_iterations")


def save_stream(path: str | Path, strategy: Any) -> None:
    """Write all that a strategy needs to go on with the next experience: model, optimizer, counters, random states.

    Args:
        path: the file, see :func:`modmoe.checkpoint.save_checkpoint`.
        strategy: between two calls of ``strategy.train``.
    Raises:
        ValueError: if the strategy has plugins whose state this cannot save (a replay buffer, EWC's importances), or
            holds parts of the stream back: then train on more of it first.
        CheckpointError: if the file cannot be written.
    """
    plugin = _pool_plugin(strategy)
    if plugin.num_held:
        raise ValueError(
            f"{plugin.num_held} parts of the stream are held back and would be lost: train on more of it before saving"
        )
    clock = {name: getattr(strategy.clock, name) for name in CLOCK}
    extra = {"clock": clock, "plugin": plugin.state()}
    save_checkpoint(path, strategy.model, strategy.optimizer, extra)


def resume_stream(path: str | Path, strategy: Any) -> int:
    """Bring a freshly built strategy to where :func:`save_stream` was called.

    Args:
        path: the file.
        strategy: built as the saved one was when it was new.
    Returns:
        The number of experiences that it has been trained on: go on with ``train_stream[n:]``.
    Raises:
        ValueError: if the strategy has plugins as in save_stream, or a growth rule with other arguments.
        CheckpointError: if the file is damaged or does not fit.
    """
    plugin = _pool_plugin(strategy)
    strategy.model.to(strategy.device)
    extra = load_checkpoint(path, strategy.model, strategy.optimizer)
    for name, value in extra["clock"].items():
        setattr(strategy.clock, name, value)
    plugin.load_state(extra["plugin"], strategy.model)
    # Without this Avalanche would take the strategy for a new one and reset the optimizer.
    strategy.optimized_param_id = dict(strategy.model.named_parameters())
    return int(extra["clock"]["train_exp_counter"])


def _pool_plugin(strategy: Any) -> ExpertPoolPlugin:
    known = (ExpertPoolPlugin, EvaluationPlugin, Clock, PeriodicEval)
    unknown = [type(plugin).__name__ for plugin in strategy.plugins if not isinstance(plugin, known)]
    if unknown:
        raise ValueError(f"the state of {unknown} cannot be saved; only ExpertPoolPlugin's can")
    found = [plugin for plugin in strategy.plugins if isinstance(plugin, ExpertPoolPlugin)]
    if len(found) != 1:
        raise ValueError(f"the strategy needs one ExpertPoolPlugin, it has {len(found)}")
    return found[0]
