"""The triton backend against `reference`: outputs, every gradient, what is launched and what the host asks for.

Without a card the kernels run in Triton's interpreter. That has to be switched on before Triton is first imported, and
would break every test that compiles, so one other process runs all jobs (triton_jobs.py), and each test looks at its
own job's result. With a card, ``pytest -m gpu`` runs the same jobs on it, compiled.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modmoe import ExpertPool, LoRAExpert, MLPExpert, Routing, SwiGLUExpert
from modmoe.errors import MissingExtraError
from modmoe.kernels import triton_table
from modmoe.kernels.triton import run_triton, supports

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("triton_jobs.py")
SYNCS = {"_local_scalar_dense", "nonzero", "bincount", "is_nonzero", "masked_select", "unique_consecutive", "_unique2"}


def load_jobs():
    spec = importlib.util.spec_from_file_location("triton_jobs", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


jobs = load_jobs()
CASES, Bank, Case, Setting = jobs.CASES, jobs.Bank, jobs.Case, jobs.Setting

# -- where the jobs run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """The jobs' results by name, from one process with the interpreter."""
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(PROGRAM), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


PLACES = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=PLACES)
def result_of(request):
    """A function from a job's name to its result."""
    if request.param == "cuda":
        return lambda name: jobs.JOBS[name]("cuda")
    results = request.getfixturevalue("interpreted")

    def read(name: str) -> dict:
        assert "error" not in results[name], results[name]["error"]
        return results[name]

    return read


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal up to a part of the largest number of each tensor (or of 1)."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.isfinite(value).all(), name
        scale = max(1.0, float(value.abs().max())) if value.numel() else 1.0
        assert_close(got[name].float(), value, atol=tolerance * scale, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


# float32: sums in another order. Half precision: up to six roundings stand behind a number (the inner product, the
# hidden layer, the gradient's product with the combine weight, the hidden layer's gradient, the result, a sum over k).
# A rounding is 2^-9 in bfloat16, but the interpreter cuts the bits off: 2^-8. It is 2^-12 in float16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6 * 2**-8, torch.float16: 6 * 2**-12}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, result_of):
    result = result_of(name)
    got, expected = result["got"]["tensors"], result["expected"]["tensors"]
    for key, value in got.items():
        assert value.dtype == ((key == "weight.grad" and CASES[name].weight_dtype) or CASES[name].dtype), key
    assert_same(got, expected, TOLERANCE[CASES[name].dtype])
    idle = name in ("no_tokens", "all_dropped")
    empty = {f"{i}" for i, bank in enumerate(CASES[name].banks) if set(bank.positions) <= set(CASES[name].empty)}
    for key, value in expected.items():
        assert idle or (value == 0).all() == (key.partition(".")[0] in empty), key


def test_three_scalar_experts_by_hand(result_of):
    result = result_of("by_hand")
    # f_0(2) = 5, f_2(2) = 5, f_1(-1) = 3; the fourth was dropped: .25 * 5 + .75 * 5 = 5; 2 * 3 = 6
    assert result["y"] == [[5.0], [6.0]]
    assert result["weight"] == [5.0, 5.0, 3.0, 0.0]
    # .25 * f_0' = .25 * 2; 2 * f_1' = 2 * -3
    assert result["x"] == [[0.5], [-6.0]]
    assert result["w_in"] == [1.0, -6.0]  # .25 * 2 * x 2; 2 * 3 * x -1
    assert result["b_in"] == [0.5, 6.0]
    assert result["w_out"] == [0.5, 2.0]  # .25 * relu(2); 2 * relu(1)
    assert result["b_out"] == [0.25, 2.0]
    assert result["frozen"] == [None] * 4


@pytest.mark.parametrize("name", ["torch_func_grad", "a_pool", "one_expert", "without_gradient", "deterministic"])
def test_same(name, result_of):
    result = result_of(name)
    assert_same(result["got"], result["expected"], 1e-5)


@pytest.mark.parametrize("name", ["second_order", "second_order_swiglu"])
def test_second_order_equals_reference(name, result_of):
    result = result_of(name)
    assert result["got"].keys() == result["expected"].keys()
    for key, expected in result["expected"].items():
        assert expected.abs().max() > 0 or key.split()[-1].startswith("2."), key  # an expert without tokens
        assert (result["got"][key] - expected).abs().max() <= 1e-4 * expected.abs().max(), key


def test_a_pool_finds_its_table_again(result_of):
    assert result_of("a_pool")["same_table"]


def test_nothing_is_kept_without_gradient(result_of):
    # one (N, H) buffer, the hidden layer; with gradients two more, the inner products
    assert result_of("without_gradient")["buffers"] == 1


# -- what it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_host_asks_for_no_value_and_copies_no_weights(name, result_of):
    result = result_of(name)
    assert not SYNCS & {operator for operator, _ in result["got"]["operators"]}
    assert "nonzero" in {operator for operator, _ in result["expected"]["operators"]}  # it would have been seen
    # the experts' weights are the only tensors of three axes, but for (T, K, ..) outputs before their sum
    case = CASES[name]
    outputs = (case.num_tokens, case.top_k, case.sizes[1])
    assert {shape for _, shape in result["got"]["forward"] if len(shape) == 3} <= {outputs}


def launches(result: dict) -> dict[str, list[tuple[int, ...]]]:
    found: dict[str, list[tuple[int, ...]]] = {}
    for kernel, grid in result["got"]["launches"]:
        found.setdefault(kernel, []).append(grid)
    return found


def test_frozen_experts_get_no_weight_gradient(result_of):
    # COHORTS: experts 1, 2 and 4 are live; one launch for each matrix covers both cohorts
    assert [grid[1] for grid in launches(result_of("odd_sizes"))["weight_gradient"]] == [3, 3]
    assert [grid[1] for grid in launches(result_of("bfloat16_swiglu_any_order"))["weight_gradient"]] == [3, 3, 3]
    assert launches(result_of("all_frozen")).keys() == {"hidden_forward", "scatter_product", "hidden_backward"}


def test_only_what_is_needed_is_launched(result_of):
    assert len(launches(result_of("only_the_input"))["scatter_product"]) == 2  # the output and the input's gradient
    assert len(launches(result_of("only_the_rows"))["scatter_product"]) == 1
    assert "weight_gradient" not in launches(result_of("only_the_combine_weights"))
    assert launches(result_of("no_tokens")) == {}


@pytest.mark.parametrize("name", ["odd_sizes", "all_dropped"])
def test_the_grid_follows_from_shapes(name, interpreted):
    # loads differ, the bound does not: N // 16 tiles that are full and one more for each expert; D_in, H, D_out in 32s
    grids = launches(interpreted[name])
    tiles, blocks = {"odd_sizes": (42 // 16 + 5, (1, 2, 2)), "all_dropped": (18 // 16 + 3, (1, 1, 1))}[name]
    assert grids["hidden_forward"] == [(tiles * blocks[1],)]
    assert grids["scatter_product"] == [(tiles * blocks[2],), (tiles * blocks[0],)]
    assert grids["hidden_backward"] == [(tiles * blocks[1],)]


# -- what it refuses ---------------------------------------------------------------------------------------------------


class OwnExpert(MLPExpert):
    """May compute anything."""


def test_kinds():
    assert all(supports(expert) for expert in (MLPExpert(2, 2), SwiGLUExpert(2, 2), SwiGLUExpert(2, 2, bias=True)))
    assert not any(supports(expert) for expert in (LoRAExpert(2, 2, 1), OwnExpert(2, 2)))


@pytest.mark.parametrize(
    ("expert", "change", "message"),
    [
        (LoRAExpert(4, 4, 2), {}, "computes MLPExpert and SwiGLUExpert, not LoRAExpert"),
        (MLPExpert(4, 8), {}, "needs float32, bfloat16 or float16 on a CUDA device .* got torch.float32 on cpu"),
        (MLPExpert(4, 8), {"dtype": torch.float64}, "got torch.float64 on cpu"),
        (MLPExpert(4, 8), {"usable": True}, "x is torch.bfloat16 on cpu, the experts are torch.float32 on cpu"),
    ],
)
def test_refusals(expert, change, message, monkeypatch):
    pool = ExpertPool(expert, 2)
    x = torch.zeros(3, 4, dtype=change.get("dtype", torch.float32))
    if "usable" in change:
        monkeypatch.setattr("modmoe.kernels.triton.usable", lambda device, dtype: True)
        x = x.bfloat16()
    with pytest.raises(ValueError, match=message):
        run_triton(pool.banks(), expert, x, Routing.assigned(torch.zeros(3, dtype=torch.int64), 2))


def test_triton_is_loaded_by_the_first_call_only(interpreted):
    assert interpreted["loaded"]["early"] == []


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # Python's way to say that there is none
    monkeypatch.setattr("modmoe.kernels.triton.usable", lambda device, dtype: True)
    pool = ExpertPool(MLPExpert(4, 8), 2)
    with pytest.raises(MissingExtraError, match=r"'triton' is needed .* pip install triton"):
        run_triton(pool.banks(), pool.expert, torch.zeros(3, 4), Routing.assigned(torch.zeros(3).long(), 2))


# -- on a card only ----------------------------------------------------------------------------------------------------


def large(dtype: torch.dtype) -> jobs.Setting:
    banks = (
        Bank(tuple(range(0, 16, 2)), True, 512),
        Bank(tuple(range(1, 13, 2)), False, 512),
        Bank((13, 15), False, 384),
    )
    return Setting(Case(banks, (256, 256), "swiglu_bias", 4096, 2, drop=0.1, dtype=dtype), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_on_a_card(dtype):
    setting = large(dtype)
    got = jobs.output_and_gradients(setting, "triton", dtype)["tensors"]
    assert_same(got, jobs.output_and_gradients(setting, "reference", torch.float32)["tensors"], TOLERANCE[dtype])


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["odd_sizes", "any_order", "bfloat16"])
def test_no_synchronisation_on_a_card(name):
    setting = Setting(CASES[name], "cuda")
    direction = setting.direction.to(CASES[name].dtype)
    for fresh in (True, False):  # the first call compiles; the second has other tensors, hence a new table
        leaves = setting.leaves(CASES[name].dtype)
        with contextlib.nullcontext() if fresh else no_synchronisation():
            (setting.call(leaves, "triton") * direction).sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["odd_sizes", "any_order", "unequal_hidden_sizes"])
def test_a_cuda_graph_replays_on_new_numbers(name):
    setting = Setting(CASES[name], "cuda")
    leaves = setting.leaves(torch.float32)
    wanted = {key: leaf for key, leaf in leaves.items() if leaf.requires_grad}

    def step(backend: str) -> list[Tensor]:
        y = setting.call(leaves, backend)
        return [y, *torch.autograd.grad((y * setting.direction).sum(), list(wanted.values()))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step("triton")  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step("triton")
    triton_table._tables.clear()  # the graph does not depend on what is kept
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.mul_(0.5).add_(0.1)
        setting.expert_index.copy_((setting.expert_index + 1) % CASES[name].num_experts)  # other loads
    graph.replay()
    for got, expected in zip(static, step("reference"), strict=True):
        assert_close(got, expected, atol=1e-4, rtol=1e-4)
