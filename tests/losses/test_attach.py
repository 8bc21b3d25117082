"""attach: y stays as it is, and every gradient equals that of host loss + scale * loss."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from modmoe.losses import attach


def model(weight):
    """A (3,) output and a () auxiliary loss of one (3,) weight, both with curvature."""
    return weight.sin(), weight.pow(3).sum()


@pytest.fixture
def weight():
    return torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)


def test_gradient_by_hand():
    weight = torch.tensor([3.0, 5.0], requires_grad=True)
    attach(2 * weight, weight[0] * weight[1], scale=10.0).sum().backward()
    # d(2 w0 + 2 w1)/dw = [2, 2]; 10 d(w0 w1)/dw = 10 [5, 3] = [50, 30]
    assert_close(weight.grad, torch.tensor([52.0, 32.0]))


@pytest.mark.parametrize(
    "scale",
    [0.25, torch.tensor(0.25), lambda: 0.25, lambda: torch.tensor(0.25)],
    ids=["float", "tensor", "f", "t"],
)
def test_first_and_second_derivatives_equal_the_explicit_sum(weight, scale):
    def gradients(loss):
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
        return first, second

    y, loss = model(weight)
    carried = gradients(attach(y, loss, scale).square().sum())
    y, loss = model(weight)
    explicit = gradients(y.square().sum() + 0.25 * loss)
    assert_close(carried, explicit)


def test_two_consumers_count_the_loss_once(weight):
    y, loss = model(weight)
    y = attach(y, loss)
    (y.sum() + 2 * y.square().sum()).backward()
    carried, weight.grad = weight.grad, None
    y, loss = model(weight)
    (y.sum() + 2 * y.square().sum() + loss).backward()
    assert_close(carried, weight.grad)


def test_each_backward_pass_counts_the_loss(weight):
    y, loss = model(weight)
    y = attach(y, loss)
    y.sum().backward(retain_graph=True)
    once = weight.grad.clone()
    y.sum().backward()
    assert_close(weight.grad, 2 * once)


def test_y_without_gradient_still_carries_the_loss(weight):
    y = attach(torch.ones(2), weight.pow(3).sum())
    assert y.requires_grad
    y.sum().backward()
    assert_close(weight.grad, 3 * weight.detach() ** 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_value_dtype_and_strides_are_those_of_y(weight, dtype):
    y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype).T
    carried = attach(y, weight.sum())
    assert carried.dtype == dtype
    assert carried.stride() == y.stride()
    assert torch.equal(carried, y)


def test_a_host_may_change_the_result_in_place(weight):
    y = torch.tensor([1.0, -1.0, 2.0])
    nn.ReLU(inplace=True)(attach(y, weight.sum())).sum().backward()
    assert torch.equal(y, torch.tensor([1.0, -1.0, 2.0]))
    assert_close(weight.grad, torch.ones_like(weight))


def test_scale_is_read_during_backward(weight):
    scales = [100.0]
    y = attach(torch.ones(3), weight.sum(), scale=lambda: scales[0])
    scales[0] = 7.0
    y.sum().backward()
    assert_close(weight.grad, torch.full_like(weight, 7.0))

    weight.grad = None
    scale = torch.tensor(100.0, requires_grad=True)
    y = attach(torch.ones(3), weight.sum(), scale)
    with torch.no_grad():
        scale.fill_(7.0)
    y.sum().backward()
    assert_close(weight.grad, torch.full_like(weight, 7.0))
    assert scale.grad is None


def test_it_follows_a_grad_scaler(weight):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    y, loss = model(weight)
    scaler.scale(attach(y, loss, 0.5).sum() * 0 + attach(y, loss, scaler.get_scale).sum()).backward()
    scaler.unscale_(optimizer)
    # cos w + 3 w^2, and 1/1024 of the 0.5 * 3 w^2 whose scale did not follow.
    w = weight.detach()
    assert_close(weight.grad, w.cos() + 3 * w**2 + 0.5 * 3 * w**2 / 1024)


def test_second_order_meta_learning_equals_the_explicit_sum(weight):
    def adapted_loss(carried):
        fast = weight
        for _ in range(2):
            y, loss = model(fast)
            inner = attach(y, loss, 0.5).square().sum() if carried else y.square().sum() + 0.5 * loss
            (gradient,) = torch.autograd.grad(inner, fast, create_graph=True)
            fast = fast - 0.1 * gradient
        y, loss = model(fast)
        return attach(y, loss, 2.0).exp().sum() if carried else y.exp().sum() + 2.0 * loss

    (carried,) = torch.autograd.grad(adapted_loss(carried=True), weight)
    (explicit,) = torch.autograd.grad(adapted_loss(carried=False), weight)
    assert_close(carried, explicit)


def test_functional_transforms():
    weight = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def carried(weight):
        y, loss = model(weight)
        return attach(y, loss, 0.5).square().sum()

    def explicit(weight):
        y, loss = model(weight)
        return y.square().sum() + 0.5 * loss

    def meta(host):
        return lambda weight: host(weight - 0.1 * torch.func.grad(host)(weight))

    for transform in (torch.func.grad, lambda host: torch.func.grad(meta(host))):
        gradients = [torch.func.vmap(transform(host))(weight) for host in (carried, explicit)]
        assert_close(*gradients)


@pytest.mark.parametrize("as_function", [False, True])
def test_compiled(weight, as_function):
    value = [2.0]

    def host(weight):
        y, loss = model(weight)
        return attach(y, loss, (lambda: value[0]) if as_function else 5.0).sum()

    # aot_eager traces the backward graph and needs no C++ compiler.
    out = torch.compile(host, backend="aot_eager", fullgraph=not as_function)(weight)
    value[0] = 5.0
    out.backward()
    w = weight.detach()
    assert_close(weight.grad, w.cos() + 5.0 * 3 * w**2)


def test_off_in_eval(weight):
    y, loss = model(weight)
    assert attach(y, loss, training=False) is y
    assert attach(y, loss.detach()) is y
    with torch.no_grad():
        assert attach(y, loss) is y


@pytest.mark.parametrize("training", [True, False])
def test_bad_loss(weight, training):
    with pytest.raises(ValueError, match=r"loss must be a floating scalar, got torch.float64 of shape \(3,\)"):
        attach(weight, weight, training=training)
    with pytest.raises(ValueError, match=r"loss must be a floating scalar, got torch\.int64"):
        attach(weight, torch.tensor(1), training=training)


def test_bad_scale_and_bad_y(weight):
    with pytest.raises(ValueError, match=r"scale must be a floating scalar, got torch.float32 of shape \(1,\)"):
        attach(weight, weight.sum(), scale=torch.ones(1))
    with pytest.raises(ValueError, match=r"y must be floating or complex .* got torch.int64"):
        attach(torch.ones(2, dtype=torch.int64), weight.sum())
