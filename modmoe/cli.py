"""The command ``modmoe``: run an experiment from a YAML file; the command line overrides any setting."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# jsonargparse, yaml and the experiments (with their hosts) are imported where they are used, so that help and
# mistakes on the command line do not wait for them.
from modmoe import __version__
from modmoe.errors import CheckpointError, DataNotFoundError, MissingExtraError, did_you_mean
from modmoe.experiments.keys import Keys, UsageError, replaced
from modmoe.experiments.registry import EXPERIMENTS, UnknownExperimentError, load_config_class

_USAGE = "usage: modmoe run CONFIG [--key value ...] [--seeds N] [--out DIR]"

_HELP = f"""{_USAGE}
       modmoe gates [--json]
       modmoe tune [--out FILE] [--seconds S]

One growable pool of experts for continual, meta, reinforcement and multi-task learning.

commands:
  run CONFIG    run the experiment that a YAML file describes
  gates         list every gate with what it declares, and the kinds of experts that it goes with
  tune          measure the expert kernels on this machine, so that backend="auto" chooses by that

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
  --first_seed N  the first of them (default: the file's, else 0)
  --out DIR       folder for the results (default: runs/<name of CONFIG>)
  -h, --help      show this help; `modmoe run CONFIG --help` lists the settings of CONFIG's experiment

experiments: {{experiments}}

written to DIR: metrics.json, report.html, tensorboard/
"""


_TUNE_HELP = """usage: modmoe tune [--out FILE] [--seconds S]

Measure every backend of the expert kernels on this machine's CPU, in float32 and with torch's number of threads
(OMP_NUM_THREADS), over a grid of sizes, and keep the result: from then on backend="auto" chooses by the nearest
measurement, and layer.explain(x) says which. Nothing else should run meanwhile.

options:
  --out FILE    where to keep it (default: {path}; ${variable} names another file)
  --seconds S   for each case (default: 0.3; about a minute in all)
  -h, --help    show this help
"""

_GATES_HELP = """usage: modmoe gates [--json]

List every gate with what its class declares (what it decides and on how much at once, whether it is causal, what the
weights of a token add up to, which ids it needs, what its experts share, how growth keeps the layer's function), and
the kinds of experts that it goes with.

options:
  --json        as JSON
  -h, --help    show this help
"""


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
    except UsageError as error:
        return _fail(str(error), 2)
    except (MissingExtraError, DataNotFoundError, CheckpointError) as error:  # they say what to do
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
    if arguments[0] == "gates":
        return _gates(arguments[1:])
    if arguments[0] == "tune":
        return _tune(arguments[1:])
    if arguments[0] != "run":
        hint = did_you_mean(arguments[0], ["run", "gates", "tune", "--help", "--version"])
        raise UsageError(f"unknown command '{arguments[0]}'{hint or ' (there are: run, gates, tune)'}")
    return _run(arguments[1:])


def _gates(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(_GATES_HELP, end="")
        return 0
    if arguments not in ([], ["--json"]):
        raise UsageError(f"`modmoe gates` takes --json or nothing, got {' '.join(arguments)}")

    from modmoe.catalog import format_gate_tables, gate_tables

    print(json.dumps(gate_tables(), indent=2) if arguments else format_gate_tables())
    return 0


def _tune(arguments: list[str]) -> int:
    from modmoe.kernels.table import VARIABLE, user_path

    stray, options, wants_help = _split(arguments)
    if wants_help:
        print(_TUNE_HELP.format(path=user_path(), variable=VARIABLE), end="")
        return 0
    unknown = [key for key, _ in options if key not in ("out", "seconds")]
    if stray is not None or unknown:
        raise UsageError(f"`modmoe tune` takes --out and --seconds, got {stray or '--' + unknown[0]}")
    given = dict(options)
    try:
        seconds = float(given.get("seconds", "0.3"))
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UsageError(f"--seconds expects a number above 0, got '{given['seconds']}'")

    from tqdm import tqdm

    from modmoe.kernels.tune import grid, measure, summary

    cases = grid()
    with tqdm(total=len(cases), unit="case", file=sys.stderr) as bar:
        table = measure(cases, budget=seconds, progress=lambda _: bar.update())
    out = Path(given["out"]) if "out" in given else user_path()
    table.save(out)
    print(f"{summary(table)}\n\nkept in {out}")
    return 0


def _run(arguments: list[str]) -> int:
    file, options, wants_help = _split(arguments)
    if file is None:
        if wants_help:
            print(_RUN_HELP.format(experiments=", ".join(EXPERIMENTS)), end="")
            return 0
        raise UsageError("a config file is needed: modmoe run CONFIG")
    settings = _read(file)
    experiment = settings.pop("experiment", None)
    if experiment is None:
        raise UsageError(f"{file}: the key 'experiment' is missing (known: {', '.join(EXPERIMENTS)})")
    try:
        config_class = load_config_class(str(experiment))
    except UnknownExperimentError as error:
        raise UsageError(f"{file}: {error}") from error
    program = f"modmoe run {file}"
    keys = Keys(config_class(), program)
    seeds = keys.from_yaml("seeds", settings.pop("seeds", 1), str(file))
    first_seed = keys.from_yaml("first_seed", settings.pop("first_seed", 0), str(file))
    out = Path("runs") / file.stem
    changes = keys.flatten(settings, str(file))
    for key, text in options:
        value = keys.from_text(key, text)
        if key == "seeds":
            seeds = value
        elif key == "first_seed":
            first_seed = value
        elif key == "out":
            out = Path(value)
        else:
            changes[key] = value
    if seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {seeds}")
    if first_seed < 0:
        raise UsageError(f"first_seed must be at least 0, got {first_seed}")
    try:
        config = replaced(config_class(), changes)
    except ValueError as error:  # a config dataclass checks its values in __post_init__
        raise UsageError(f"{file}: {error}") from error
    if wants_help:  # with the values that would be run
        print(Keys(config, program, seeds, first_seed, out).help())
        return 0

    from modmoe.experiments.runner import run_experiment

    try:
        run_experiment(config, str(experiment), seeds, out, first_seed)
    except NotADirectoryError as error:
        raise UsageError(str(error)) from error
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
                    raise UsageError(f"--{key} needs a value")
            options.append((key, text))
        elif argument.startswith("-"):
            raise UsageError(f"unknown option '{argument}'")
        elif file is None:
            file = Path(argument)
        else:
            raise UsageError(f"unexpected argument '{argument}'; a setting is written --key value")
    return file, options, wants_help


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"config file not found: {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the config file {file}: {error}") from error
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise UsageError(f"invalid YAML in {file}{line}: {problem}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{file}: expected settings of the form 'key: value'")
    return settings
