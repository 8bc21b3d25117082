"""The fused backend: what it reads in place, what it does not compute, and its sorted products by hand."""

import copy

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from modmoe import ConvExpert, ExpertPool, MLPExpert, MoELayer, Routing, TopKRouter, sync_optimizer
from modmoe.kernels import fused, runs
from modmoe.kernels.buffers import GradientBuffers
from modmoe.kernels.fused import run_fused
from modmoe.kernels.plan import Class, dispatch
from modmoe.kernels.runs import Run, bias_gradient, outer_product, padded_size, product
from modmoe.kernels.select import compute_output

D, H = 8, 16
PRODUCT = 2 * D * H  # FLOPs of one assignment through one of an expert's two matrices


class Ops(TorchDispatchMode):
    """Counts what runs: the FLOPs of matrix products, and the elements that torch.cat copies."""

    def __init__(self):
        super().__init__()
        self.flops = self.copied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm"):
            a, b = args[1:3] if "add" in name else args[:2]
            batch = a.shape[0] if "bmm" in name else 1
            self.flops += 2 * batch * a.shape[-2] * a.shape[-1] * b.shape[-1]
        if name == "cat":
            self.copied += sum(tensor.numel() for tensor in args[0])
        return func(*args, **(kwargs or {}))


def pool_of(cohorts: int, each: int = 1) -> ExpertPool:
    torch.manual_seed(0)
    pool = ExpertPool(MLPExpert(D, H), each)
    for _ in range(cohorts - 1):
        pool.add_experts(each)
    return pool


def routing_of(pool: ExpertPool, num_tokens: int, top_k: int = 2) -> Routing:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(num_tokens, pool.num_experts, generator=generator)
    weight, expert = scores.topk(top_k)
    return Routing(
        token_index=torch.arange(num_tokens).repeat_interleave(top_k),
        expert_index=expert.reshape(-1),
        weight=weight.reshape(-1).requires_grad_(),
        num_tokens=num_tokens,
        num_experts=pool.num_experts,
        logits=scores,
        probs=scores,
        top_k=top_k,
        has_drops=False,
    )


# -- by hand -------------------------------------------------------------------------------------------------------


CLASSES = (Class(0, ((2, 0),), (1, 1)), Class(1, ((1,),), (1, 1)))  # the experts' positions (2, 0) and (1,)


def test_dispatch_by_hand(monkeypatch):
    monkeypatch.setattr(runs, "SAVED_BY_PADDING", 0.0)
    token, expert = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([1, 2, 0, -1, 2])
    plan = dispatch(CLASSES, token, expert, has_drops=True)
    # sorted: position 2 (tokens 0 and 2), position 0 (token 1), position 1 (token 0); the fourth was dropped
    assert plan.token.tolist() == [0, 2, 1, 0]
    assert plan.source.tolist() == [1, 4, 2, 0]
    assert plan.real is None
    first, second = plan.runs
    assert (first.start, first.stop, first.counts, first.sizes, first.capacity) == (0, 3, [2, 1], (2,), 0)
    assert (second.start, second.stop, second.counts, second.sizes) == (3, 4, [1], (1,))
    assert first.expert.tolist() == [0, 0, 1]
    assert second.expert.tolist() == [0]
    weight = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    assert plan.scale(weight).flatten().tolist() == pytest.approx([0.2, 0.5, 0.3, 0.1])
    assert plan.weight_gradient(torch.tensor([1.0, 2.0, 3.0, 4.0]), weight).tolist() == [4.0, 1.0, 3.0, 0.0, 2.0]


def test_repeated_rows_by_hand():
    token, expert = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([1, 2, 0, -1, 2])
    plan = dispatch(CLASSES, token, expert, has_drops=True)
    # position 0 has one token, position 2 has two: its one is computed twice, the second time with the weight 0
    assert plan.token.tolist() == [0, 2, 1, 1, 0]
    assert plan.source.tolist() == [1, 4, 2, 2, 0]
    assert plan.real.tolist() == [1.0, 1.0, 1.0, 0.0, 1.0]
    first, second = plan.runs
    assert (first.start, first.stop, first.capacity) == (0, 4, 2)
    assert (second.start, second.stop, second.capacity) == (4, 5, 0)
    assert first.part(torch.arange(5.0)).tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert first.flat(torch.tensor([[0.0, 1.0], [2.0, 3.0]])).tolist() == [0.0, 1.0, 2.0, 3.0]
    weight = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    assert plan.scale(weight).flatten().tolist() == pytest.approx([0.2, 0.5, 0.3, 0.0, 0.1])
    # what a repeated row says of the weight does not count
    assert plan.weight_gradient(torch.tensor([1.0, 2.0, 3.0, 9.0, 4.0]), weight).tolist() == [4.0, 1.0, 3.0, 0.0, 2.0]


