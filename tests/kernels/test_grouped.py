"""grouped_matmul: runs of rows, each multiplied with its own matrix, of any feature size."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modmoe.kernels import grouped
from modmoe.kernels.grouped import grouped_matmul


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    bounds = [0, *offsets.tolist()]
    parts = [x[start:end] @ weight[e] for e, (start, end) in enumerate(pairwise(bounds))]
    return torch.cat([*parts, x[bounds[-1] :] @ weight[0] * 0])


def test_two_runs_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    weight = torch.tensor([[[1.0], [10.0]], [[-1.0], [0.5]]])
    # rows 0 and 1 belong to expert 0: 1 + 20 = 21, 3 + 40 = 43; row 2 to expert 1: -5 + 3 = -2
    assert grouped_matmul(x, weight, ends(2, 3)).tolist() == [[21.0], [43.0], [-2.0]]
    # row 2 belongs to nobody
    assert grouped_matmul(x, weight, ends(1, 2)).tolist() == [[21.0], [-1.0], [0.0]]


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("sizes", [(5, 7), (8, 4), (1, 1), (4, 6), (3, 8)])
@pytest.mark.parametrize("offsets", [(3, 3, 9), (0, 0, 0), (12, 12, 12), (0, 5, 12), (4, 8, 11)])
def test_equals_a_loop_with_every_gradient(sizes, offsets, compiling, monkeypatch):
    torch.manual_seed(0)
    if compiling:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x, weight = torch.randn(12, sizes[0]), torch.randn(3, *sizes)
    direction = torch.randn(12, sizes[1])

    def run(function):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = function(*inputs, ends(*offsets))
        return y, *torch.autograd.grad((y * direction).sum(), inputs)

    for got, expected in zip(run(grouped_matmul), run(loop), strict=True):
        assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compiling", [False, True])
def test_no_rows(compiling, monkeypatch):
    if compiling:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x, weight = torch.zeros(0, 5, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    y = grouped_matmul(x, weight, ends(0, 0))
    assert y.shape == (0, 3)
    y.sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 0).all()


def test_what_unowned_rows_hold_does_not_matter():
    x = torch.randn(6, 4)
    x[4:] = torch.nan
    x.requires_grad_()
    weight = torch.randn(2, 4, 4, requires_grad=True)
    y = grouped_matmul(x, weight, ends(1, 4))
    assert (y[4:] == 0).all()
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert (x.grad[4:] == 0).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.cat([x, x], 1)[:, :8],  # rows of 16
        lambda x: torch.cat([x, x[:, :2]], 1)[:, :8],  # rows of 10: not a multiple of 16 bytes
        lambda x: x.t().contiguous().t(),  # columns first
        lambda x: x[:1].expand(6, 8),
        lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(6, 8),  # starts between two 16-byte blocks
    ],
    ids=["wide", "unaligned", "transposed", "expanded", "offset"],
)
def test_any_layout(make):
    torch.manual_seed(0)
    x, weight = make(torch.randn(6, 8)).detach().requires_grad_(), torch.randn(2, 8, 4).mT.contiguous().mT
    y = grouped_matmul(x, weight, ends(2, 6))
    assert_close(y, loop(x, weight, ends(2, 6)), atol=1e-6, rtol=1e-6)
    got = torch.autograd.grad(y.sum(), x)[0]
    assert_close(got, torch.autograd.grad(loop(x, weight, ends(2, 6)).sum(), x)[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(6, 5, dtype=dtype), torch.randn(2, 5, 3, dtype=dtype)
    y = grouped_matmul(x, weight, ends(2, 6))
    assert y.dtype == dtype
    # one rounding of the result: 2^-8 relative in bfloat16 (values up to about 8), 2^-11 in float16
    assert_close(y.float(), loop(x.float(), weight.float(), ends(2, 6)), atol=torch.finfo(dtype).eps * 4, rtol=0)


@pytest.mark.parametrize(("x_grad", "weight_grad"), [(True, False), (False, True), (True, True)])
def test_work_is_done_only_for_what_needs_a_gradient(x_grad, weight_grad, monkeypatch):
    calls = []
    forward, outer = grouped._forward, grouped._outer
    monkeypatch.setattr(grouped, "_forward", lambda *a: calls.append("input") or forward(*a))
    monkeypatch.setattr(grouped, "_outer", lambda *a: calls.append("weight") or outer(*a))
    x, weight = torch.randn(6, 4, requires_grad=x_grad), torch.randn(2, 4, 4, requires_grad=weight_grad)
    y = grouped_matmul(x, weight, ends(2, 6))
    calls.clear()
    y.sum().backward()
    assert calls == ["input"] * x_grad + ["weight"] * weight_grad


def test_second_order_by_hand():
    # One run, y = x w with numbers: L = (x w)^2, dL/dx = 2 x w^2, d/dx of its square (2 x w^2)^2 = 8 x w^4,
    # d/dw = 16 x^2 w^3. x = 3, w = 2: dL/dx = 24; 8 * 3 * 16 = 384; 16 * 9 * 8 = 1152.
    x = torch.tensor([[3.0]], requires_grad=True)
    weight = torch.tensor([[[2.0]]], requires_grad=True)
    y = grouped_matmul(x, weight, ends(1))
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert first.item() == 24.0
    second = torch.autograd.grad(first.square().sum(), (x, weight))
    assert [grad.item() for grad in second] == [384.0, 1152.0]
    # The weight gradient dL/dw = 2 x^2 w = 36; the square's derivative by x: 2 * 36 * 4 x w = 72 * 24 = 1728.
    y = grouped_matmul(x, weight, ends(1))
    (first,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    assert first.item() == 36.0
    assert torch.autograd.grad(first.square().sum(), x)[0].item() == 1728.0


def test_custom_operators_are_well_formed():
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    results = torch.library.opcheck(torch.ops.modmoe.grouped_mm.default, (x, weight, ends(2, 6)))
    assert set(results.values()) == {"SUCCESS"}
    results = torch.library.opcheck(torch.ops.modmoe.grouped_outer.default, (x.detach(), torch.randn(6, 8), ends(2, 6)))
    assert set(results.values()) == {"SUCCESS"}
