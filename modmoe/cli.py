"""The command ``modmoe``: run an experiment from a YAML file; the command line overrides any setting."""

import dataclasses
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

# jsonargparse, yaml and the experiments (with their hosts) are imported where they are used, so that help and
# mistakes on the command line do not wait for them.
from modmoe import __version__
from modmoe.errors import MissingExtraError
from modmoe.experiments.registry import EXPERIMENTS, UnknownExperimentError, did_you_mean, load_config_class

_USAGE = "usage: modmoe run CONFIG [--key value ...] [--seeds N] [--out DIR]"

_HELP = f"""{_USAGE}

One growable pool of experts for continual, meta, reinforcement and multi-task learning.

commands:
  run CONFIG    run the experiment that a YAML file describes

options:
  -h, --help    show this help; `modmoe run --help` says more
  --version     show the version
"""

_RUN_HELP = f"""{_USAGE}

Run the experiment that a YAML file describes, and write its results to a folder.

arguments:
  CONFIG          a YAML file: `experiment: NAME`, optionally `seeds: N`, and settings of that experiment
  --key value     override a setting of the file; dots reach nested ones: --a.b 3 (or --a.b=3)
  --seeds N       number of seeds (default: the file's, else 1)
  --out DIR       folder for the results (default: runs/<name of CONFIG>)
  -h, --help      show this help; `modmoe run CONFIG --help` lists the settings of CONFIG's experiment

experiments: {{experiments}}

written to DIR: metrics.json, report.html, tensorboard/
"""


class _UsageError(Exception):
    """A mistake in the command line or the config file; its text is what the user reads."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; None means sys.argv's.
    Returns:
        The exit status: 0; 1 if a host library is missing; 2 for a mistake in the command line or the config
        file; 130 if interrupted; 141 if nobody reads on.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except _UsageError as error:
        return _fail(str(error), 2)
    except MissingExtraError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # the reader (head, less) has gone; Python would complain once more when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _fail(message: str, status: int) -> int:
    print(f"modmoe: {'error: ' if status != 130 else ''}{message}", file=sys.stderr)
    return status


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if arguments[0] == "--version":
        print(f"modmoe {__version__}")
        return 0
    if arguments[0] != "run":
        hint = did_you_mean(arguments[0], ["run", "--help", "--version"])
        raise _UsageError(f"unknown command '{arguments[0]}'{hint or ' (there is: run)'}")
    return _run(arguments[1:])


def _run(arguments: list[str]) -> int:
    file, options, wants_help = _split(arguments)
    if file is None:
        if wants_help:
            print(_RUN_HELP.format(experiments=", ".join(EXPERIMENTS)), end="")
            return 0
        raise _UsageError("a config file is needed: modmoe run CONFIG")
    settings = _read(file)
    experiment = settings.pop("experiment", None)
    if experiment is None:
        raise _UsageError(f"{file}: the key 'experiment' is missing (known: {', '.join(EXPERIMENTS)})")
    try:
        config_class = load_config_class(str(experiment))
    except UnknownExperimentError as error:
        raise _UsageError(f"{file}: {error}") from error
    program = f"modmoe run {file}"
    keys = _Keys(config_class(), program)
    seeds = keys.from_yaml("seeds", settings.pop("seeds", 1), str(file))
    out = Path("runs") / file.stem
    changes = keys.flatten(settings, str(file))
    for key, text in options:
        value = keys.from_text(key, text)
        if key == "seeds":
            seeds = value
        elif key == "out":
            out = Path(value)
        else:
            changes[key] = value
    if seeds < 1:
        raise _UsageError(f"seeds must be at least 1, got {seeds}")
    try:
        config = _replaced(config_class(), changes)
    except ValueError as error:  # a config dataclass checks its values in __post_init__
        raise _UsageError(f"{file}: {error}") from error
    if wants_help:  # with the values that would be run
        print(_Keys(config, program, seeds, out).help())
        return 0

    from modmoe.experiments.runner import run_experiment

    try:
        run_experiment(config, str(experiment), seeds, out)
    except NotADirectoryError as error:
        raise _UsageError(str(error)) from error
    return 0


def _split(arguments: list[str]) -> tuple[Path | None, list[tuple[str, str]], bool]:
    """Split the arguments of ``run`` into the config file, (key, text) pairs and whether help is wanted."""
    file, options, wants_help = None, [], False
    rest = iter(arguments)
    for argument in rest:
        if argument in ("-h", "--help"):
            wants_help = True
        elif argument.startswith("--"):
            key, equals, text = argument[2:].partition("=")
            if not equals:
                text = next(rest, None)
                if text is None:
                    raise _UsageError(f"--{key} needs a value")
            options.append((key, text))
        elif argument.startswith("-"):
            raise _UsageError(f"unknown option '{argument}'")
        elif file is None:
            file = Path(argument)
        else:
            raise _UsageError(f"unexpected argument '{argument}'; a setting is written --key value")
    return file, options, wants_help


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _UsageError(f"config file not found: {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _UsageError(f"cannot read the config file {file}: {error}") from error
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise _UsageError(f"invalid YAML in {file}{line}: {problem}") from error
    if not isinstance(settings, dict):
        raise _UsageError(f"{file}: expected settings of the form 'key: value'")
    return settings


class _Keys:
    """The settings of one experiment: each leaf of its config dataclass, by dotted key, with its type and value."""

    def __init__(self, config: Any, program: str, seeds: int = 1, out: Path = Path("runs")) -> None:
        from jsonargparse import ArgumentParser

        self._parser = ArgumentParser(
            prog=program, description=_summary(type(config)), exit_on_error=False, allow_abbrev=False
        )
        self._types: dict[str, Any] = {"seeds": int, "out": str}
        self._groups: set[str] = set()
        self._parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds")
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
                raise _UsageError(f"{where}: key '{key}' expects settings of its own, got {value!r}")
        return leaves

    def from_yaml(self, key: str, value: Any, where: str) -> Any:
        """Check one value of the config file."""
        if key == "out":
            raise _UsageError(f"{where}: 'out' is set on the command line: --out DIR")
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
            raise _UsageError(self._mismatch(f"{where}: key '{key}'", key, value)) from error

    def from_text(self, key: str, text: str) -> Any:
        """Check one value of the command line."""
        if key == "experiment":
            raise _UsageError("'experiment' is set in the config file, not on the command line")
        if key in self._groups:
            raise _UsageError(f"--{key} holds several settings; set one of them: --{key}.NAME value")
        self._check_known(key, "", "--")
        try:
            return self._parser.parse_args([f"--{key}={text}"])[key]
        except (ArgumentError, ValueError) as error:
            raise _UsageError(self._mismatch(f"--{key}", key, text)) from error

    def _check_known(self, key: str, where: str, dashes: str) -> None:
        if key not in self._types:
            raise _UsageError(f"{where}unknown key '{dashes}{key}'{did_you_mean(key, self._types)}")

    def _mismatch(self, name: str, key: str, value: Any) -> str:
        return f"{name} expects {_type_name(self._types[key])}, got {value!r}"


def _replaced(config: Any, changes: dict[str, Any]) -> Any:
    """Give a copy of a config with the values at dotted keys changed."""
    own = {key: value for key, value in changes.items() if "." not in key}
    for group in {key.partition(".")[0] for key in changes if "." in key}:
        inner = {key.partition(".")[2]: value for key, value in changes.items() if key.startswith(f"{group}.")}
        own[group] = _replaced(getattr(config, group), inner)
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
