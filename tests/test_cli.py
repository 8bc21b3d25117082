import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

import modmoe
from modmoe import cli
from modmoe.analysis.records import MethodRecord
from modmoe.errors import DataNotFoundError, MissingExtraError
from modmoe.experiments import EXPERIMENTS


@dataclass
class Gate:
    """How tokens find experts.

    Args:
        top_k: experts per token.
        kind: how the gate scores.
    """

    top_k: int = 2
    kind: Literal["softmax", "density"] = "softmax"


@dataclass
class Toy:
    """A toy experiment.

    Args:
        num_epochs: passes over the data, at least 1.
        learning_rate: step size.
        methods: what to run.
        limit: most samples, or null for all.
        fail: how to fail.
        gate: the gate of the pool.
    """

    num_epochs: int = 1
    learning_rate: float = 0.1
    methods: list[str] = field(default_factory=lambda: ["pool"])
    limit: int | None = None
    fail: str = ""
    gate: Gate = field(default_factory=lambda: Gate(top_k=3))

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            raise ValueError(f"num_epochs must be at least 1, got {self.num_epochs}")

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        if self.fail == "interrupt":
            raise KeyboardInterrupt
        if self.fail == "extra":
            raise MissingExtraError("'avalanche' is needed; pip install 'modmoe[continual]'")
        if self.fail == "data":
            raise DataNotFoundError("brown", "data", Path("data/brown/brown.json"))
        if self.fail == "bug":
            raise ValueError("a bug")
        return {method: MethodRecord({"score": float(seed)}) for method in self.methods}


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(EXPERIMENTS, "toy", Toy)
    monkeypatch.chdir(tmp_path)
    return write(tmp_path, "experiment: toy\n")


def write(folder: Path, text: str) -> Path:
    file = folder / "small.yaml"
    file.write_text(text)
    return file


def settings(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())["config"]


def complaint(capsys, *arguments: str, status: int = 2) -> str:
    """Run the command, which must fail with one line on stderr and nothing on stdout; give that line."""
    assert cli.main(arguments) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.rstrip("\n")


def test_defaults_go_to_a_folder_named_after_the_config(config):
    assert cli.main(["run", str(config)]) == 0
    assert settings(Path("runs/small")) == {
        "experiment": "toy",
        "seeds": 1,
        "num_epochs": 1,
        "learning_rate": 0.1,
        "methods": ["pool"],
        "limit": None,
        "fail": "",
        "gate": {"top_k": 3, "kind": "softmax"},
    }


def test_the_file_sets_and_the_command_line_overrides(config, tmp_path):
    text = "experiment: toy\nseeds: 4\nnum_epochs: 5\nlearning_rate: 1e-3\ngate:\n  kind: density\n  top_k: 1\n"
    write(tmp_path, text)
    options = ["--num_epochs", "7", "--gate.top_k=4", "--methods=[a, b]", "--limit", "9", "--seeds", "2"]
    assert cli.main(["run", "--out", "here", str(config), *options]) == 0
    kept = settings(tmp_path / "here")
    assert kept["seeds"] == 2
    assert kept["num_epochs"] == 7
    assert kept["learning_rate"] == 0.001  # YAML itself reads 1e-3 as text
    assert kept["methods"] == ["a", "b"]
    assert kept["limit"] == 9
    assert kept["gate"] == {"top_k": 4, "kind": "density"}


def test_the_first_seed_may_be_another(config, tmp_path, capsys):
    write(tmp_path, "experiment: toy\nseeds: 2\nfirst_seed: 5\n")
    assert cli.main(["run", str(config)]) == 0
    assert json.loads(Path("runs/small/metrics.json").read_text())["methods"]["pool"]["score"]["seeds"] == [5.0, 6.0]
    assert cli.main(["run", str(config), "--first_seed", "7"]) == 0
    assert settings(Path("runs/small"))["first_seed"] == 7
    capsys.readouterr()
    assert complaint(capsys, "run", str(config), "--first_seed", "-1") == (
        "modmoe: error: first_seed must be at least 0, got -1"
    )


