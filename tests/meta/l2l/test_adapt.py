"""Which parameters adapt, and what that costs."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modmoe import ExpertPool, MLPExpert, MoELayer, RowSpec, TopKRouter
from modmoe.meta.l2l import GBML, MAML, AdaptationError, MetaSGD, active_experts, select_parameters

X = torch.linspace(-1, 1, 24).reshape(6, 4)


class Network(nn.Module):
    def __init__(self, num_experts=3, top_k=2):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.layer = MoELayer(ExpertPool(MLPExpert(4, 8), num_experts), TopKRouter(4, top_k))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.layer(self.body(x)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network()


GATE = ("layer.pool.rows.gate.weight.c0",)
EXPERT = tuple(f"layer.pool.rows.expert.{name}.c0" for name in ("w_in", "b_in", "w_out", "b_out"))


def test_policies(network):
    assert select_parameters(network, "router") == GATE
    assert set(select_parameters(network, "active_experts")) == {*GATE, *EXPERT}
    assert select_parameters(network, "heads") == ("head.weight", "head.bias")
    assert len(select_parameters(network, "all")) == 9
    assert select_parameters(network, lambda name, p: p.dim() == 1) == ("body.bias", "head.bias")


def test_frozen_parameters_never_adapt(network):
    network.layer.freeze([0])
    network.head.weight.requires_grad_(False)
    assert select_parameters(network, "heads") == ("head.bias",)
    assert select_parameters(network, "router") == ("layer.pool.rows.gate.weight.c1",)


def test_rows_of_heads_in_the_pool_are_heads(network):
    network.layer.pool.declare("classes", {"weight": RowSpec((4,))})
    assert "layer.pool.rows.classes.weight.c0" in select_parameters(network, "heads")


def test_router_parameters_adapt_with_the_router():
    torch.manual_seed(0)
    network = Network()
    network.layer.router.temperature = nn.Parameter(torch.ones(1))
    assert set(select_parameters(network, "router")) == {*GATE, "layer.router.temperature"}


def test_active_experts_are_those_that_the_batch_is_routed_to(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = active_experts(network, X)
    network.eval()
    network(X)
    assert found == {"layer.pool": tuple(sorted(set(network.layer.routing.expert_index.tolist())))}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def adapted(wrapper, steps=2):
    clone = wrapper.clone(X) if wrapper.adapt_to == "active_experts" else wrapper.clone()
    for _ in range(steps):
        clone.adapt((clone(X) - 1).square().mean())
    return clone


@pytest.mark.parametrize("wrap", [MAML, MetaSGD, lambda net, lr, adapt: GBML(net, lambda p: None, lr, adapt=adapt)])
def test_active_experts_equal_all_experts_behind_a_mask(wrap):
    torch.manual_seed(3)
    network = Network(8, 2).double()
    x = X.double()
    wrapper = wrap(network, 0.1, adapt="active_experts")
    (ids,) = active_experts(network, x).values()
    mask = torch.tensor([expert_id in ids for expert_id in network.layer.pool.ids])
    assert 2 <= len(ids) < 8
    parameters = {name: p for name, p in network.named_parameters() if ".rows." in name}
    full = network.layer

    def masked(tensors):
        def run(module, x):
            return module.head(full(module.body(x), expert_mask=mask))

        saved = {name: p for name, p in network.named_parameters() if name in tensors}
        for name, value in tensors.items():
            path, _, key = name.rpartition(".")
            network.get_submodule(path)._parameters[key] = value
        y = run(network, x)
        for name, value in saved.items():
            path, _, key = name.rpartition(".")
            network.get_submodule(path)._parameters[key] = value
        return (y - 1).square().mean()

    stepped = dict(parameters)
    for _ in range(2):
        grads = torch.autograd.grad(masked(stepped), list(stepped.values()), create_graph=True)
        stepped = {name: p - 0.1 * g for (name, p), g in zip(stepped.items(), grads, strict=True)}
    want = torch.autograd.grad(masked(stepped), list(network.parameters()))
    clone = wrapper.clone(x)
    for _ in range(2):
        clone.adapt((clone(x) - 1).square().mean())
    got = torch.autograd.grad((clone(x) - 1).square().mean(), list(network.parameters()))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_what_does_not_adapt_is_not_copied(network):
    clone = adapted(MAML(network, 0.1, adapt="heads"))
    assert clone.module.body.weight is network.body.weight
    assert clone.module.layer.pool.growable("expert", "w_in").c0 is network.layer.pool.growable("expert", "w_in").c0
    assert not torch.equal(clone.module.head.weight, network.head.weight)


def test_cost_follows_the_active_experts_and_not_the_pool():
    # top-1 of one point is 1 expert: 4 * 8 + 8 + 8 * 4 + 4 = 76 weights and 4 of the gate, whatever the pool's size.
    copied, flops = [], []
    for num_experts in (4, 32, 128):
        torch.manual_seed(0)
        wrapper = MAML(Network(num_experts, 1), 0.1, adapt="active_experts")
        point = X[:1]
        clone = wrapper.clone(point)
        copied.append(sum(tensor.numel() for tensor in clone._cloned.tensors.values()))
        with FlopCounterMode(display=False) as counter:
            clone.adapt(clone(point).sum())
        flops.append(counter.get_total_flops())
    assert copied == [80, 80, 80]
    assert flops[0] == flops[1] == flops[2] > 0


def test_bad_input(network):
    with pytest.raises(AdaptationError, match="adapt is one of"):
        MAML(network, 0.1, adapt="gates")
    with pytest.raises(AdaptationError, match="leaves nothing to adapt"):
        MAML(nn.Linear(2, 2), 0.1, adapt="heads")
    with pytest.raises(AdaptationError, match="has no MoELayer"):
        active_experts(nn.Linear(4, 1), X)
    with pytest.raises(AdaptationError, match="takes the task's context"):
        MAML(network, 0.1, adapt="active_experts").clone()
    with pytest.raises(AdaptationError, match="only then"):
        MAML(network, 0.1).clone(X)
