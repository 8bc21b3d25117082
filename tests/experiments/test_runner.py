import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modmoe.analysis.records import Matrix, MethodRecord
from modmoe.experiments import EXPERIMENTS, UnknownExperimentError, load_config_class, run_experiment


@dataclass
class Inner:
    rate: float = 0.5


@dataclass
class Toy:
    offset: float = 0.0
    inner: Inner = field(default_factory=Inner)
    folder: Path = Path("data")
    limit: float = math.inf
    forgets_metric: bool = False

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        progress("task 1 of 2")
        metrics = {} if self.forgets_metric and seed else {"accuracy": self.offset + seed, "loss": math.nan}
        matrix = Matrix(np.array([[0.5 * seed]]), "after task", "task", ["0"], ["0"])
        pool = MethodRecord(metrics, {"accuracy": matrix}, {"num_experts": [1.0, 2.0 + seed]})
        return {"pool": pool, "a/b": MethodRecord({"accuracy": 0.25})}


def test_results_are_written_and_printed(tmp_path, capsys):
    out = tmp_path / "new" / "run"
    results = run_experiment(Toy(offset=1.0), "toy", seeds=2, out=out)
    # offset + seed: 1 and 2, mean 1.5
    assert results == {
        "config": {
            "experiment": "toy",
            "seeds": 2,
            "offset": 1.0,
            "inner": {"rate": 0.5},
            "folder": "data",
            "limit": "inf",
            "forgets_metric": False,
        },
        "methods": {
            "pool": {
                "accuracy": {"mean": 1.5, "seeds": [1.0, 2.0]},
                "loss": {"mean": None, "seeds": [None, None]},
            },
            "a/b": {"accuracy": {"mean": 0.25, "seeds": [0.25, 0.25]}},
        },
    }
    assert json.loads((out / "metrics.json").read_text()) == results
    assert sorted(path.name for path in out.iterdir()) == ["metrics.json", "report.html", "tensorboard"]

    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].split() == ["method", "accuracy", "loss"]
    # half-width t(0.975, 1) * s / sqrt(2) = 12.706 * sqrt(0.5) / sqrt(2) = 6.353
    assert lines[2].split() == ["pool", "1.500", "±", "6.353", "n/a"]
    assert len({len(line) for line in lines[:4]}) == 1
    for name in ("metrics.json", "report.html", "tensorboard"):
        assert str(out / name) in printed.out
    assert "seed 1: task 1 of 2" in printed.err

    events = EventAccumulator(str(out / "tensorboard" / "seed1" / "pool"))
    events.Reload()
    assert [e.value for e in events.Scalars("num_experts")] == [1.0, 3.0]
    assert (out / "tensorboard" / "seed0" / "a_b").is_dir()
    # the report shows the mean over seeds of the matrix: (0 + 0.5) / 2
    assert ">0.25</td>" in (out / "report.html").read_text(encoding="utf-8")


def test_a_second_run_replaces_the_first_and_leaves_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run_experiment(Toy(), "toy", seeds=2, out=tmp_path)
    run_experiment(Toy(), "toy", seeds=1, out=tmp_path, first_seed=4)
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["seed4"]
    assert len(list((tmp_path / "tensorboard" / "seed4" / "pool").iterdir())) == 1
    results = json.loads((tmp_path / "metrics.json").read_text())
    assert results["config"]["first_seed"] == 4
    assert results["methods"]["pool"]["accuracy"]["seeds"] == [4.0]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob("*.tmp"))


def test_bad_arguments_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        run_experiment(Toy(), "toy", seeds=0, out=tmp_path)
    for out in (file, file / "below"):
        with pytest.raises(NotADirectoryError, match="file is a file"):
            run_experiment(Toy(), "toy", seeds=1, out=out)
    with pytest.raises(ValueError, match="metric 'accuracy' of method 'pool' is missing in seed number 1"):
        run_experiment(Toy(forgets_metric=True), "toy", seeds=3, out=tmp_path / "run")


def test_an_experiment_is_found_by_name(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "toy", Toy)
    assert load_config_class("toy") is Toy
    monkeypatch.setitem(EXPERIMENTS, "by_name", "modmoe.analysis.records:Matrix")
    with pytest.raises(TypeError, match=r"a dataclass with a run method, got <class '.*Matrix'>"):
        load_config_class("by_name")
    with pytest.raises(UnknownExperimentError, match=r"'toi'; did you mean 'toy'\? \(known: .*toy, by_name\)"):
        load_config_class("toi")


def test_of_several_processes_the_first_alone_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    results = run_experiment(Toy(), "toy", seeds=1, out=tmp_path / "out")
    assert results["methods"]
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr() == ("", "")


def test_a_config_that_breaks_the_contract_is_refused(monkeypatch):
    @dataclass
    class NoDefault:
        size: int

        def run(self, seed, progress):
            return {}

    @dataclass
    class Reserved:
        seeds: int = 1

        def run(self, seed, progress):
            return {}

    monkeypatch.setitem(EXPERIMENTS, "no_default", NoDefault)
    with pytest.raises(TypeError, match="field 'size' of NoDefault needs a default"):
        load_config_class("no_default")
    monkeypatch.setitem(EXPERIMENTS, "reserved", Reserved)
    with pytest.raises(TypeError, match="Reserved may not name a field 'seeds'"):
        load_config_class("reserved")
