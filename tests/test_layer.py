"""MoELayer: shapes, masks, tasks, the last routing, and growth. What it refuses is in test_layer_refusals.py."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from modmoe import (
    DenseRouter,
    ExpertPool,
    MLPExpert,
    MoELayer,
    Routing,
    TopKRouter,
)
from modmoe.losses import load_balancing_loss, z_loss

D = 4


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_two_scalar_experts_by_hand():
    # f_0(x) = 2 relu(x), f_1(x) = 10 relu(x); the gate's logits are 0 x and log(3) x.
    layer = MoELayer(ExpertPool(MLPExpert(1, 1, activation="relu"), 2), TopKRouter(1, 2))
    with torch.no_grad():
        for name, values in {"w_in": [1.0, 1.0], "b_in": [0.0, 0.0], "w_out": [2.0, 10.0], "b_out": [0.0, 0.0]}.items():
            bank = layer.pool.growable("expert", name).banks()[0][0]
            bank.copy_(torch.tensor(values).view(bank.shape))
        layer.pool.growable("gate", "weight").banks()[0][0].copy_(torch.tensor([[0.0], [1.0986123]]))
    x = torch.tensor([[1.0], [2.0], [-1.0]])
    # x = 1: weights 1/4 and 3/4: .25 * 2 + .75 * 10 = 8; x = 2: 1/10 and 9/10: .1 * 4 + .9 * 20 = 18.4; x = -1: 0
    assert_close(layer(x), torch.tensor([[8.0], [18.4], [0.0]]))
    # only the better one, with its probability before selection: .75 * 10 = 7.5; .9 * 20 = 18; 0
    assert_close(layer(x, top_k=1), torch.tensor([[7.5], [18.0], [0.0]]))
    # only expert 0 open: weight 1: 2, 4, 0
    assert_close(layer(x, expert_mask=torch.tensor([True, False])), torch.tensor([[2.0], [4.0], [0.0]]))
    shared = nn.Linear(1, 1)
    with torch.no_grad():
        shared.weight.fill_(100.0)
        shared.bias.fill_(7.0)
    layer.shared_expert = shared
    # + 100 x + 7: 115, 225.4, -93; a masked token gives zero
    mask = torch.tensor([True, True, False])
    assert_close(layer(x), torch.tensor([[115.0], [225.4], [-93.0]]))
    assert_close(layer(x, mask=mask), torch.tensor([[115.0], [225.4], [0.0]]))


def test_it_equals_the_formula(layer_of):
    layer = layer_of()
    x = torch.randn(20, D)
    y = layer(x)
    weights = layer.routing.matrix()
    expected = torch.zeros(20, D)
    for position, expert_id in enumerate(layer.pool.ids):
        rows = layer.pool.expert_state(expert_id)
        hidden = nn.functional.gelu(x @ rows["expert.w_in"][0] + rows["expert.b_in"][0])
        expected += weights[:, position, None] * (hidden @ rows["expert.w_out"][0] + rows["expert.b_out"][0])
    assert_close(y, expected, atol=1e-5, rtol=1e-5)


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(D,), (5, D), (2, 3, D), (2, 3, 4, D), (0, D), (2, 0, D), (0, 3, D)])
def test_leading_axes(shape, layer_of):
    layer = layer_of(shared_expert=nn.Linear(D, D))
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    assert_close(y.reshape(-1, D), layer(x.reshape(-1, D)), atol=1e-6, rtol=0)
    mask = torch.ones(shape[:-1], dtype=torch.bool)
    assert_close(layer(x, mask=mask), y, atol=1e-6, rtol=0)
    open_experts = torch.ones(*shape[:-1], 3, dtype=torch.bool)
    assert_close(layer(x, expert_mask=open_experts), y, atol=1e-6, rtol=0)
    assert_close(layer(x, task_ids=0), y, atol=1e-6, rtol=0)
    entries = [0] * (shape[0] if len(shape) > 1 else 1)
    assert_close(layer(x, task_ids=entries), y, atol=1e-6, rtol=0)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_an_input_that_is_not_contiguous(layer_of):
    layer = layer_of()
    x = torch.randn(D, 6).t()
    assert_close(layer(x), layer(x.contiguous()))
    assert_close(layer(x.expand(2, 6, D)), layer(x.contiguous()).expand(2, 6, D), atol=1e-6, rtol=0)


def test_another_output_size():
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(D, 8, 2), 3), TopKRouter(D, 2), shared_expert=nn.Linear(D, 2))
    assert layer(torch.randn(2, 3, D)).shape == (2, 3, 2)


# -- padding -----------------------------------------------------------------------------------------------------------


def test_nan_in_padding_leaks_nowhere(layer_of):
    shared = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))
    layer = layer_of(shared_expert=shared)
    clean = torch.randn(2, 3, D)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.where(mask.unsqueeze(-1), clean, torch.tensor(torch.nan))
    x[0, 2] = torch.inf
    x.requires_grad_()
    y = layer(x, mask=mask)
    assert (y[~mask] == 0).all()
    assert_close(y[mask], layer(clean)[mask], atol=1e-6, rtol=0)
    y.square().sum().backward()
    assert x.grad is not None
    assert (x.grad[~mask] == 0).all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_padding_loads_no_expert(layer_of):
    layer = layer_of()
    layer(torch.randn(5, D), mask=torch.tensor([True, False, True, False, False]))
    assert layer.routing.load.sum() == 4
    assert layer.routing.mask.tolist() == [True, False, True, False, False]


# -- tasks -------------------------------------------------------------------------------------------------------------


def matrix(layer: MoELayer, x: Tensor, **kwargs) -> list[list[bool]]:
    """Which experts each token uses."""
    return (layer.route(x, **kwargs).matrix() > 0).tolist()


def test_one_task_for_all(with_tasks):
    layer = with_tasks("a", "b", 3)
    x = torch.randn(4, D)
    assert matrix(layer, x, task_ids="b") == [[False, True, False]] * 4
    assert matrix(layer, x, task_ids=3) == [[False, False, True]] * 4
    assert matrix(layer, x, task_ids=torch.tensor(3)) == [[False, False, True]] * 4


def test_tasks_by_batch_entry_and_by_token(with_tasks):
    layer = with_tasks(0, 1, "a")
    x = torch.randn(2, 3, D)
    a, b, c = [True, False, False], [False, True, False], [False, False, True]
    assert matrix(layer, x, task_ids=[1, "a"]) == [b, b, b, c, c, c]
    assert matrix(layer, x, task_ids=torch.tensor([1, 0])) == [b, b, b, a, a, a]
    assert matrix(layer, x, task_ids=torch.tensor([[0, 1, 0], [1, 1, 0]])) == [a, b, a, b, b, a]
    assert matrix(layer, x, task_ids=[0, 1, "a", "a", 1, 0]) == [a, b, c, c, b, a]
    assert matrix(layer, x[0], task_ids=("a", 0, 1)) == [c, a, b]
    assert matrix(layer, x[0, 0], task_ids=[1]) == [b]


def test_experts_without_a_task_serve_every_task(with_tasks):
    layer = with_tasks("a", None, "b", top_k=3)
    x = torch.randn(2, D)
    assert matrix(layer, x, task_ids="a") == [[True, True, False]] * 2
    assert matrix(layer, x, task_ids="b") == [[False, True, True]] * 2
    assert matrix(layer, x, task_ids="never seen") == [[False, True, False]] * 2
    assert matrix(layer, x) == [[True, True, True]] * 2


def test_a_task_together_with_an_explicit_mask(with_tasks):
    layer = with_tasks("a", "a", "b", top_k=2)
    x = torch.randn(2, D)
    by_token = torch.tensor([[True, False, True], [False, True, True]])
    assert matrix(layer, x, task_ids="a", expert_mask=by_token) == [[True, False, False], [False, True, False]]
    first = torch.tensor([True, False, True])
    assert matrix(layer, x, task_ids=["a", "b"], expert_mask=first) == [[True, False, False], [False, False, True]]
    assert_close(layer.routing.matrix().sum(1), torch.ones(2))


def test_a_masked_task_never_feels_another(with_tasks):
    layer = with_tasks("a", "a", "b", top_k=2)
    x = torch.randn(6, D)
    with torch.no_grad():
        before = layer(x, task_ids="a")
        layer.freeze([0, 1])
        layer.add_experts(2, task="c")
        for parameter in layer.parameters():
            parameter.add_(100.0)
        assert_close(layer(x, task_ids="a"), before, atol=1e-6, rtol=0)


# -- the last routing --------------------------------------------------------------------------------------------------


def test_losses_can_be_made_from_it_between_forward_and_backward(layer_of):
    layer = layer_of()
    assert layer.routing is None
    x = torch.randn(8, D)
    y = layer(x)
    routing = layer.routing
    assert isinstance(routing, Routing)
    loss = load_balancing_loss(routing.probs, routing.choices) + z_loss(routing.logits)
    (y.sum() * 0 + loss).backward()
    gate = layer.pool.growable("gate", "weight").banks()[0][0]
    got = gate.grad.clone()
    # the same losses straight from the logits
    weight = gate.detach().clone().requires_grad_()
    logits = x @ weight.T
    (load_balancing_loss(logits.softmax(1), logits.topk(2).indices) + z_loss(logits)).backward()
    assert got.abs().max() > 0
    assert_close(got, weight.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("router", [TopKRouter(D, 2), TopKRouter(D, 1), DenseRouter(D)])
@pytest.mark.parametrize("backend", ["reference", "dense", "bmm", "grouped"])
def test_it_keeps_no_graph_alive_after_backward(router, backend):
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(D, 8), 3), router, backend=backend)
    x = torch.randn(8, D, requires_grad=True)
    hidden = x * 2  # part of the graph before the layer
    graph = [weakref.ref(hidden)]
    y = layer(hidden)
    graph += [weakref.ref(layer.routing.logits), weakref.ref(layer.routing.weight), weakref.ref(y)]
    assert layer.routing.weight.grad_fn is not None
    expected = layer.routing.weight.detach().clone()
    y.sum().backward()
    tensors = (layer.routing.logits, layer.routing.probs, layer.routing.weight)
    assert all(tensor.grad_fn is None and not tensor.requires_grad for tensor in tensors)
    assert torch.equal(layer.routing.weight, expected)
    del hidden, y, tensors
    gc.collect()
    assert [reference() for reference in graph] == [None] * 4


def test_a_backward_pass_of_an_older_batch_leaves_the_newer_routing_alone(layer_of):
    layer = layer_of()
    first = layer(torch.randn(3, D))
    second = layer(torch.randn(5, D))
    first.sum().backward()
    assert layer.routing.num_tokens == 5
    assert layer.routing.weight.grad_fn is not None
    second.sum().backward()
    assert layer.routing.weight.grad_fn is None


def test_without_gradients_there_is_no_graph(layer_of):
    layer = layer_of()
    with torch.no_grad():
        layer(torch.randn(3, D))
    assert layer.routing.weight.grad_fn is None
    assert layer.routing.num_tokens == 3


def test_it_is_left_out_of_copies_and_of_the_state_dict(layer_of):
    layer = layer_of()
    x = torch.randn(3, D)
    y = layer(x)
    keys = set(layer.state_dict())
    clone = copy.deepcopy(layer)
    again = pickle.loads(pickle.dumps(layer))
    assert layer.routing is not None  # still the one of the last batch, with its graph
    assert layer.routing.weight.grad_fn is not None
    for other in (clone, again):
        assert other.routing is None
        assert torch.equal(other(x), y)
        assert set(other.state_dict()) == keys == set(layer_of().state_dict())
    assert not any("routing" in key for key in keys)


def test_saved_and_loaded(layer_of):
    layer = layer_of()
    layer.freeze([1])
    layer.add_experts(1, task="new")
    x = torch.randn(5, D)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other = layer_of(num_experts=2, seed=1)
    other.load_state_dict(torch.load(stream))
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other(x, task_ids="new"), layer(x, task_ids="new"))


def test_seeded_runs_are_equal(layer_of):
    def train() -> Tensor:
        layer = layer_of(num_experts=4)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(3)
        for _ in range(5):
            optimizer.zero_grad()
            layer(torch.randn(16, D, generator=generator)).square().sum().backward()
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in layer.parameters()])

    assert torch.equal(train(), train())


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference", "dense", "bmm", "grouped"])
def test_autocast(backend, layer_of):
    layer = layer_of(shared_expert=nn.Linear(D, D), backend=backend)
    layer.freeze([0])
    x = torch.randn(16, D, requires_grad=True)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert layer(x.detach().bfloat16()).dtype == torch.bfloat16  # from a layer before it
    # values up to about 1: a few roundings of 2^-9 each
    assert_close(y.float(), expected, atol=2e-2, rtol=0)
    y.float().square().sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_precision(dtype, layer_of):
    layer = layer_of(shared_expert=nn.Linear(D, D)).to(dtype)
    y = layer(torch.randn(5, D, dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert all(parameter.grad.dtype == dtype for parameter in layer.parameters())


# -- one pool, several layers ------------------------------------------------------------------------------------------


def test_several_layers_on_one_pool_have_their_own_gates():
    torch.manual_seed(0)
    pool = ExpertPool(MLPExpert(D, 8), 3)
    layers = [MoELayer(pool, TopKRouter(D, 2)) for _ in range(3)]
    assert [layer.namespace for layer in layers] == ["gate", "gate_2", "gate_3"]
    x = torch.randn(5, D)
    assert not torch.equal(layers[0].route(x).logits, layers[1].route(x).logits)
    layers[0].add_experts(1)
    assert [layer.route(x).num_experts for layer in layers] == [4, 4, 4]
    (layers[0](x) + layers[1](x)).sum().backward()
    assert pool.growable("gate_2", "weight").banks()[0][0].grad is not None
    assert pool.growable("gate_3", "weight").banks()[0][0].grad is None


def test_a_free_name_is_found_beside_names_given_by_hand():
    pool = ExpertPool(MLPExpert(D, 8), 3)
    names = [MoELayer(pool, TopKRouter(D, 2), namespace=name).namespace for name in ("gate_2", None, "mine", None)]
    assert names == ["gate_2", "gate", "mine", "gate_3"]
    with pytest.raises(ValueError, match="the pool has a namespace 'mine' already"):
        MoELayer(pool, TopKRouter(D, 2), namespace="mine")


# -- growing -----------------------------------------------------------------------------------------------------------


def test_freezing_everything_freezes_the_shared_expert_and_what_an_optimizer_would_still_apply(layer_of):
    layer = layer_of(shared_expert=nn.Linear(D, D))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    x = torch.randn(5, D)
    for _ in range(2):
        layer(x).square().sum().backward()
        optimizer.step()
    expected = layer(x)
    layer(x).sum().backward()
    layer.freeze()
    optimizer.step()  # nobody called sync_optimizer
    assert torch.equal(layer(x), expected)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_frozen_shared_expert_keeps_its_normalisation_statistics():
    pool = ExpertPool(MLPExpert(4, 3), 2)
    layer = MoELayer(pool, TopKRouter(4, 1), shared_expert=nn.BatchNorm1d(4))
    layer.train()(torch.randn(8, 4))
    layer.freeze()
    before = layer.shared_expert.running_mean.clone()
    layer.train()(torch.randn(8, 4) + 5)
    assert torch.equal(before, layer.shared_expert.running_mean)


def test_freezing_some_leaves_the_shared_expert_trainable(layer_of):
    layer = layer_of(shared_expert=nn.Linear(D, D))
    layer.freeze([0])
    assert layer.shared_expert.weight.requires_grad
    layer.unfreeze([0])
    assert layer.pool.frozen_ids == ()


def test_it_learns_a_piecewise_function():
    # sign(x_0) picks one of two linear maps: no single linear map fits, two gated ones do.
    torch.manual_seed(0)
    x = torch.randn(256, D)
    maps = torch.randn(2, D, D)
    target = torch.where(x[:, :1] > 0, x @ maps[0], x @ maps[1])
    layer = MoELayer(ExpertPool(MLPExpert(D, 16), 4), TopKRouter(D, 2))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * target.var().item()
