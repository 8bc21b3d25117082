"""Every backend against `reference`: outputs and every gradient, eager and on the path that torch.compile takes."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from modmoe import (
    AttentionExpert,
    ConvExpert,
    DenseRouter,
    Expert,
    ExpertPool,
    LoRAExpert,
    MLPExpert,
    MoAttention,
    MoELayer,
    Routing,
    SwiGLUExpert,
    TopKRouter,
)
from modmoe.kernels.select import CPU_BACKENDS, combine, compute_assignments

FAST = tuple(backend for backend in CPU_BACKENDS if backend != "reference")


def is_computed(backend: str, case: "Case") -> bool:
    """The fused backend is for experts of two layers; heads run their products by the others' operations."""
    return backend != "fused" or case.kind not in ("conv", "attention")


def routing_of(token: list[int], expert: list[int], weight: list[float], num_tokens: int, num_experts: int, **kwargs):
    return Routing(
        token_index=torch.tensor(token),
        expert_index=torch.tensor(expert),
        weight=torch.tensor(weight),
        num_tokens=num_tokens,
        num_experts=num_experts,
        logits=torch.zeros(num_tokens, num_experts),
        probs=torch.full((num_tokens, num_experts), 1 / num_experts),
        **kwargs,
    )


def scalar_experts() -> ExpertPool:
    """Three experts on one feature: f_0(x) = 2 relu(x) + 1, f_1(x) = 3 relu(-x), f_2(x) = 5."""
    pool = ExpertPool(MLPExpert(1, 1, activation="relu"), 3)
    values = {
        "w_in": torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1),
        "b_in": torch.zeros(3, 1),
        "w_out": torch.tensor([2.0, 3.0, 0.0]).view(3, 1, 1),
        "b_out": torch.tensor([1.0, 0.0, 5.0]).view(3, 1),
    }
    with torch.no_grad():
        for name, value in values.items():
            pool.growable("expert", name).banks()[0][0].copy_(value)
    return pool


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_three_scalar_experts_by_hand(backend):
    pool = scalar_experts()
    x = torch.tensor([[2.0], [-1.0]], requires_grad=True)
    routing = routing_of([0, 0, 1, 1], [0, 2, 1, -1], [0.25, 0.75, 2.0, 0.0], 2, 3, top_k=2)
    outputs = compute_assignments(pool.groups(), pool.expert, x, routing, backend)
    # f_0(2) = 2 * 2 + 1 = 5; f_2(2) = 5; f_1(-1) = 3 * 1 = 3; the fourth was dropped.
    assert outputs.tolist() == [[5.0], [5.0], [3.0], [0.0]]
    y = combine(outputs, routing)
    # .25 * 5 + .75 * 5 = 5; 2 * 3 + 0 = 6
    assert y.tolist() == [[5.0], [6.0]]
    y.sum().backward()
    # d/dx_0 = .25 * f_0' = .25 * 2 = .5; d/dx_1 = 2 * f_1' = 2 * (3 * -1) = -6
    assert x.grad is not None
    assert x.grad.tolist() == [[0.5], [-6.0]]
    grads = {name: pool.growable("expert", name).banks()[0][0].grad for name in ("w_in", "b_in", "w_out", "b_out")}
    # w_in_0: .25 * w_out 2 * x 2 = 1; w_in_1: 2 * 3 * x -1 = -6; w_in_2: w_out is 0, and relu(0) is closed
    assert grads["w_in"].flatten().tolist() == [1.0, -6.0, 0.0]
    assert grads["b_in"].flatten().tolist() == [0.5, 6.0, 0.0]
    # w_out_0: .25 * relu(2) = .5; w_out_1: 2 * relu(1) = 2; w_out_2: .75 * relu(0) = 0
    assert grads["w_out"].flatten().tolist() == [0.5, 2.0, 0.0]
    assert grads["b_out"].flatten().tolist() == [0.25, 2.0, 0.75]  # the weights themselves


def test_combine_takes_triples_in_any_order():
    outputs = torch.tensor([[1.0], [10.0], [100.0]])
    routing = routing_of([1, 0, 1], [0, 1, 2], [0.5, 2.0, 0.25], 3, 3)
    # token 0: 2 * 10 = 20; token 1: .5 * 1 + .25 * 100 = 25.5; token 2 has no assignment
    assert combine(outputs, routing).tolist() == [[20.0], [25.5], [0.0]]


