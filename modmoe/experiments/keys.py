"""The settings of an experiment as a config file and the command line give them: by dotted key, checked by type."""

import dataclasses
import re
from argparse import ArgumentError
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from modmoe.errors import did_you_mean


class UsageError(Exception):
    """A mistake in the command line or the config file; its text is what the user reads."""


class Keys:
    """The settings of one experiment: each leaf of its config dataclass, by dotted key, with its type and value."""

    def __init__(
        self, config: Any, program: str, seeds: int = 1, first_seed: int = 0, out: Path = Path("runs")
    ) -> None:
        from jsonargparse import ArgumentParser

        self._parser = ArgumentParser(
            prog=program, description=_summary(type(config)), exit_on_error=False, allow_abbrev=False
        )
        self._types: dict[str, Any] = {"seeds": int, "first_seed": int, "out": str}
        self._groups: set[str] = set()
        self._parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds")
        self._parser.add_argument("--first_seed", type=int, default=first_seed, help="the first of them")
        self._parser.add_argument("--out", type=str, default=str(out), help="folder for the results")
        self._add(config, "", "settings")

    def _add(self, config: Any, prefix: str, title: str) -> None:
        group = self._parser.add_argument_group(title)
        hints, texts = get_type_hints(type(config)), _field_texts(type(config))
        for field in dataclasses.fields(config):
            key, value = f"{prefix}{field.name}", getattr(config, field.name)
            if dataclasses.is_dataclass(hints[field.name]):
                self._groups.add(key)
                self._add(value, f"{key}.", f"{key}: {texts.get(field.name, '')}".rstrip(":. "))
            else:
                self._types[key] = hints[field.name]
                group.add_argument(f"--{key}", type=hints[field.name], default=value, help=texts.get(field.name))

    def help(self) -> str:
        """Lay out all settings with their types and defaults."""
        # jsonargparse also offers `--key+ item` for lists, which `modmoe run` does not have.
        return re.sub(r", --[\w.]+\+ \S+", "", self._parser.format_help()).rstrip()

    def flatten(self, settings: dict, where: str, prefix: str = "") -> dict[str, Any]:
        """Check a nested mapping and give its leaves under dotted keys."""
        leaves: dict[str, Any] = {}
        for name, value in settings.items():
            key = f"{prefix}{name}"
            if key not in self._groups:
                leaves[key] = self.from_yaml(key, value, where)
            elif isinstance(value, dict):
                leaves |= self.flatten(value, where, f"{key}.")
            else:
                raise UsageError(f"{where}: key '{key}' expects settings of its own, got {value!r}")
        return leaves

    def from_yaml(self, key: str, value: Any, where: str) -> Any:
        """Check one value of the config file."""
        if key == "out":
            raise UsageError(f"{where}: 'out' is set on the command line: --out DIR")
        self._check_known(key, f"{where}: ", "")
        nested: Any = value
        for name in reversed(key.split(".")):
            nested = {name: nested}
        try:
            # jsonargparse lets null pass for any type.
            if value is None and type(None) not in (self._types[key], *get_args(self._types[key])):
                raise ValueError("null")
            return self._parser.parse_object(nested)[key]
        except (ArgumentError, ValueError) as error:
            raise UsageError(self._mismatch(f"{where}: key '{key}'", key, value)) from error

    def from_text(self, key: str, text: str) -> Any:
        """Check one value of the command line."""
        if key == "experiment":
            raise UsageError("'experiment' is set in the config file, not on the command line")
        if key in self._groups:
            raise UsageError(f"--{key} holds several settings; set one of them: --{key}.NAME value")
        self._check_known(key, "", "--")
        try:
            return self._parser.parse_args([f"--{key}={text}"])[key]
        except (ArgumentError, ValueError) as error:
            raise UsageError(self._mismatch(f"--{key}", key, text)) from error

    def _check_known(self, key: str, where: str, dashes: str) -> None:
        if key not in self._types:
            raise UsageError(f"{where}unknown key '{dashes}{key}'{did_you_mean(key, self._types)}")

    def _mismatch(self, name: str, key: str, value: Any) -> str:
        return f"{name} expects {_type_name(self._types[key])}, got {value!r}"


def replaced(config: Any, changes: dict[str, Any]) -> Any:
    """Give a copy of a config with the values at dotted keys changed."""
    own = {key: value for key, value in changes.items() if "." not in key}
    for group in {key.partition(".")[0] for key in changes if "." in key}:
        inner = {key.partition(".")[2]: value for key, value in changes.items() if key.startswith(f"{group}.")}
        own[group] = replaced(getattr(config, group), inner)
    return dataclasses.replace(config, **own)


def _summary(config_class: type) -> str:
    from docstring_parser import parse

    return parse(config_class.__doc__ or "").short_description or ""


def _field_texts(config_class: type) -> dict[str, str]:
    from docstring_parser import parse

    # a field is explained by the class that brings it
    params = [param for cls in reversed(config_class.__mro__) for param in parse(cls.__doc__ or "").params]
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
