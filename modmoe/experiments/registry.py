"""The experiments that ``modmoe run`` knows, imported only when one is asked for."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from modmoe.errors import did_you_mean

if TYPE_CHECKING:  # records live in a package that imports torch, which the command line's help must not wait for
    from modmoe.analysis.records import MethodRecord

EXPERIMENTS: dict[str, "str | type"] = {
    "continual": "modmoe.experiments.continual:ContinualConfig",
    "language": "modmoe.experiments.language:LanguageConfig",
    "mace": "modmoe.experiments.rl.mace:MaceConfig",
    "meta_families": "modmoe.experiments.meta:FamiliesConfig",
    "meta_fewshot": "modmoe.experiments.meta:FewShotConfig",
    "meta_gp": "modmoe.experiments.meta:GaussianProcessConfig",
    "meta_growth": "modmoe.experiments.meta:GrowthConfig",
    "meta_images": "modmoe.experiments.meta:ImageCompletionConfig",
    "multitask": "modmoe.experiments.multitask:MultitaskConfig",
    "rl_policies": "modmoe.experiments.rl.policies:PoliciesConfig",
    "rl_sequence": "modmoe.experiments.rl.sequence:SequenceConfig",
    "vision": "modmoe.experiments.vision:VisionConfig",
}
"""The YAML key ``experiment`` -> "module:Class" of its config dataclass, or the class itself."""

RESERVED = ("experiment", "seeds", "first_seed", "out")
"""Keys of the config file and the command line that no config dataclass may use for a field."""


class UnknownExperimentError(ValueError):
    """The name of an experiment is not in `EXPERIMENTS`."""


class ExperimentConfig(Protocol):
    """What a config is: a dataclass whose fields all have defaults, and that can run one seed."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def run(self, seed: int, progress: Callable[[str], None]) -> "dict[str, MethodRecord]":
        """Run every method with one seed.

        Args:
            seed: fixes all randomness.
            progress: takes a short text about what is being done now.
        Returns:
            Method name -> record, the main method first; the same methods and metrics for every seed.
        """
        ...


def load_config_class(experiment: str) -> type[ExperimentConfig]:
    """Import the config dataclass of an experiment.

    Args:
        experiment: a key of `EXPERIMENTS`.
    Returns:
        The class.
    Raises:
        UnknownExperimentError: if there is no such experiment; the message lists those there are.
        TypeError: if the class is no dataclass with a ``run`` method, a field has no default, or a field has
            a reserved name.
    """
    if experiment not in EXPERIMENTS:
        known = ", ".join(EXPERIMENTS)
        hint = did_you_mean(experiment, EXPERIMENTS)
        raise UnknownExperimentError(f"unknown experiment '{experiment}'{hint} (known: {known})")
    entry = EXPERIMENTS[experiment]
    if isinstance(entry, str):
        module, _, name = entry.partition(":")
        entry = getattr(importlib.import_module(module), name)
    if not (isinstance(entry, type) and dataclasses.is_dataclass(entry) and hasattr(entry, "run")):
        raise TypeError(f"the config of experiment '{experiment}' must be a dataclass with a run method, got {entry}")
    for field in dataclasses.fields(entry):
        if field.name in RESERVED:
            raise TypeError(f"{entry.__name__} may not name a field '{field.name}': the command line uses it")
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise TypeError(f"field '{field.name}' of {entry.__name__} needs a default")
    return cast("type[ExperimentConfig]", entry)