@pytest.mark.parametrize(("sizes", "capacity"), [((3,), 0), ((1, 2), 0), ((1, 1, 1), 0), ((3,), 2)])
@pytest.mark.parametrize("grad_mode", [False, True])
def test_sorted_products_by_hand(sizes, capacity, grad_mode):
    w = torch.tensor([[[2.0]], [[3.0]], [[5.0]]]).split(sizes)
    b = torch.tensor([[10.0], [20.0], [30.0]]).split(sizes)
    x, grad = torch.tensor([[1.0], [2.0], [7.0]]), torch.tensor([[1.0], [10.0], [100.0]])
    run = Run(0, 3, [2, 0, 1], tuple(sizes), torch.tensor([0, 0, 2]), capacity)
    if capacity:  # two rows for each expert; in the gradient those that are not its own are 0
        x = torch.tensor([[1.0], [2.0], [0.0], [0.0], [7.0], [7.0]]).view(3, 2, 1)
        grad = torch.tensor([[1.0], [10.0], [0.0], [0.0], [100.0], [0.0]]).view(3, 2, 1)
    own = [0, 1, 4] if capacity else [0, 1, 2]
    with torch.set_grad_enabled(grad_mode):
        assert product(x, w, run).flatten()[own].tolist() == [2.0, 4.0, 35.0]
        assert product(x, w, run, b).flatten()[own].tolist() == [12.0, 14.0, 65.0]
        assert product(x, w, run, transposed=True).flatten()[own].tolist() == [2.0, 4.0, 35.0]
        grads = outer_product(x, grad, run, w, [True] * len(sizes))
        # 1 * 1 + 2 * 10 = 21; nothing; 7 * 100
        assert torch.cat(grads).flatten().tolist() == [21.0, 0.0, 700.0]
        sums = bias_gradient(grad, run, [True] * len(sizes))
        assert torch.cat(sums).flatten().tolist() == [11.0, 0.0, 100.0]


def test_it_repeats_rows_where_that_pays():
    assert padded_size([4, 4, 4], (3,), (512, 512)) == 4  # nothing is repeated
    assert padded_size([90, 3, 1], (3,), (8, 16)) == 90  # 59 rows of .0002 * 128 + .003 * 24 us for each expert: 6 us
    assert padded_size([900, 3, 1], (3,), (8, 16)) == 0  # 599 rows: 58 us
    assert padded_size([4, 3, 3], (3,), (512, 512)) == 0  # 2/3 of a row of .0002 * 512^2 + 3 us: 37 us
    assert padded_size([4, 4, 0], (3,), (8, 16)) == 0  # nothing to repeat
    assert padded_size([4, 4, 4], (1, 2), (8, 16)) == 0  # two tensors: no batched product in place
    assert padded_size([4], (1,), (8, 16)) == 0


def test_what_is_not_wanted_is_not_computed():
    x, run = torch.ones(3, 4), Run(0, 3, [2, 0, 1], (2, 1), torch.tensor([0, 0, 2]))
    first, second = outer_product(x, x, run, [torch.zeros(2, 4, 4), torch.zeros(1, 4, 4)], [False, True])
    assert first is None
    assert second is not None
    assert bias_gradient(x, run, [True, False])[1] is None


