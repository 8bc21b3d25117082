import pytest
import torch
from torch import nn

from modmoe import ExpertPool, MLPExpert, MoELayer, TopKRouter
from modmoe.meta.l2l import AdaptationError, AdaptationReport, check_for_adaptation

X = torch.linspace(-1, 1, 24).reshape(6, 4)


def squared(module):
    return module(X).square().mean()


def test_names_frozen_unused_and_tied_parameters():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    net[0].bias.requires_grad_(False)
    net.idle = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.forward = lambda x: net[1](net[0](x))
    report = check_for_adaptation(net, squared(net))
    assert report == AdaptationReport(frozen=("0.bias",), unused=("idle.weight",), tied=(("0.weight", "1.weight"),))
    for kind, name in (("frozen", "0.bias"), ("unused", "idle.weight"), ("tied", "1.weight")):
        others = {"frozen", "unused", "tied"} - {kind}
        with pytest.raises(AdaptationError, match=f"{kind}: .*{name}.*learn2learn"):
            check_for_adaptation(net, squared(net), allow=others)


def test_names_frozen_rows_and_idle_experts(layer_of):
    layer = layer_of(3, 1)
    layer.add_experts(1)
    layer.freeze([0])

    def one_expert(module):
        return module(X, expert_mask=torch.tensor([False, True, False, False])).square().mean()

    report = check_for_adaptation(layer, one_expert, allow=["frozen", "unused", "idle_experts", "dead_gate"])
    assert "pool.rows.expert.w_in.frozen_4x8" in report.frozen
    assert report.idle_experts == (("pool", 2), ("pool", 3))
    with pytest.raises(AdaptationError, match=r"idle experts: .*'pool', 3.*adapt='active_experts'"):
        check_for_adaptation(layer, one_expert, allow=["frozen", "unused", "dead_gate"])


def test_a_loss_of_something_else_is_unreached():
    with pytest.raises(AdaptationError, match=r"unreached: .*compute the loss with the clone"):
        check_for_adaptation(nn.Linear(4, 1), torch.ones((), requires_grad=True) * 2)
    with pytest.raises(AdaptationError, match="unreached"):
        check_for_adaptation(nn.Linear(4, 1), torch.ones(()))


def test_the_gate_of_the_only_open_expert_is_dead(layer_of):
    def one_expert(module):
        return module(X, expert_mask=torch.tensor([False, True, False])).square().mean()

    with pytest.raises(AdaptationError, match=r"dead gate: \('pool.rows.gate.weight.c0',\)"):
        check_for_adaptation(layer_of(3, 1), one_expert)


def test_the_module_is_left_as_it_is(layer_of):
    net = nn.Sequential(nn.BatchNorm1d(4), layer_of())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    check_for_adaptation(net, squared, second_order=True)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert net[1].routing is None


def test_a_loss_may_be_used_after_it_was_checked():
    net = nn.Linear(4, 1)
    loss = squared(net)
    check_for_adaptation(net, loss)
    loss.backward()
    assert net.weight.grad.any()


def test_bad_input():
    with pytest.raises(ValueError, match="unknown kinds \\['loose'\\]"):
        check_for_adaptation(nn.Linear(4, 1), squared, allow=["loose"])
    with pytest.raises(AdaptationError, match="a loss is one number"):
        check_for_adaptation(nn.Linear(4, 1), lambda module: module(X))


def test_everything_frozen_is_unreached():
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(4, 8), 2), TopKRouter(4, 2))
    layer.freeze()
    with pytest.raises(AdaptationError, match="unreached"):
        check_for_adaptation(layer, squared)
