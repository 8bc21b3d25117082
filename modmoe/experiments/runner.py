"""Run an experiment over seeds and write what came out: numbers, TensorBoard events and a report."""

import dataclasses
import json
import math
import os
import shutil
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from tqdm import tqdm

from modmoe.experiments.registry import ExperimentConfig
from modmoe.hosts import import_host


def run_experiment(config: ExperimentConfig, name: str, seeds: int, out: str | Path, first_seed: int = 0) -> dict:
    """Run all methods of an experiment for several seeds, print a table and write the results.

    Written to ``out``, replacing what an earlier run left there: ``metrics.json`` (``{"config": {...},
    "methods": {NAME: {METRIC: {"mean": x, "seeds": [..]}}}}``, null for a non-finite number), ``report.html``
    and ``tensorboard/seed<k>/<method>/``. Other files in ``out`` stay. A bar on stderr shows the progress.
    Under torchrun every process runs, and the first alone writes and prints.

    Args:
        config: the settings; its ``run`` does the work for one seed.
        name: the experiment's name, kept in the results.
        seeds: how many seeds, at least 1.
        out: folder for the results; made if needed.
        first_seed: seeds first_seed, first_seed + 1, ... are run.
    Returns:
        What ``metrics.json`` holds.
    Raises:
        ValueError: if seeds < 1, or the seeds do not give the same methods and metrics.
        NotADirectoryError: if out, or a folder above it, is a file.
        MissingExtraError: if matplotlib, which draws the heat maps for TensorBoard, is not installed.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    import_host("matplotlib")  # before the work, not after hours of it
    settings = {"experiment": name, "seeds": seeds}
    if first_seed:
        settings["first_seed"] = first_seed
    settings |= {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if _is_first_process():
        return _run(config, settings, seeds, Path(out), first_seed)
    with tempfile.TemporaryDirectory() as nowhere, open(os.devnull, "w") as nobody, redirect_stdout(nobody):
        return _run(config, settings, seeds, Path(nowhere), first_seed)


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # torchrun's variable


def _run(config: ExperimentConfig, settings: dict, seeds: int, out: Path, first_seed: int) -> dict:
    # Imported here, with torch behind it, so that the command line's help does not wait for it.
    from modmoe.analysis.records import mean_matrices, summarise
    from modmoe.analysis.report import write_report
    from modmoe.analysis.tensorboard import write_events

    name = settings["experiment"]
    events = out / "tensorboard"
    _prepare(out, events)

    per_seed, summary = [], {}
    with tqdm(total=seeds, unit="seed", dynamic_ncols=True, disable=not _is_first_process()) as bar:
        for seed in range(first_seed, first_seed + seeds):
            bar.set_description(f"seed {seed}")
            records = config.run(seed, lambda text, seed=seed: bar.set_description(f"seed {seed}: {text}"))
            for method, record in records.items():
                write_events(events / f"seed{seed}" / method.replace("/", "_"), record)
            per_seed.append(records)
            summary = summarise(per_seed)  # after every seed: a method that lost a metric is told at once
            bar.update()

    about = {method: record.about for method, record in per_seed[0].items()}
    pictures = {method: record.pictures for method, record in per_seed[0].items()}
    results = {"config": settings, "methods": summary}
    _write_json(out / "metrics.json", results)
    write_report(out / "report.html", f"modmoe: {name}", settings, summary, mean_matrices(per_seed), about, pictures)
    print(_text_table(summary))
    print()
    for label, path in (
        ("metrics", out / "metrics.json"),
        ("report", out / "report.html"),
        ("events", events),
    ):
        print(f"{label:8} {path}")
    print(f"\nLearning curves: tensorboard --logdir {events}")
    return results


def _prepare(out: Path, events: Path) -> None:
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"cannot write results to {out}: {folder} is a file")
    out.mkdir(parents=True, exist_ok=True)
    # Event files are added to a folder, never replaced, so the last run's would be drawn into this one's.
    if events.exists():
        shutil.rmtree(events)
    for stale in (out / "metrics.json", out / "report.html"):
        stale.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Turn a setting into what JSON can hold; what it cannot becomes text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _write_json(path: Path, results: dict) -> None:
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    # A reader sees the old file or the new one, never half of one.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp gives 0600, and results are meant to be read by others
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _text_table(summary: dict) -> str:
    from modmoe.analysis.report import result_table

    metrics, rows = result_table(summary)
    table = [["method", *metrics], *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
