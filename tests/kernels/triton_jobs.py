"""What is measured of the triton backend; test_triton.py looks at the results.

As a program, ``TRITON_INTERPRET=1 python triton_jobs.py RESULTS`` runs all jobs in Triton's interpreter.
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from modmoe import Expert, ExpertPool, MLPExpert, Routing, SwiGLUExpert
from modmoe.kernels import triton_launch, triton_table
from modmoe.kernels.select import combine, compute_assignments
from modmoe.kernels.triton import run_triton
from modmoe.rows import Group

Result = dict[str, Any]


@dataclass(frozen=True)
class Bank:
    """Experts of one size in one set of tensors."""

    positions: tuple[int, ...]
    frozen: bool = False
    hidden: int = 8


@dataclass(frozen=True)
class Case:
    """Which experts, which routing, and what needs a gradient."""

    banks: tuple[Bank, ...] = (Bank((0, 1, 2)),)
    sizes: tuple[int, int] = (5, 4)
    kind: str = "gelu"
    num_tokens: int = 9
    top_k: int = 2
    drop: float = 0.0
    empty: tuple[int, ...] = ()
    shuffled: bool = False  # triples in no order, with repeats
    x_grad: bool = True
    weight_grad: bool = True
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None  # where a router keeps more digits than the experts

    @property
    def num_experts(self) -> int:
        return sum(len(bank.positions) for bank in self.banks)

    def expert(self, hidden: int = 8) -> Expert:
        d_in, d_out = self.sizes
        if self.kind.startswith("swiglu"):
            return SwiGLUExpert(d_in, hidden, d_out, bias=self.kind == "swiglu_bias")
        name, _, rest = self.kind.partition("/")
        return MLPExpert(d_in, hidden, d_out, activation=name, bias=rest != "no_bias")


COHORTS = (Bank((0, 3), frozen=True), Bank((1, 4)), Bank((2,)))
UNEQUAL = (Bank((1,), hidden=33), Bank((0, 3), frozen=True, hidden=20), Bank((2, 4), hidden=7))
CASES = {
    "odd_sizes": Case(
        tuple(Bank(bank.positions, bank.frozen, 33) for bank in COHORTS), (17, 33), drop=0.2, empty=(2,), num_tokens=21
    ),
    "unequal_hidden_sizes": Case(UNEQUAL, (17, 9), "swiglu_bias", drop=0.2),
    "swiglu": Case(kind="swiglu", top_k=1),
    "relu": Case(kind="relu"),
    "silu": Case(kind="silu/no_bias"),
    "tanh": Case(kind="tanh"),
    "gelu_tanh": Case(kind="gelu_tanh"),
    "many_rows_of_one_expert": Case((Bank((0,)), Bank((1,))), num_tokens=40, top_k=1, empty=(0,)),
    "all_experts": Case(COHORTS, top_k=5, num_tokens=3),
    "one_token": Case(num_tokens=1, top_k=1),
    "no_tokens": Case(num_tokens=0),
    "all_dropped": Case(drop=1.0),
    "all_frozen": Case((Bank((0, 1, 2), frozen=True),)),
    "only_the_rows": Case(COHORTS, drop=0.2, x_grad=False, weight_grad=False),
    "only_the_combine_weights": Case((Bank((0, 1, 2), frozen=True),), x_grad=False),
    "only_the_input": Case((Bank((0, 1, 2), frozen=True),), kind="swiglu_bias", weight_grad=False),
    "any_order": Case(COHORTS, shuffled=True, drop=0.2),
    "bfloat16": Case(COHORTS, (17, 9), dtype=torch.bfloat16, drop=0.2),
    "bfloat16_swiglu_any_order": Case(COHORTS, (5, 4), "swiglu_bias", dtype=torch.bfloat16, shuffled=True),
    "float16": Case(COHORTS, dtype=torch.float16, weight_dtype=torch.float32),
}


class Setting:
    """A case's tensors on a device; float32 numbers that the case's dtype holds exactly."""

    def __init__(self, case: Case, device: str):
        self.case = case
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(case.dtype).float()

        n = case.num_tokens * case.top_k
        wanted = [e for e in range(case.num_experts) if e not in case.empty]
        expert_index = torch.tensor(wanted)[torch.randint(len(wanted), (n,), generator=generator)]
        dropped = torch.rand(n, generator=generator) < case.drop
        self.expert_index = torch.where(dropped, -1, expert_index).to(device)
        token = torch.arange(case.num_tokens).repeat_interleave(case.top_k)
        if case.shuffled:  # token 0 has no assignment, others have several
            token = torch.randint(1, case.num_tokens, (n,), generator=generator)
        self.token_index = token.to(device)
        self.values: dict[str, Tensor] = {"x": draw(case.num_tokens, case.sizes[0]), "weight": draw(n)}
        for number, bank in enumerate(case.banks):
            for name, spec in case.expert(bank.hidden).row_specs().items():
                shape = [bank.hidden if isinstance(size, str) else size for size in spec.shape]
                self.values[f"{number}.{name}"] = draw(len(bank.positions), *shape) / 2
        self.direction = draw(case.num_tokens, case.sizes[1]).to(device)
        self.device = device

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """New tensors, which require a gradient where the case says so."""
        live = {f"{number}." for number, bank in enumerate(self.case.banks) if not bank.frozen}
        leaves = {}
        for name, value in self.values.items():
            wanted = {"x": self.case.x_grad, "weight": self.case.weight_grad}.get(name, name[:2] in live)
            own = self.case.weight_dtype if name == "weight" and self.case.weight_dtype else dtype
            leaves[name] = value.to(self.device, own, copy=True).requires_grad_(wanted)
        return leaves

    def call(self, leaves: dict[str, Tensor], backend: str) -> Tensor:
        case = self.case
        banks = [
            Group(
                bank.positions,
                bank.positions,
                bank.frozen,
                {name[2:]: value for name, value in leaves.items() if name.startswith(f"{number}.")},
            )
            for number, bank in enumerate(case.banks)
        ]
        scores = torch.zeros(case.num_tokens, case.num_experts, device=self.device)
        routing = Routing(
            self.token_index,
            self.expert_index,
            leaves["weight"],
            case.num_tokens,
            case.num_experts,
            scores,
            scores,
            top_k=None if case.shuffled else case.top_k,
            has_drops=case.drop > 0,
        )
        return run(backend, banks, case.expert(), leaves["x"], routing)


def run(backend: str, banks: Sequence[Group], expert: Expert, x: Tensor, routing: Routing) -> Tensor:
    if backend == "triton":
        return run_triton(banks, expert, x, routing)
    return combine(compute_assignments(banks, expert, x, routing, "reference"), routing)


class Watch(TorchDispatchMode):
    """The operators that torch runs, with the shapes of their results, and the kernels that are launched."""

    def __init__(self):
        super().__init__()
        self.operators: list[tuple[str, tuple[int, ...]]] = []
        self.launches: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        shape = tuple(result.shape) if isinstance(result, Tensor) else ()
        self.operators.append((func.overloadpacket.__name__, shape))
        return result

    def __enter__(self):
        self.launch = triton_launch.launch

        def launch(kernel, grid, *arguments, **constants):
            self.launches.append((kernel.__name__, tuple(grid)))
            with _disable_current_modes():  # the interpreter's own copies
                self.launch(kernel, grid, *arguments, **constants)

        triton_launch.launch = launch
        return super().__enter__()

    def __exit__(self, *error):
        triton_launch.launch = self.launch
        return super().__exit__(*error)


def output_and_gradients(setting: Setting, backend: str, dtype: torch.dtype) -> Result:
    leaves = setting.leaves(dtype)
    with Watch() as watch:
        y = setting.call(leaves, backend)
        forward = list(watch.operators)
        if y.requires_grad:
            (y * setting.direction.to(dtype)).sum().backward()
    grads = {f"{name}.grad": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    tensors = {name: value.detach().cpu() for name, value in {"y": y, **grads}.items()}
    return {"tensors": tensors, "operators": watch.operators, "forward": forward, "launches": watch.launches}


def contract(case: Case, device: str) -> Result:
    """The backend in the case's dtype, reference in float32 on the same numbers."""
    setting = Setting(case, device)
    return {
        "got": output_and_gradients(setting, "triton", case.dtype),
        "expected": output_and_gradients(setting, "reference", torch.float32),
    }


