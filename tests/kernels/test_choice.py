"""The table of measured times, what auto takes from it, and how it is explained."""

import json
from pathlib import Path

import pytest
import torch

from modmoe import (
    ConvExpert,
    DenseRouter,
    ExpertPool,
    MLPExpert,
    MoELayer,
    NoisyTopKRouter,
    SoftRouter,
    TopKRouter,
    cli,
)
from modmoe.errors import TableError
from modmoe.kernels import choice, table, tune
from modmoe.kernels.choice import Choice, choose_backend, default_backend, weights_of
from modmoe.kernels.table import Measurement, Table, Work, current_table, read_table
from modmoe.routing import Routing

SMALL = Work(8, 1.0, 4, 1024, True)
LARGE = Work(2048, 2.0, 16, 16384, True)


def measured(work: Work, dtype: str = "float32", **seconds: float) -> Measurement:
    return Measurement("cpu", dtype, work, seconds)


@pytest.fixture
def use(monkeypatch):
    """Let auto choose by a table of given measurements."""

    def install(*measurements: Measurement) -> None:
        made = Table(measurements, "a made-up table")
        monkeypatch.setattr(choice, "current_table", lambda: made)

    return install


def test_distance_by_hand():
    # 8 -> 2048 tokens are 8 doublings, k 1 -> 2 one, 4 -> 16 experts two, 1024 -> 16384 weights four
    assert SMALL.distance(LARGE) == 15
    assert SMALL.distance(SMALL) == 0
    assert SMALL._replace(tokens=0).distance(SMALL) == 4  # no tokens count as half a token


def test_nearest_is_of_the_same_device_dtype_and_mode():
    forward = measured(LARGE._replace(training=False), fused=1.0)
    rows = (measured(SMALL, fused=1.0), measured(LARGE, fused=2.0), measured(LARGE, "float64", fused=3.0), forward)
    made = Table(rows, "here")
    assert made.nearest("cpu", "float32", LARGE._replace(tokens=100)) is rows[1]
    assert made.nearest("cpu", "float32", SMALL._replace(tokens=100)) is rows[0]
    assert made.nearest("cpu", "float64", SMALL) is rows[2]
    assert made.nearest("cpu", "float32", SMALL._replace(training=False)) is forward
    assert made.nearest("cuda", "float32", SMALL) is None


def test_saved_and_read(tmp_path: Path):
    made = Table((measured(SMALL, dense=1e-4, fused=2e-4),), "here")
    made.save(tmp_path / "deep" / "table.json")
    assert read_table(tmp_path / "deep" / "table.json", "here") == made


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 0, "measurements": []}', '{"version": 1, "measurements": [1]}']
)
def test_a_broken_table_is_an_error_that_names_it(text: str, tmp_path: Path):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(TableError, match=r"broken\.json is no table of `modmoe tune`"):
        read_table(tmp_path / "broken.json")


def layer_of(num_experts: int = 4) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(ExpertPool(MLPExpert(16, 32), num_experts), TopKRouter(16, 1))


@pytest.mark.parametrize("best", ["dense", "fused"])
def test_auto_takes_what_was_fastest_and_says_so(best: str, use):
    seconds = {"dense": 2e-3, "bmm": 1e-9, "fused": 2e-3, "grouped": 1e-9, best: 1e-3}
    use(measured(SMALL, **seconds))
    layer, x = layer_of(), torch.eye(16)[:4].repeat(2, 1)
    layer.pool.growable("gate", "weight").banks()[0][0].data.copy_(torch.eye(16)[:4])  # even loads
    chosen = layer.explain(x)
    assert chosen.backend == best
    assert str(chosen).startswith(
        f"{best}: 1 ms where a made-up table is nearest: 8 tokens, top-1 of 4 experts of 1024"
    )
    assert "2 ms" in chosen.reason
    assert torch.allclose(layer(x), MoELayer.mix(_as(layer, "reference"), x, layer.routing), atol=1e-6)


def _as(layer: MoELayer, backend: str) -> MoELayer:
    layer.backend = backend
    return layer


def test_an_uneven_load_rules_out_the_padded_product(use, monkeypatch):
    expert, x = ConvExpert((1, 4, 4), (2,)), torch.randn(8, 16)
    monkeypatch.setattr(ConvExpert, "one_by_one_on_cpu", False)
    use(measured(SMALL._replace(weights=weights_of(expert)), dense=3e-3, bmm=1e-3, grouped=2e-3))
    even, uneven = Routing.assigned(torch.arange(8) % 4, 4), Routing.assigned(torch.tensor([0] * 5 + [1, 2, 3]), 4)
    assert choose_backend(expert, 4, x, even).backend == "bmm"
    assert choose_backend(expert, 4, x, uneven).backend == "grouped"  # 5 / 2 > 2


def test_forward_alone_is_another_case(use):
    use(measured(SMALL, dense=1e-3, fused=2e-3), measured(SMALL._replace(training=False), dense=2e-3, fused=1e-3))
    layer, x = layer_of(), torch.randn(8, 16)
    assert layer.explain(x).backend == "dense"
    with torch.no_grad():
        assert layer.explain(x).backend == "fused"