# -- the contract: fast backends equal reference -----------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One situation: how the pool is made, and what the call is given."""

    num_tokens: int = 17
    sizes: tuple[int, int, int] = (8, 16, 8)
    num_experts: int = 4
    top_k: int = 2
    wider: int = 0  # experts of another hidden size, added later
    freeze: tuple[int, ...] = ()
    mask: bool = False
    tasks: bool = False
    only: tuple[int, ...] = ()  # experts that are open; the others stay empty
    dense_gate: bool = False
    image: tuple[int, int, int] | None = None  # of convolutional experts; sizes[0] is the size of the input
    kind: str = "mlp"

    def expert(self) -> Expert:
        d_in, hidden, d_out = self.sizes
        match self.kind:
            case "conv":
                assert self.image is not None
                return ConvExpert(self.image, (3, 2), d_out, stride=2, in_features=d_in)
            case "swiglu":
                return SwiGLUExpert(d_in, hidden, d_out)
            case "swiglu_bias":
                return SwiGLUExpert(d_in, hidden, d_out, bias=True)
            case "lora":
                return LoRAExpert(d_in, d_out, rank=hidden, alpha=5.0)
            case "attention":
                return AttentionExpert(d_in, hidden)
        return MLPExpert(*self.sizes)

    def layer(self, dtype: torch.dtype) -> MoELayer:
        torch.manual_seed(0)
        task = "a" if self.tasks else None
        pool = ExpertPool(self.expert(), self.num_experts, task=task)
        router = DenseRouter(self.sizes[0]) if self.dense_gate else TopKRouter(self.sizes[0], self.top_k)
        if self.kind == "attention":  # x is one sequence
            layer = MoAttention(pool, router, causal=True, backend="reference")
        else:
            layer = MoELayer(pool, router, backend="reference")
        if self.wider:
            (size,) = pool.expert.sizes()  # hidden_features or rank
            layer.add_experts(self.wider, task="b" if self.tasks else None, **{size: self.sizes[1] + 5})
        if self.tasks:
            layer.add_experts(1)
        if self.kind == "lora":
            for bank, _, _ in pool.growable("expert", "b").banks():
                nn.init.normal_(bank)  # new experts compute nothing
        if self.freeze:
            layer.freeze(list(self.freeze))
        return layer.to(dtype)

    def inputs(self, layer: MoELayer, dtype: torch.dtype) -> tuple[Tensor, dict]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.num_tokens, self.sizes[0], generator=generator, dtype=dtype)
        options: dict = {}
        if self.mask:
            options["mask"] = torch.rand(self.num_tokens, generator=generator) < 0.6
            x[~options["mask"]] = torch.nan
            x[~options["mask"], 0] = torch.inf
        if self.tasks:
            options["task_ids"] = ["ab"[index % 2] for index in range(self.num_tokens)]
        if self.only:
            options["expert_mask"] = torch.tensor([i in self.only for i in range(layer.pool.num_experts)])
        return x, options