# -- against the loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [None, 2])
@pytest.mark.parametrize("saved", [0.0, 1e9])
@pytest.mark.parametrize("plain", [0, 1 << 40])
def test_many_cohorts_frozen_ones_and_drops(order, saved, plain, monkeypatch):
    monkeypatch.setattr(fused, "PLAIN_WORK", plain)
    monkeypatch.setattr(runs, "SAVED_BY_PADDING", saved)
    pool = pool_of(4, each=2)
    pool.freeze([1, 4, 5])
    pool.add_experts(1, hidden_features=5)
    x = torch.randn(30, D, requires_grad=True)
    routing = routing_of(pool, 30)
    routing.expert_index[::5] = -1
    routing.has_drops = True
    if order is None:  # in no order at all
        shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(2))
        for name in ("token_index", "expert_index", "weight"):
            setattr(routing, name, getattr(routing, name).detach()[shuffled])
        routing.weight.requires_grad_()
        routing.top_k = None
    found = []
    for backend in ("reference", "fused"):
        y = compute_output(pool, x, routing, backend)
        inputs = [x, routing.weight, *pool.parameters()]
        found.append([y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), inputs)])
    for got, expected in zip(found[1], found[0], strict=True):
        assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_it_trains_as_the_loop_does():
    losses = []
    for backend in ("reference", "fused"):
        torch.manual_seed(0)
        layer = MoELayer(pool_of(3), TopKRouter(D, 2), backend=backend)
        layer.freeze([0])
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        sync_optimizer(optimizer, layer)
        x = torch.randn(40, D, generator=torch.Generator().manual_seed(3))
        for _ in range(20):
            loss = (layer(x) - x.flip(0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_little_work_is_left_to_autograd(monkeypatch):
    pool = pool_of(1, each=4)
    x, routing = torch.randn(20, D, requires_grad=True), routing_of(pool, 20)
    inputs = [x, routing.weight, *pool.parameters()]
    found = []
    for work in (0, 1 << 40):
        monkeypatch.setattr(fused, "PLAIN_WORK", work)
        y = compute_output(pool, x, routing, "fused")
        found.append([type(y.grad_fn).__name__, y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert (found[0][0], found[1][0]) == ("FusedExpertsBackward", "IndexAddBackward0")
    for got, expected in zip(found[1][1:], found[0][1:], strict=True):
        assert_close(got, expected, atol=1e-5, rtol=1e-5)


# -- what it saves -------------------------------------------------------------------------------------------------


def test_banks_are_the_tensors_themselves():
    pool = pool_of(3, each=2)
    pool.freeze([0, 1])
    pool.add_experts(1, hidden_features=5)
    banks = pool.banks()
    assert [bank.ids for bank in banks] == [(2, 3), (4, 5), (0, 1), (6,)]
    assert sorted(p for bank in banks for p in bank.positions) == list(range(7))
    own = {tensor.data_ptr() for tensor in pool.state_dict().values()}
    assert all(tensor.data_ptr() in own for bank in banks for tensor in bank.tensors.values())
    assert [bank.frozen for bank in banks] == [False, False, True, False]


def test_one_bank_in_another_order_than_the_pool_s():
    pool = pool_of(2)
    pool.freeze([1])
    pool.freeze([0])
    (bank,) = pool.banks()
    assert (bank.ids, bank.positions, bank.frozen) == ((1, 0), (1, 0), True)
    assert torch.equal(bank.tensors["w_in"][0], pool.expert_state(1)["expert.w_in"][0])


def test_no_weight_is_copied_however_many_cohorts_there_are():
    pool = pool_of(16)
    weights = sum(bank.tensors["w_in"].numel() for bank in pool.banks())
    x, routing = torch.randn(4, D, requires_grad=True), routing_of(pool, 4)
    with Ops() as ops:
        compute_output(pool, x, routing, "fused").sum().backward()
    assert ops.copied < weights / 2  # biases alone
    with Ops() as joined:
        compute_output(pool, x, routing, "grouped").sum().backward()
    assert joined.copied >= 2 * weights


@pytest.mark.parametrize(
    ("frozen", "x_grad", "weight_grad", "expected"),
    [
        # per assignment: two products for the rows' gradients, and two to carry the gradient back to the input
        (0, True, True, 4 * 80),
        (9, True, True, 4 * 8 + 2 * 72),
        (10, True, True, 2 * 80),
        # without an input gradient frozen assignments cost nothing: their weights' gradients are sums
        (9, False, True, 3 * 8),
        (9, False, False, 3 * 8),
        (10, False, True, 0),
        (10, True, False, 2 * 80),
    ],
)
def test_the_cost_of_a_backward_pass(frozen, x_grad, weight_grad, expected, monkeypatch):
    monkeypatch.setattr(fused, "PLAIN_WORK", 0)
    pool = pool_of(1, each=10)
    pool.freeze(pool.ids[:frozen])
    routing = Routing.assigned(torch.arange(80) % 10, 10)
    routing.weight.requires_grad_(weight_grad)
    y = run_fused(pool.banks(), pool.expert, torch.randn(80, D, requires_grad=x_grad), routing)
    with Ops() as ops:
        y.sum().backward()
    assert ops.flops == expected * PRODUCT


def test_what_is_saved_for_the_backward_pass(monkeypatch):
    """The input, the weights, each assignment's output and two hidden values: no copy of a token."""
    monkeypatch.setattr(fused, "PLAIN_WORK", 0)
    monkeypatch.setattr(runs, "SAVED_BY_PADDING", 0.0)
    pool, num_tokens = pool_of(1, each=4), 1000
    x, routing = torch.randn(num_tokens, D, requires_grad=True), routing_of(pool, num_tokens)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute_output(pool, x, routing, "fused")
    rows = sum(tensor.numel() for bank in pool.banks() for tensor in bank.tensors.values())
    assert sum(saved.values()) == x.numel() + 2 * num_tokens + rows + 2 * num_tokens * (2 * H + D)


def test_a_weight_that_was_changed_between_forward_and_backward_is_noticed(monkeypatch):
    monkeypatch.setattr(fused, "PLAIN_WORK", 0)
    pool = pool_of(2)
    y = compute_output(pool, torch.randn(6, D), routing_of(pool, 6), "fused")
    with torch.no_grad():
        pool.banks()[0].tensors["w_out"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_kinds_that_are_no_two_layers_are_refused():
    pool = ExpertPool(ConvExpert((1, 4, 4), (2,)))
    with pytest.raises(ValueError, match=r"fused backend computes experts of two layers, and ConvExpert"):
        MoELayer(pool, TopKRouter(16, 1), backend="fused")
    with pytest.raises(ValueError, match="of two layers"):
        run_fused(pool.banks(), pool.expert, torch.randn(2, 16), Routing.assigned(torch.zeros(2, dtype=torch.int64), 1))


def test_bfloat16_is_as_close_as_the_grouped_backend():
    layer = MoELayer(pool_of(1, each=4), TopKRouter(D, 2))
    x = torch.randn(50, D)
    exact = layer(x)
    half = copy.deepcopy(layer).bfloat16()
    errors = {}
    for backend in ("grouped", "fused"):
        half.backend = backend
        errors[backend] = float((half(x.bfloat16()).float() - exact).detach().abs().max())
    assert errors["fused"] <= 1.5 * errors["grouped"] + 1e-6
    assert errors["fused"] < 0.05 * float(exact.detach().abs().max())


# -- the memory of gradients -----------------------------------------------------------------------------------------


def test_a_large_gradient_s_memory_is_used_again_once_it_is_free(monkeypatch):
    monkeypatch.setattr(fused, "PLAIN_WORK", 0)
    pool = ExpertPool(MLPExpert(64, 128), 8)  # 256 KiB a matrix
    bank = pool.growable("expert", "w_in").banks()[0][0]
    x, routing = torch.randn(40, 64), routing_of(pool, 40)

    def step() -> torch.Tensor:
        compute_output(pool, x, routing, "fused").square().sum().backward()
        assert bank.grad is not None
        return bank.grad

    first = step()
    address, values = first.data_ptr(), first.clone()
    del first
    bank.grad = None
    assert step().data_ptr() == address
    step()  # without zero_grad: autograd adds to the gradient that is there
    assert bank.grad is not None
    assert_close(bank.grad, 2 * values)
    kept, bank.grad = bank.grad, None
    held = kept.clone()
    assert step().data_ptr() != kept.data_ptr()  # somebody still has the last one
    assert torch.equal(kept, held)


def test_buffers_are_lent_to_one_holder_at_a_time():
    buffers, parameter = GradientBuffers(), torch.nn.Parameter(torch.zeros(300, 300))
    first = buffers.take(parameter)
    assert buffers.take(parameter).data_ptr() != first.data_ptr()
    second = buffers.take(parameter)
    view, address = second.numpy(), second.data_ptr()
    del second
    assert buffers.take(parameter).data_ptr() != address  # the array holds it
    del view
    third = buffers.take(parameter)
    address = third.data_ptr()
    del third
    assert buffers.take(parameter).data_ptr() == address
    small = torch.nn.Parameter(torch.zeros(3, 3))
    assert buffers.take(small).shape == (3, 3)
    assert len(buffers._held) == 1
    del parameter
    assert len(buffers._held) == 0  # the memory goes with the parameter