# -- jobs that are no contract -----------------------------------------------------------------------------------------


def by_hand(device: str) -> Result:
    """Three experts on one feature: f_0(x) = 2 relu(x) + 1, f_1(x) = 3 relu(-x), f_2(x) = 5; f_2 is frozen."""

    def bank(positions: tuple[int, ...], *values: list[float]) -> Group:
        shapes = {"w_in": (-1, 1, 1), "b_in": (-1, 1), "w_out": (-1, 1, 1), "b_out": (-1, 1)}
        frozen = positions == (2,)
        tensors = {
            name: torch.tensor(value, device=device).view(shape).requires_grad_(not frozen)
            for (name, shape), value in zip(shapes.items(), values, strict=True)
        }
        return Group(positions, positions, frozen, tensors)

    banks = [bank((2,), [0.0], [0.0], [0.0], [5.0]), bank((0, 1), [1.0, -1.0], [0.0, 0.0], [2.0, 3.0], [1.0, 0.0])]
    x = torch.tensor([[2.0], [-1.0]], device=device, requires_grad=True)
    weight = torch.tensor([0.25, 0.75, 2.0, 0.0], device=device, requires_grad=True)
    token, expert = torch.tensor([0, 0, 1, 1], device=device), torch.tensor([0, 2, 1, -1], device=device)
    scores = torch.zeros(2, 3, device=device)
    y = run_triton(
        banks,
        MLPExpert(1, 1, activation="relu"),
        x,
        Routing(token, expert, weight, 2, 3, scores, scores, top_k=2),
    )
    y.sum().backward()
    rows = {
        name: tensor.grad.flatten().tolist() for name, tensor in banks[1].tensors.items() if tensor.grad is not None
    }
    frozen = [tensor.grad for tensor in banks[0].tensors.values()]
    assert x.grad is not None
    assert weight.grad is not None
    return {"y": y.tolist(), "x": x.grad.tolist(), "weight": weight.grad.tolist(), "frozen": frozen, **rows}