CASES = {
    "plain": Case(),
    "empty_experts": Case(num_experts=6, only=(1, 4)),
    "no_tokens": Case(num_tokens=0),
    "one_token": Case(num_tokens=1),
    "all_experts_chosen": Case(top_k=4),
    "dense_gate": Case(dense_gate=True),
    "top_1": Case(top_k=1),
    "padding": Case(mask=True),
    "all_padding_but_few": Case(num_tokens=3, mask=True),
    "different_hidden_sizes": Case(wider=3, top_k=3),
    "unaligned": Case(sizes=(5, 7, 3)),
    "unaligned_out": Case(sizes=(8, 8, 1), mask=True),
    "partly_frozen": Case(freeze=(0, 2)),
    "all_frozen": Case(freeze=(0, 1, 2, 3)),
    "tasks": Case(num_experts=2, tasks=True, wider=2),
    "one_expert": Case(num_experts=1, top_k=1),
    "one_frozen_expert": Case(num_experts=1, top_k=1, freeze=(0,)),
    "images": Case(sizes=(50, 0, 4), image=(2, 5, 5), kind="conv"),
    "images_and_other_features": Case(sizes=(53, 0, 4), image=(2, 5, 5), kind="conv", num_experts=6, only=(1, 4)),
    "images_everything": Case(9, (50, 0, 4), 3, 3, freeze=(0, 2), mask=True, tasks=True, image=(2, 5, 5), kind="conv"),
    "no_images": Case(0, (50, 0, 4), image=(2, 5, 5), kind="conv"),
    "swiglu": Case(kind="swiglu"),
    "swiglu_bias": Case(sizes=(5, 7, 3), mask=True, kind="swiglu_bias"),
    "swiglu_everything": Case(5, (5, 7, 3), 3, 3, wider=2, freeze=(0, 3), mask=True, tasks=True, kind="swiglu_bias"),
    "lora": Case(sizes=(8, 4, 8), dense_gate=True, kind="lora"),
    "lora_everything": Case(9, (5, 2, 3), 3, 3, wider=2, freeze=(0, 3), mask=True, tasks=True, kind="lora"),
    "attention": Case(sizes=(8, 4, 8), kind="attention"),
    "attention_top_1": Case(sizes=(5, 3, 5), top_k=1, num_experts=6, only=(1, 4), kind="attention"),
    "attention_everything": Case(9, (5, 3, 5), 3, 3, freeze=(0, 2), mask=True, tasks=True, kind="attention"),
    "no_tokens_to_attend_to": Case(0, (8, 4, 8), kind="attention"),
    "many_tokens": Case(num_tokens=200, num_experts=7),
    "everything": Case(5, (5, 7, 3), 3, 3, wider=2, freeze=(0, 3), mask=True, tasks=True),
    "everything_wide": Case(70, (8, 12, 4), 3, 2, wider=2, freeze=(1,), mask=True, tasks=True, only=(0, 1, 3, 4, 5)),
}


def run(layer: MoELayer, x: Tensor, options: dict, backend: str) -> dict[str, Tensor]:
    """The output and all gradients of a weighted sum of the output."""
    layer = copy.deepcopy(layer)
    layer.backend = backend
    x = x.clone().requires_grad_()
    y = layer(x, **options)
    generator = torch.Generator().manual_seed(2)
    (y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "x.grad": x.grad}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name] = parameter.grad
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.isfinite(value).all(), name
        assert_close(got[name], value, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("backend", "name"), [(b, name) for name, case in CASES.items() for b in FAST if is_computed(b, case)]
)
def test_float32_equals_reference(name, backend):
    case = CASES[name]
    layer = case.layer(torch.float32)
    x, options = case.inputs(layer, torch.float32)
    assert_same(run(layer, x, options, backend), run(layer, x, options, "reference"), 1e-5)


@pytest.mark.parametrize(
    ("backend", "name"),
    [(b, name) for name, case in CASES.items() for b in ("dense", "bmm", "fused") if is_computed(b, case)],
)
def test_float64_equals_reference(name, backend):
    case = CASES[name]
    layer = case.layer(torch.float64)
    x, options = case.inputs(layer, torch.float64)
    assert_same(run(layer, x, options, backend), run(layer, x, options, "reference"), 1e-12)


