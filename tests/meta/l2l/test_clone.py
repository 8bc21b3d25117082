import functools
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from modmoe import ExpertPool, MLPExpert, MoELayer, TopKRouter
from modmoe.meta.l2l import clone_with_places, safe_clone


class Product(nn.Module):
    """y = a b x with a and b in a list and a dict besides."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.steps, self.named = [self.a, (self.b,)], {"b": self.b}
        self.run = functools.partial(self.through, factor=1.0)
        self.counts = np.zeros(2)
        nn.init.constant_(self.a.weight, 2.0)
        nn.init.constant_(self.b.weight, 3.0)

    def through(self, x, factor):
        return factor * self.steps[1][0](self.steps[0](x))

    def forward(self, x):
        self.counts += 1
        return self.run(x)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def assert_same(module, before):
    after = state(module)
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_second_order_gradient_by_hand():
    # y = 2 * 3 * 1 = 6, loss L = y^2 / 2 = 18. One step of 0.1 on a: dL/da = y b = 18, a' = 2 - 1.8 = 0.2.
    # Then y' = a' b = 0.6, L' = 0.18. a' = a - 0.1 a b^2 = a (1 - 0.1 b^2), so da'/da = 1 - 0.9 = 0.1 and
    # dL'/da = y' b da'/da = 0.6 * 3 * 0.1 = 0.18; db: y' = a b (1 - 0.1 b^2), dy'/db = a (1 - 0.3 b^2) = 2 (1 - 2.7)
    # = -3.4, dL'/db = 0.6 * -3.4 = -2.04.
    module = Product().double()
    cloned = clone_with_places(module, ["a.weight"])
    x = torch.ones(1, 1, dtype=torch.float64)
    loss = cloned.module(x).square().sum() / 2
    (gradient,) = torch.autograd.grad(loss, cloned.tensors["a.weight"], create_graph=True)
    cloned.replace("a.weight", cloned.tensors["a.weight"] - 0.1 * gradient)
    (cloned.module(x).square().sum() / 2).backward()
    assert loss.item() == pytest.approx(18)
    assert module.a.weight.grad.item() == pytest.approx(0.18)
    assert module.b.weight.grad.item() == pytest.approx(-2.04)


def test_gradcheck_through_two_steps():
    torch.manual_seed(0)
    x = torch.randn(4, 2, dtype=torch.float64)

    def adapted(weight, bias):
        module = nn.Sequential(nn.Linear(2, 1, dtype=torch.float64), nn.Tanh())
        del module[0].weight, module[0].bias
        module[0].weight, module[0].bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        module[0]._parameters.update(weight=weight, bias=bias)
        cloned = clone_with_places(module)
        for _ in range(2):
            loss = (cloned.module(x) - 1).square().mean()
            grads = torch.autograd.grad(loss, list(cloned.tensors.values()), create_graph=True)
            for name, gradient in zip(list(cloned.tensors), grads, strict=True):
                cloned.replace(name, cloned.tensors[name] - 0.3 * gradient)
        return cloned.module(x)

    weight = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(adapted, (weight, bias))


def test_equals_functional_call_on_a_grown_and_partly_frozen_pool(layer_of):
    layer = layer_of(4, 2).double()
    layer.freeze([1])
    layer.add_experts(2)
    net = nn.Sequential(layer, nn.Linear(4, 2).double())
    x = torch.randn(6, 4, dtype=torch.float64)
    parameters = dict(net.named_parameters())
    expected, adapted = functional_call(net, parameters, (x,)), dict(parameters)
    for _ in range(2):
        loss = functional_call(net, adapted, (x,)).square().mean()
        grads = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
        adapted = {name: p - 0.1 * g for (name, p), g in zip(adapted.items(), grads, strict=True)}
    want = torch.autograd.grad(functional_call(net, adapted, (x,)).square().mean(), list(parameters.values()))

    cloned = clone_with_places(net)
    assert torch.equal(cloned.module(x), expected)
    for _ in range(2):
        loss = cloned.module(x).square().mean()
        grads = torch.autograd.grad(loss, list(cloned.tensors.values()), create_graph=True)
        for name, gradient in zip(list(cloned.tensors), grads, strict=True):
            cloned.replace(name, cloned.tensors[name] - 0.1 * gradient)
    got = torch.autograd.grad(cloned.module(x).square().mean(), list(parameters.values()))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_modules_in_lists_tuples_dicts_partials_and_arrays_are_the_clones():
    module = Product()
    clone = safe_clone(module)
    assert clone.steps[0] is clone.a
    assert clone.a is not module.a
    assert clone.steps[1][0] is clone.b is clone.named["b"]
    assert clone.run.func.__self__ is clone
    clone(torch.ones(1, 1))
    assert module.counts.tolist() == [0, 0]
    assert clone.counts.tolist() == [1, 1]


def test_cycles_namedtuples_and_shared_lists():
    Pair = namedtuple("Pair", "left right")
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    module.loop = [module]
    module.loop.append(module.loop)
    module.pair = Pair(module[0], {module[1]})
    clone = safe_clone(module)
    assert clone.loop[0] is clone
    assert clone.loop[1] is clone.loop
    assert clone.pair.left is clone[0]
    assert clone.pair.right == {clone[1]}


def test_tied_parameters_stay_tied_when_they_are_replaced():
    module = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    module[1].weight = module[0].weight
    cloned = clone_with_places(module)
    assert cloned.module[0].weight is cloned.module[1].weight
    cloned.replace("0.weight", torch.zeros(2, 2))
    assert not cloned.module[1].weight.any()


def test_batch_norm_statistics_and_counters_are_the_clones():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    before = state(module)
    clone = safe_clone(module)
    clone(torch.randn(5, 3) + 4)
    assert_same(module, before)
    assert clone[0].num_batches_tracked.item() == 1


def test_last_routing_and_statistics_of_a_pool_stay(layer_of):
    layer = layer_of()
    layer(torch.randn(5, 4))
    routing, before = layer.routing, state(layer)
    clone = safe_clone(layer)
    assert clone.routing is None
    clone(torch.randn(3, 4)).sum().backward()
    clone.add_experts(1)
    clone.freeze([0])
    assert layer.routing is routing
    assert layer.pool.num_experts == 3
    assert_same(layer, before)


def test_hooks_stay_with_the_base():
    module, calls = nn.Linear(1, 1), []
    module.register_forward_hook(lambda *args: calls.append("after"))
    module.register_forward_pre_hook(lambda *args: calls.append("before"))
    module.register_full_backward_hook(lambda *args: calls.append("backward"))
    safe_clone(module)(torch.ones(1, 1)).sum().backward()
    assert calls == []
    module(torch.ones(1, 1, requires_grad=True)).sum().backward()
    assert calls == ["before", "after", "backward"]


def test_hooks_that_compute_a_weight_run_in_the_clone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module = nn.utils.weight_norm(nn.Linear(3, 2))
    cloned = clone_with_places(module)
    x = torch.randn(4, 3)
    assert torch.equal(cloned.module(x), module(x))
    cloned.replace("weight_g", torch.zeros(2, 1))
    assert torch.equal(cloned.module(x), module.bias.expand(4, 2))


def test_parametrizations_and_rnns():
    for module, x in (
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), torch.randn(4, 3)),
        (nn.LSTM(3, 2), torch.randn(5, 1, 3)),
    ):
        cloned = clone_with_places(module)
        first = [output[0] if isinstance(output, tuple) else output for output in (cloned.module(x), module(x))]
        assert torch.equal(*first)
        for name, tensor in list(cloned.tensors.items()):
            cloned.replace(name, torch.zeros_like(tensor) + 0.5)
        weights = {name: torch.full_like(p, 0.5) for name, p in module.named_parameters()}
        outputs = cloned.module(x), functional_call(module, weights, (x,))
        torch.testing.assert_close(outputs[0], outputs[1])


def test_partial_clone_shares_the_rest_and_its_gradients_reach_the_base():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    clone = safe_clone(module, ["1.weight", "1.bias"])
    assert clone[0].weight is module[0].weight
    assert clone[1].weight is not module[1].weight
    clone(torch.ones(1, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_detached_clone_has_no_way_back():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    clone = safe_clone(module, ["1.weight", "1.bias"], detach=True)
    clone(torch.ones(1, 2)).sum().backward()
    assert clone[1].weight.is_leaf
    assert not clone[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in module.parameters())


def test_some_experts_equal_an_expert_mask(layer_of):
    layer = layer_of(5, 2).double()
    layer.freeze([3])
    layer.add_experts(2)
    x = torch.randn(7, 4, dtype=torch.float64)
    kept = [1, 3, 6]
    clone = safe_clone(layer, experts={"pool": kept})
    mask = torch.tensor([expert_id in kept for expert_id in layer.pool.ids])
    assert clone.pool.ids == (1, 3, 6)
    torch.testing.assert_close(clone(x), layer(x, expert_mask=mask), rtol=1e-12, atol=1e-14)
    clone(x).sum().backward()
    touched = layer.pool.growable("expert", "w_in").live()[0][0].grad.flatten(1).any(1)
    assert touched.tolist() == [False, True, False, False]  # experts 0, 1, 2, 4 of the first cohort


def test_pickled_and_reloaded_modules_clone_alike(layer_of, tmp_path):
    layer = layer_of(4)
    layer.freeze([2])
    fresh = MoELayer(ExpertPool(MLPExpert(4, 8), 1), TopKRouter(4, 1))
    fresh.router.top_k = 2
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    fresh.load_state_dict(torch.load(tmp_path / "layer.pt"))
    x = torch.randn(3, 4)
    assert torch.equal(safe_clone(fresh)(x), safe_clone(layer)(x))


def test_bad_input():
    module = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="no parameters named \\['gate'\\]"):
        safe_clone(module, ["gate"])
    pool = ExpertPool(MLPExpert(2, 2), 2)
    with pytest.raises(ValueError, match="no pool named 'pool'"):
        safe_clone(pool, experts={"pool": [0]})
    with pytest.raises(ValueError, match="at least one expert"):
        safe_clone(pool, experts={"": []})
    with pytest.raises(ValueError, match="no experts with ids \\[7\\]"):
        safe_clone(pool, experts={"": [7]})
    with pytest.raises(ValueError, match="run one batch through it"):
        safe_clone(nn.LazyLinear(2))
    module.both = (module.weight, module.bias)
    with pytest.raises(ValueError, match="keep it in a list"):
        safe_clone(module)
    with pytest.raises(ValueError, match="OptimizedModule runs code"):
        safe_clone(type("OptimizedModule", (nn.Linear,), {})(1, 1))  # as torch.compile names what it returns
