"""The kernel benchmark: its routings, its method, and a run of tiny cases from end to end. No time is asserted."""

import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modmoe.kernels.select import BACKENDS

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "kernels.py"
MODULES = ("kernel_arms", "kernel_cases", "kernel_peers", "kernel_summary", "measure", "plot_kernels")
QUICK = {
    "32,16,32,4,1",
    "64,16,32,16,2",
    "64,16,32,32,2,zipf",
    "64,16,32,16,2,empty",
    "64,16,32,20,2,frozen90",
    "64,16,32,8,2,cohorts4",
}


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmark's modules, which import each other as scripts do."""
    pytest.importorskip("matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield SimpleNamespace(**{name: import_module(name) for name in MODULES})


# -- routings ----------------------------------------------------------------------------------------------------------


def test_zipf_loads_by_hand(bench):
    # two experts, the largest 1.5 times the mean of 50: 75 and 25
    assert bench.kernel_cases.zipf_loads(100, 2, 100, 1.5) == [75, 25]
    with pytest.raises(ValueError, match="a load of 75 is needed, and one expert takes at most 60 tokens"):
        bench.kernel_cases.zipf_loads(100, 2, 60, 1.5)


@pytest.mark.parametrize("suffix", ["", ",zipf", ",empty", ",frozen90", ",cohorts8"])
def test_routings_are_the_same_each_time_and_give_each_token_different_experts(bench, suffix):
    case = bench.kernel_cases.Case(f"1024,128,256,32,2{suffix}")
    choices = case.choices()
    assert torch.equal(choices, bench.kernel_cases.Case(case.name).choices())
    assert choices.shape == (1024, 2)
    assert bool((choices[:, 0] != choices[:, 1]).all())
    loads = choices.flatten().bincount(minlength=32)
    # 2048 assignments, a mean of 64: Zipf's largest 15 * 64 = 960; 8 of 32 experts empty, the others 2048 / 24 = 85.3
    if suffix == ",zipf":
        assert loads.max() == 960
        assert loads.min() >= 1
    elif suffix == ",empty":
        assert sorted(loads.tolist()) == [0] * 8 + [85] * 16 + [86] * 8
    else:
        assert set(loads.tolist()) == {64}
        first_sequence = choices[:128].flatten().bincount(minlength=32)
        assert set(first_sequence.tolist()) == {8}  # 128 * 2 / 32: as st_moe needs it


@pytest.mark.parametrize("name", ["T32,d32,h64,E4,k1", "32,32,64,4", "32,32,64,4,1,frozen", "32,32,64,4,1,other"])
def test_other_names_are_refused(bench, name):
    with pytest.raises(ValueError, match="is no T,d,h,E,k"):
        bench.kernel_cases.Case(name)


# -- the method --------------------------------------------------------------------------------------------------------


def test_ratios_are_paired_by_round(bench):
    timings = bench.measure.Timings({"a": {0: 2.0, 1: 60.0, 2: 9.0}, "b": {0: 1.0, 2: 3.0}})
    # rounds 0 and 2: 2 / 1 = 2 and 9 / 3 = 3; their median 2.5, quartiles 2.25 and 2.75
    assert timings.ratio("a", "b") == bench.measure.Spread(2.5, 2.25, 2.75)


def test_slow_arms_rest_and_meet_the_others(bench):
    seconds = {"fast": 0.001, "other": 0.001, "slow": 0.1}
    calls = {name: (lambda name=name: name) for name in seconds}
    timings = bench.measure.time_in_turn(calls, lambda name: None, 0.301, lambda call: seconds[call()])
    # shares of just over .1 s: 100 rounds, and 1, raised to 3; 100 / 3 = 33 rounds apart, as a power of two 32
    assert set(timings.seconds["fast"]) == set(range(100))
    assert set(timings.seconds["slow"]) == set(range(0, 100, 32))
    assert timings.ratio("slow", "fast").median == pytest.approx(100)


def test_peak_counts_what_is_held_at_once(bench):
    def call() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first, second
        torch.ones(1500)

    # two of 4,000 bytes at once, with a few bytes for the 1; then one of 6,000
    assert 8000 <= bench.measure.peak_bytes(call, torch.device("cpu")) < 8100


def test_an_arm_that_computes_something_else_is_refused(bench):
    arms = bench.kernel_arms
    problem = arms.Problem.of(bench.kernel_cases.Case("32,16,32,4,1"))
    ours, *others = arms.mlp_arms(problem)
    arms.check_equal([ours, *others])
    wrong = arms.Arm("wrong", lambda: ours.forward() * 1.001, problem, ours.parameters)
    with pytest.raises(ValueError, match=r"the output of wrong differs from that of auto by 1\.0e-03"):
        arms.check_equal([ours, wrong])


def test_the_worst_case_counts(bench):
    summary = bench.kernel_summary
    rows = [
        {"case": f"{tokens},64,128,16,2", "arm": "raw_grouped_mm", "metric": "fwd_bwd_vs_auto", "value": value}
        for tokens, value in ((32, 1.3), (128, 1.1))
    ]
    (result,) = summary.must_reach(rows)
    assert (result["case"], result["value"]) == ("128,64,128,16,2", 1.1)
    assert result["reached"] == [True, False]  # of at least 1.0 and 1.2


def test_missing_peers_are_named_with_how_to_install_them(bench, monkeypatch):
    monkeypatch.setattr(bench.kernel_peers, "find_spec", lambda name: None)
    missing = bench.kernel_peers.missing_peers(on_gpu=False)
    assert missing["st_moe"] == "pip install st-moe-pytorch"
    assert set(missing) == {"transformers_eager", "transformers_grouped", "st_moe", "soft_moe"}


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bench") / "kernels.json"
    subprocess.run([sys.executable, str(SCRIPT), "--json", str(path), "--quick"], check=True, capture_output=True)
    return path.read_text()


@pytest.fixture(scope="module")
def rows(written: str) -> dict[tuple[str, str, str], float]:
    return {(row["case"], row["arm"], row["metric"]): row["value"] for row in json.loads(written)["rows"]}


def arms_of(rows: dict[tuple[str, str, str], float], case: str, metric: str) -> set[str]:
    return {arm for name, arm, what in rows if (name, what) == (case, metric)}


def test_rows_have_the_four_keys_and_positive_numbers(written, rows):
    content = json.loads(written)
    assert all(set(row) == {"case", "arm", "metric", "value"} for row in content["rows"])
    assert len(rows) == len(content["rows"])  # none twice
    assert {case for case, _, _ in rows} == QUICK
    assert all(math.isfinite(value) and value > 0 for value in rows.values())
    assert content["conditions"]["threads"] == 1


def test_every_backend_and_peer_has_its_rows(written, rows):
    backends = {"dense_backend" if name == "dense" else name for name in BACKENDS if name != "triton"}
    always = backends | {"dense", "balanced_bmm", "raw_grouped_mm"}
    peers = {"transformers_eager", "transformers_grouped", "st_moe", "soft_moe"}
    peers -= set(json.loads(written)["conditions"]["left_out"])
    for metric in ("fwd_vs_dense", "fwd_bwd_vs_dense", "fwd_bwd_vs_auto", "step_vs_auto", "peak_bytes"):
        assert always | peers <= arms_of(rows, "64,16,32,16,2", metric)
        assert always <= arms_of(rows, "64,16,32,16,2,empty", metric)
    assert "gate" in arms_of(rows, "64,16,32,16,2", "fwd_bwd_ms")
    assert "auto_all_trainable" in arms_of(rows, "64,16,32,20,2,frozen90", "step_vs_auto")
    assert "auto_one_cohort" in arms_of(rows, "64,16,32,8,2,cohorts4", "step_vs_auto")
    assert arms_of(rows, "64,16,32,8,2,cohorts4", "grow_ms") == {"auto"}


def test_an_arm_beside_itself_is_one(rows):
    for (_, arm, metric), value in rows.items():
        if (arm, metric) in {("dense", "fwd_bwd_vs_dense"), ("auto", "fwd_bwd_vs_auto"), ("auto", "step_vs_auto")}:
            assert value == 1


def test_frozen_experts_take_less_memory(rows):
    # 18 of 20 experts have no gradient; each has 2 * 16 * 32 + 32 + 16 = 1,072 numbers of 4 bytes
    case = "64,16,32,20,2,frozen90"
    saved = rows[case, "auto_all_trainable", "peak_bytes"] - rows[case, "auto", "peak_bytes"]
    assert saved > 0.9 * 18 * 1072 * 4


def test_nothing_names_this_machine(written):
    assert platform.node() not in written
    assert str(ROOT) not in written


def test_a_pattern_that_fits_no_case_is_refused(tmp_path):
    command = [sys.executable, str(SCRIPT), "--json", str(tmp_path / "no.json"), "--quick", "--cases", "zpif"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no case's name contains 'zpif'" in done.stderr


def test_the_figure_is_drawn_from_the_rows(bench, written, tmp_path):
    bench.plot_kernels.draw(json.loads(written)["rows"], tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "kernels.png").stat().st_size < 100_000
    with pytest.raises(ValueError, match="nothing to draw"):
        bench.plot_kernels.draw([], tmp_path / "empty.png")