def test_where_nothing_was_measured_sizes_decide(use):
    use()
    assert layer_of(4).explain(torch.randn(8, 16)).backend == "dense"
    assert layer_of(9).explain(torch.randn(8, 16)).backend == "fused"
    images = MoELayer(ExpertPool(ConvExpert((1, 4, 4), (2,)), 2), DenseRouter(16))
    assert images.explain(torch.randn(3, 16)).backend == "reference"


def test_compiled_graphs_do_not_ask_the_table(use, monkeypatch):
    use(measured(SMALL, dense=1.0, bmm=1e-3, fused=1e-3))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert (
        choose_backend(MLPExpert(16, 32), 9, torch.randn(8, 16), Routing.assigned(torch.arange(8), 9)).backend
        == "grouped"
    )


def test_explaining_changes_nothing():
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(16, 32), 4), NoisyTopKRouter(16, 2))
    x = torch.randn(8, 16)
    layer(x)
    before, state = layer.routing, torch.random.get_rng_state()
    assert isinstance(layer.explain(x), Choice)
    assert layer.routing is before
    assert torch.equal(torch.random.get_rng_state(), state)
    layer.backend = "grouped"
    assert str(layer.explain(x)) == "grouped: the layer was built so"
    soft = MoELayer(ExpertPool(MLPExpert(16, 32), 4), SoftRouter(16))
    assert soft.explain(x).backend == "bmm"


def test_weights_of_an_expert():
    assert weights_of(MLPExpert(16, 32)) == 2 * 16 * 32  # biases are no products


def test_batches_of_nearly_one_size_share_an_answer():
    assert choice._rounded(SMALL._replace(tokens=1000)) == choice._rounded(SMALL._replace(tokens=1020))
    assert choice._rounded(SMALL._replace(tokens=1000)).tokens == 1024  # in steps of 64
    assert choice._rounded(SMALL._replace(tokens=7)).tokens == 7


# -- measuring -----------------------------------------------------------------------------------------------------


def test_measuring_gives_a_row_for_each_case_and_mode():
    made = tune.measure([tune.Case(8, 16, 32, 4, 1)], budget=0.01)
    assert [m.work for m in made.measurements] == [SMALL._replace(training=False), SMALL]
    assert all(set(m.seconds) == {"dense", "bmm", "grouped", "fused"} for m in made.measurements)
    assert all(0 < seconds < 1 for m in made.measurements for seconds in m.seconds.values())
    assert "of 1 cases" in tune.summary(made)
    double = tune.measure([tune.Case(8, 16, 32, 4, 1)], torch.float64, budget=0.01)
    assert "grouped" not in double.measurements[0].seconds


def test_the_table_that_comes_with_modmoe_covers_the_grid():
    builtin = read_table(Path(table.__file__).with_name("table.json"))
    works = {m.work for m in builtin.measurements}
    for case in tune.grid():
        weights = 2 * case.features * case.hidden
        assert {Work(case.tokens, float(case.top_k), case.experts, weights, t) for t in (False, True)} <= works


def test_the_command_keeps_a_table_that_auto_reads(tmp_path: Path, monkeypatch, capsys):
    own = tmp_path / "own.json"
    monkeypatch.setenv("MODMOE_TABLE", str(own))
    monkeypatch.setattr(tune, "grid", lambda: [tune.Case(8, 16, 32, 4, 1)])
    assert cli.main(["tune", "--seconds", "0.01"]) == 0
    assert f"kept in {own}" in capsys.readouterr().out
    assert len(json.loads(own.read_text())["measurements"]) == 2
    current_table.cache_clear()
    try:
        assert "own table" in layer_of().explain(torch.randn(8, 16)).reason
    finally:
        current_table.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "here"], "takes --out and --seconds, got here"),
        (["tune", "--fast", "1"], "got --fast"),
        (["tune", "--seconds", "zero"], "--seconds expects a number above 0, got 'zero'"),
        (["tune", "--seconds", "-1"], "got '-1'"),
        (["tune", "--seconds"], "--seconds needs a value"),
    ],
)
def test_the_command_refuses(arguments: list[str], message: str, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_without_measurements_kind_and_sizes_decide(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    mlp, conv = MLPExpert(8, 8), ConvExpert((1, 4, 4), (2,))
    assert default_backend(mlp, 4, 64, torch.float32, cpu).backend == "dense"
    assert default_backend(mlp, 5, 64, torch.float32, cpu).backend == "fused"
    assert default_backend(mlp, 4, 65, torch.float32, cpu).backend == "fused"
    assert default_backend(mlp, 2, 2, torch.float32, cuda).backend == "grouped"
    assert (
        default_backend(conv, 4, 64, torch.float32, cpu).backend == "reference"
    )  # one native convolution after the other
    assert default_backend(conv, 4, 64, torch.float32, cuda).backend == "grouped"
    assert default_backend(mlp, 100, 1000, torch.float64, cpu).backend == "fused"
    assert default_backend(mlp, 100, 1000, torch.float64, cuda).backend == "reference"  # grouped_mm has no float64
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert default_backend(conv, 4, 65, torch.float32, cpu).backend == "grouped"
    assert default_backend(mlp, 100, 1000, torch.float32, cpu).backend == "grouped"
    assert (
        default_backend(mlp, 100, 1000, torch.float64, cpu).backend == "dense"
    )  # the loop's nonzero would break the graph