def second_order(name: str, device: str) -> Result:
    """Gradients of the squared gradients; the input depends on a row, which must not be counted twice."""
    setting = Setting(CASES[name], device)

    def measure(backend: str) -> dict[str, Tensor]:
        leaves = setting.leaves(torch.float32)
        inputs = {key: leaf for key, leaf in leaves.items() if leaf.requires_grad}
        row = next(leaf for key, leaf in inputs.items() if key.endswith("w_in"))
        y = setting.call({**leaves, "x": leaves["x"] * (1 + row.sum() / row.numel())}, backend)
        first = torch.autograd.grad(y.square().sum(), list(inputs.values()), create_graph=True)
        second = torch.autograd.grad(torch.stack([grad.square().sum() for grad in first]).sum(), list(inputs.values()))
        return {
            "y": y.detach().cpu(),
            **{f"first {key}": grad.detach().cpu() for key, grad in zip(inputs, first, strict=True)},
            **{f"second {key}": grad.cpu() for key, grad in zip(inputs, second, strict=True)},
        }

    return {"got": measure("triton"), "expected": measure("reference")}


def torch_func_grad(device: str) -> Result:
    setting = Setting(CASES["odd_sizes"], device)
    leaves = setting.leaves(torch.float32)
    rows = {name: leaf.detach() for name, leaf in leaves.items() if name.startswith("1.")}

    def measure(backend: str) -> dict[str, Tensor]:
        def loss(changed: dict[str, Tensor]) -> Tensor:
            return (setting.call({**leaves, **changed}, backend) * setting.direction).sum()

        return {name: grad.detach().cpu() for name, grad in torch.func.grad(loss)(rows).items()}

    return {"got": measure("triton"), "expected": measure("reference")}


