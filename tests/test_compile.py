"""torch.compile: one graph for every gate, in float32 and bfloat16, and after growth."""

import pytest
import torch
from torch.testing import assert_close

from modmoe import ExpertPool, MLPExpert, MoELayer
from modmoe.catalog import example_routers
from modmoe.gating import FittedRouter

D = 16
# The stick gate's heads know as many classes as were seen up to their expert: sizes that are read from the data.
GATES = [name for name in example_routers(D) if not name.startswith("stick")]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_of(gate: str) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(D, 8), 4), example_routers(D)[gate])
    for expert_id in range(4):
        if isinstance(layer.router, FittedRouter):
            labels = 2 * expert_id + torch.arange(40) % 2
            layer.observe(expert_id, torch.randn(40, D) + labels.unsqueeze(1), labels)
    layer.freeze([1])
    return layer.eval()


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_is_one_graph(gate: str):
    layer, x = layer_of(gate), torch.randn(2, 8, D)
    ids = None if layer.router.needs_ids is None else torch.arange(16).view(2, 8) % 4
    expected = layer(x, ids=ids)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_close(compiled(x, ids=ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", ["dense", "top_k", "switch", "deepseek_v3(top_k=2)", "expert_choice"])
def test_bfloat16_with_gradients(gate: str):
    layer, x = layer_of(gate).bfloat16(), torch.randn(2, 8, D).bfloat16().requires_grad_()
    parameters = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).float().square().sum(), parameters, allow_unused=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.float().square().sum(), parameters, allow_unused=True)
    for got, wanted in zip(found, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:  # another backend: sums in another order, of 8 bits
            assert (got - wanted).float().abs().max() <= 0.05 * wanted.float().abs().max() + 1e-3


def test_a_growth_costs_one_graph():
    layer, x = layer_of("top_k").train(), torch.randn(32, D)
    graphs = 0

    def count(graph, _inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(layer, backend=count, fullgraph=True)
    compiled(x)
    for number in range(2, 5):
        layer.add_experts(1)
        for _ in range(2):
            assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-5)
        assert graphs == number