def test_the_file_may_use_dotted_keys_and_keeps_the_defaults_beside_them(config, tmp_path):
    write(tmp_path, "experiment: toy\nseeds: 3\ngate.kind: density\nlimit: null\n")
    assert cli.main(["run", str(config), "--learning_rate", "-1"]) == 0
    kept = settings(Path("runs/small"))
    assert kept["gate"] == {"top_k": 3, "kind": "density"}
    assert kept["learning_rate"] == -1.0
    assert kept["seeds"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_epoch", "3"], "unknown key '--num_epoch'; did you mean 'num_epochs'?"),
        (["--num-epochs=3"], "unknown key '--num-epochs'; did you mean 'num_epochs'?"),
        (["--gate.topk", "3"], "unknown key '--gate.topk'; did you mean 'gate.top_k'?"),
        (["--zzz", "3"], "unknown key '--zzz'"),
        (["--gate", "3"], "--gate holds several settings; set one of them: --gate.NAME value"),
        (["--num_epochs", "many"], "--num_epochs expects int, got 'many'"),
        (["--gate.kind", "hard"], "--gate.kind expects one of 'softmax', 'density', got 'hard'"),
        (["--limit", "x"], "--limit expects int | None, got 'x'"),
        (["--methods", "3"], "--methods expects list[str], got '3'"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--seeds", "x"], "--seeds expects int, got 'x'"),
        (["--num_epochs"], "--num_epochs needs a value"),
        (["--experiment", "toy"], "'experiment' is set in the config file, not on the command line"),
        (["-n"], "unknown option '-n'"),
        (["more"], "unexpected argument 'more'; a setting is written --key value"),
        (["--out", "small.yaml"], "cannot write results to small.yaml: small.yaml is a file"),
    ],
)
def test_mistakes_on_the_command_line(config, capsys, options, message):
    assert complaint(capsys, "run", str(config), *options) == f"modmoe: error: {message}"
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_epoch: 3", "unknown key 'num_epoch'; did you mean 'num_epochs'?"),
        ("gate: {topk: 3}", "unknown key 'gate.topk'; did you mean 'gate.top_k'?"),
        ("gate: 3", "key 'gate' expects settings of its own, got 3"),
        ("num_epochs: many", "key 'num_epochs' expects int, got 'many'"),
        ("num_epochs: 1.5", "key 'num_epochs' expects int, got 1.5"),
        ("num_epochs:", "key 'num_epochs' expects int, got None"),
        ("gate: {kind: hard}", "key 'gate.kind' expects one of 'softmax', 'density', got 'hard'"),
        ("seeds: x", "key 'seeds' expects int, got 'x'"),
        ("out: here", "'out' is set on the command line: --out DIR"),
        ("num_epochs: 0", "num_epochs must be at least 1, got 0"),
    ],
)
def test_mistakes_in_the_file(config, tmp_path, capsys, text, message):
    write(tmp_path, f"experiment: toy\n{text}\n")
    assert complaint(capsys, "run", str(config)) == f"modmoe: error: {config}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experiment: toi\n", "unknown experiment 'toi'; did you mean 'toy'?"),
        ("seeds: 3\n", "the key 'experiment' is missing (known: continual, "),
        ("- a\n", "expected settings of the form 'key: value'"),
        ("", "expected settings of the form 'key: value'"),
        ("experiment: toy\nseeds: [1\n", "small.yaml, line 3: "),
    ],
)
def test_a_file_that_describes_no_experiment(config, tmp_path, capsys, text, message):
    write(tmp_path, text)
    line = complaint(capsys, "run", str(config))
    assert message in line
    assert str(config) in line


def test_a_missing_or_unreadable_file(config, tmp_path, capsys):
    assert complaint(capsys, "run", "no.yaml") == "modmoe: error: config file not found: no.yaml"
    assert "cannot read the config file" in complaint(capsys, "run", str(tmp_path))
    assert complaint(capsys, "run") == "modmoe: error: a config file is needed: modmoe run CONFIG"
    assert complaint(capsys, "rnu") == "modmoe: error: unknown command 'rnu'; did you mean 'run'?"


def test_failures_of_a_run(config, capsys):
    assert cli.main(["run", str(config), "--fail", "extra"]) == 1
    assert capsys.readouterr().err.endswith("modmoe: error: 'avalanche' is needed; pip install 'modmoe[continual]'\n")
    assert cli.main(["run", str(config), "--fail", "data"]) == 1
    assert capsys.readouterr().err.endswith("is missing. Fetch it with: python scripts/fetch_data.py brown\n")
    assert cli.main(["run", str(config), "--fail", "interrupt"]) == 130
    assert capsys.readouterr().err.endswith("modmoe: interrupted\n")
    with pytest.raises(ValueError, match="a bug"):  # a bug keeps its traceback
        cli.main(["run", str(config), "--fail", "bug"])


def test_help(config, capsys):
    assert cli.main([]) == 0
    bare = capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == bare
    assert "modmoe run CONFIG" in bare
    assert cli.main(["run", "--help"]) == 0
    assert f"experiments: {', '.join(EXPERIMENTS)}" in capsys.readouterr().out


def test_help_on_a_config_lists_its_settings(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["run", str(config), "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "A toy experiment." in text
    assert "--num_epochs NUM_EPOCHS passes over the data, at least 1. (type: int, default: 1)" in text
    assert "gate: the gate of the pool:" in text
    assert "--gate.top_k TOP_K experts per token. (type: int, default: 3)" in text
    assert "--gate.kind {softmax,density} how the gate scores." in text
    assert "methods+" not in text
    assert not Path("runs").exists()


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"modmoe {modmoe.__version__}\n"


def test_the_command_line_itself_loads_nothing_heavy():
    """What `modmoe` imports beyond what `import modmoe` does."""
    code = (
        "import sys, modmoe; before = set(sys.modules); import modmoe.cli;"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new & {'torch', 'scipy', 'tensorboard', 'matplotlib', 'jsonargparse', 'avalanche'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from modmoe.cli import main; sys.exit(main(['--help']))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