def a_pool(device: str) -> Result:
    """The banks of a pool that has grown and frozen experts, twice: the second call finds its table."""
    torch.manual_seed(0)
    pool = ExpertPool(MLPExpert(5, 8, 4), 3).to(device)
    pool.add_experts(2)
    pool.freeze([0, 3])
    x = torch.randn(7, 5, device=device)
    routing = Routing.assigned(torch.arange(7, device=device) % 5, 5)
    triton_table._tables.clear()
    tables = []
    for _ in range(2):
        got = run_triton(pool.banks(), pool.expert, x, routing)
        tables += [table for _, table in triton_table._tables.values()]
    expected = run("reference", pool.banks(), pool.expert, x, routing)
    same = len(tables) == 2 and tables[0] is tables[1]
    return {"got": {"y": got.detach().cpu()}, "expected": {"y": expected.detach().cpu()}, "same_table": same}


def one_expert(device: str) -> Result:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4)).to(device)
    rows = {"w_in": dense[0].weight.T[None], "b_in": dense[0].bias[None]}
    rows |= {"w_out": dense[2].weight.T[None], "b_out": dense[2].bias[None]}  # the weights stand transposed
    x = torch.randn(11, 6, device=device)
    routing = Routing.assigned(torch.zeros(11, dtype=torch.int64, device=device), 1)

    def measure(y: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(y.square().sum(), list(dense.parameters()))
        return {"y": y.detach().cpu(), **{str(i): grad.cpu() for i, grad in enumerate(grads)}}

    got = run_triton([Group((0,), (0,), False, rows)], MLPExpert(6, 10, 4), x, routing)
    return {"got": measure(got), "expected": measure(dense(x))}


def without_gradient(device: str) -> Result:
    setting = Setting(CASES["unequal_hidden_sizes"], device)
    leaves = setting.leaves(torch.float32)
    trained = setting.call(leaves, "triton")
    with torch.no_grad(), Watch() as watch:
        y = setting.call(leaves, "triton")
    inner = [shape for _, shape in watch.operators if shape == (18, 33)]
    return {"got": {"y": y.cpu()}, "expected": {"y": trained.detach().cpu()}, "buffers": len(inner)}


def deterministic(device: str) -> Result:
    """The same results without atomics, and with a table made as a graph's capture makes it."""
    setting = Setting(CASES["any_order"], device)
    usual = output_and_gradients(setting, "triton", torch.float32)
    capturing = triton_table.capturing
    torch.use_deterministic_algorithms(True)
    triton_table.capturing = lambda device: True
    try:
        got = output_and_gradients(setting, "triton", torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
        triton_table.capturing = capturing
    return {"got": got["tensors"], "expected": usual["tensors"], "launches": got["launches"]}


JOBS: dict[str, Callable[[str], Result]] = {
    **{name: lambda device, case=case: contract(case, device) for name, case in CASES.items()},
    "by_hand": by_hand,
    "second_order": lambda device: second_order("odd_sizes", device),
    "second_order_swiglu": lambda device: second_order("unequal_hidden_sizes", device),
    "torch_func_grad": torch_func_grad,
    "a_pool": a_pool,
    "one_expert": one_expert,
    "without_gradient": without_gradient,
    "deterministic": deterministic,
}


def main(path: str) -> None:
    torch.set_num_threads(1)
    results: dict[str, Result] = {"loaded": {"early": [name for name in sys.modules if "triton_kernels" in name]}}
    for name, job in JOBS.items():
        try:
            results[name] = job("cpu")
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