@pytest.mark.parametrize("backend", ["dense", "bmm", "grouped"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_path_of_compiled_graphs_equals_reference(case, backend, monkeypatch):
    layer = case.layer(torch.float32)
    x, options = case.inputs(layer, torch.float32)
    expected = run(layer, x, options, "reference")
    # static shapes: nothing is selected by value; custom operators stand in for grouped_mm
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_same(run(layer, x, options, backend), expected, 1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case(sizes=(5, 7, 3), freeze=(0, 2), mask=True),
        Case(num_experts=2, tasks=True, wider=2),
        Case(sizes=(5, 2, 3), freeze=(0,), wider=1, kind="lora"),
        Case(sizes=(8, 3, 8), freeze=(0,), mask=True, kind="attention"),
    ],
    ids=["frozen_padding", "tasks_sizes", "lora", "attention"],
)
def test_torch_compile_without_graph_breaks(case):
    layer = case.layer(torch.float32)
    layer.backend = "auto"
    x, options = case.inputs(layer, torch.float32)
    expected = run(layer, x, options, "reference")
    x.requires_grad_()
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, **options)
    generator = torch.Generator().manual_seed(2)
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    got = {"y": y.detach(), "x.grad": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    assert_same(got, expected, 1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradient_of_a_plain_sum(backend):
    layer = Case(sizes=(5, 7, 3)).layer(torch.float32)
    layer.backend = backend
    x = torch.randn(9, 5, requires_grad=True)
    layer(x).sum().backward()  # the gradient of the output is an expanded scalar
    direct = x.grad
    x.grad = None
    y = layer(x)
    y.backward(torch.ones(y.shape))
    assert direct is not None
    assert_close(direct, x.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradient_of_a_plain_sum_over_assignments(backend):
    layer = Case(sizes=(8, 8, 8), num_tokens=9).layer(torch.float32)
    x = torch.randn(9, 8, requires_grad=True)
    with torch.no_grad():
        routing = layer.route(x)
    expected = torch.autograd.grad(layer.compute(x, routing).sum(), x)[0]
    layer.backend = backend
    outputs = layer.compute(x, routing)
    assert outputs.shape == (18, 8)
    assert_close(torch.autograd.grad(outputs.sum(), x)[0], expected, atol=1e-5, rtol=1e-5)


# -- derivatives -------------------------------------------------------------------------------------------------------


def function_of(layer: MoELayer, options: dict) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The layer as a function of its parameters."""
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,), options)

    return call, [parameter.detach().requires_grad_() for parameter in layer.parameters()]


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        ("reference", Case(4, (3, 3, 2), 3, 2, freeze=(1,))),
        ("reference", Case(3, (2, 3, 2), 2, 2, wider=1)),
        ("reference", Case(4, (2, 2, 2), 2, 1, mask=True)),
        ("dense", Case(4, (2, 2, 2), 3, 2, freeze=(1,))),
        ("bmm", Case(4, (2, 2, 2), 3, 2, freeze=(1,), mask=True)),
        ("fused", Case(4, (3, 3, 2), 3, 2, freeze=(1,), mask=True)),
        ("fused", Case(3, (3, 2, 2), 3, 2, freeze=(1,), wider=1, kind="swiglu_bias")),
        ("fused", Case(3, (3, 2, 2), 3, 2, freeze=(1,), wider=2, kind="lora")),
        ("reference", Case(3, (3, 2, 2), 3, 2, freeze=(1,), wider=1, kind="swiglu_bias")),
        ("dense", Case(3, (3, 2, 2), 2, 2, kind="swiglu")),
        ("reference", Case(3, (3, 2, 2), 3, 2, freeze=(1,), wider=1, kind="lora")),
        ("bmm", Case(3, (3, 2, 2), 2, 2, kind="lora")),
        ("reference", Case(3, (2, 2, 2), 3, 2, freeze=(1,), mask=True, kind="attention")),
        ("dense", Case(3, (2, 2, 2), 2, 2, kind="attention")),
    ],
)
def test_first_and_second_derivatives(backend, case):
    layer = case.layer(torch.float64)
    layer.backend = backend
    x, options = case.inputs(layer, torch.float64)
    x = torch.nan_to_num(x, nan=0.0, posinf=1.0)  # finite differences cannot step from infinity
    call, values = function_of(layer, options)
    assert gradcheck(call, (x.requires_grad_(), *values))
    assert gradgradcheck(call, (x, *values), fast_mode=True)


SECOND_ORDER = (
    "plain",
    "unaligned",
    "partly_frozen",
    "padding",
    "different_hidden_sizes",
    "swiglu_bias",
    "lora",
    "attention",
)


@pytest.mark.parametrize(
    ("backend", "name"),
    [(b, name) for name in SECOND_ORDER for b in FAST if b != "auto" and is_computed(b, CASES[name])],
)
def test_second_order_equals_reference(name, backend):
    case = CASES[name]
    layer = case.layer(torch.float32)
    x, options = case.inputs(layer, torch.float32)

    def second(backend: str) -> list[Tensor]:
        layer.backend = backend
        call, values = function_of(layer, options)
        inputs = [x.clone().requires_grad_(), *values]
        first = torch.autograd.grad(call(*inputs).square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs))

    for got, expected in zip(second(backend), second("reference"), strict=True):
        assert expected.abs().max() > 0
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("backend", FAST)
def test_torch_func_grad(backend):
    layer = CASES["partly_frozen"].layer(torch.float32)
    x, _ = CASES["partly_frozen"].inputs(layer, torch.float32)
    expected = run(layer, x, {}, "reference")
    layer.backend = backend
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(17, 8, generator=generator)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return (torch.func.functional_call(layer, parameters, (x,)) * direction).sum()

    grads = torch.func.grad(loss)(dict(layer.named_parameters()))
    assert_same(grads, {name: expected[name] for name in grads}, 1e-5)


# -- one expert is a dense network -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_one_expert_equals_a_dense_network(backend):
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(6, 10, 4), 1), DenseRouter(6), backend=backend)
    dense = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4))
    rows = {name: layer.pool.growable("expert", name).banks()[0][0] for name in ("w_in", "b_in", "w_out", "b_out")}
    with torch.no_grad():
        rows["w_in"].copy_(dense[0].weight.T[None])
        rows["b_in"].copy_(dense[0].bias[None])
        rows["w_out"].copy_(dense[2].weight.T[None])
        rows["b_out"].copy_(dense[2].bias[None])
    x = torch.randn(11, 6)
    x_moe, x_dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(x_moe), dense(x_dense)
    assert_close(y, expected, atol=1e-6, rtol=1e-6)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_close(x_moe.grad, x_dense.grad, atol=1e-5, rtol=1e-5)
    assert_close(rows["w_in"].grad, dense[0].weight.grad.T[None], atol=1e-5, rtol=1e-5)
    assert_close(rows["b_in"].grad, dense[0].bias.grad[None], atol=1e-5, rtol=1e-5)
    assert_close(rows["w_out"].grad, dense[2].weight.grad.T[None], atol=1e-5, rtol=1e-5)
    assert_close(rows["b_out"].grad, dense[2].bias.grad[None], atol=1e-5, rtol=1e-5)


# -- what frozen experts cost ------------------------------------------------------------------------------------------


class CountProducts(TorchDispatchMode):
    """Sums 2 * rows * D * H over matrix products; FlopCounterMode leaves ``_grouped_mm`` out."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "mm" in name:
            a, b = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
            assert name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm"), f"not counted: {name}"
            assert name != "bmm" or a.dim() == 3
            # a (.., M, K) times b (.., K, N); grouped: (M, K) x (E, K, N), or the outer product (M, K) x (K, N)
            batch = a.shape[0] if name in ("bmm", "baddbmm") else 1
            self.flops += 2 * batch * a.shape[-2] * a.shape[-1] * b.shape[-1]
        return func(*args, **(kwargs or {}))


T, D, H = 80, 8, 16  # more tokens than `auto` computes densely
PRODUCT = 2 * D * H  # FLOPs of one token through one of an expert's two matrices


def backward_flops(backend: str, frozen: int, x_needs_grad: bool, by_task: bool = False) -> int:
    """Ten experts; tokens are assigned to them in turn, k = 1, without a gate."""
    torch.manual_seed(0)
    pool = ExpertPool(MLPExpert(D, H), 10)
    pool.freeze(range(frozen))
    routing = Routing.assigned(torch.arange(T) % 10, 10)
    x = torch.randn(T, D, requires_grad=x_needs_grad)
    y = combine(compute_assignments(pool.groups(), pool.expert, x, routing, backend), routing)
    if not y.requires_grad:
        return 0
    with CountProducts() as count:
        y.sum().backward()
    return count.flops


@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_frozen_experts_cost_no_weight_gradient(backend):
    # Each of a token's two products costs one product for the weight gradient and one for the input gradient.
    assert backward_flops(backend, 0, True) == T * 4 * PRODUCT
    # 90% of experts and tokens frozen: these keep the input gradient only, 2 products a token instead of 4.
    live, dead = T // 10, T - T // 10
    assert backward_flops(backend, 9, True) == (4 * live + 2 * dead) * PRODUCT
    # The input needs no gradient: nothing at all for frozen tokens; two weight gradients and the hidden layer's
    # input gradient for live ones.
    assert backward_flops(backend, 9, False) == 3 * live * PRODUCT
    assert backward_flops(backend, 10, True) == 2 * T * PRODUCT
    assert backward_flops(backend, 10, False) == 0


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_frozen_experts_get_no_gradient_and_cost_less(backend):
    live, half = backward_flops(backend, 0, False), backward_flops(backend, 9, False)
    assert 0 < half < live / 2
    layer = Case(freeze=(0, 1)).layer(torch.float32)
    layer.backend = backend
    layer(torch.randn(8, 8)).sum().backward()
    frozen = [group for group in layer.pool.groups() if group.frozen]
    assert [group.ids for group in frozen] == [(0, 1)]
    assert not any(tensor.requires_grad for tensor in frozen[0].tensors.values())
