"""Every break and surprise of learn2learn 0.2.0: ``test_theirs_*`` shows it where it exists, ours what is right."""

import copy
import gc
import importlib.metadata

import learn2learn as l2l
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from modmoe import ExpertPool, MLPExpert, MoELayer, SwitchRouter, TopKRouter
from modmoe.meta.l2l import (
    GBML,
    MAML,
    AdaptationError,
    MetaSGD,
    StaleWrapperError,
    check_for_adaptation,
    safe_clone,
)

X = torch.linspace(-1, 1, 24).reshape(6, 4)


@pytest.fixture
def partly_frozen():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    net[0].weight.requires_grad_(False)
    return net


@pytest.fixture
def idle():
    """A module with an expert that nothing reaches."""
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    net.idle = nn.Linear(4, 1)
    return net


def squared(module):
    return module(X).square().mean()


# -- #413: the wheel on Python 3.11 --------------------------------------------------------------------


def test_theirs_imports_with_its_compiled_parts():
    assert importlib.metadata.version("learn2learn") == "0.2.0"
    assert l2l.data.MetaDataset.__module__ == "learn2learn.data.meta_dataset"


# -- frozen parameters, unused experts: #363, #314, #387 ------------------------------------------------


@pytest.mark.parametrize("case", ["partly_frozen", "idle"])
def test_theirs_swallows_the_error(case, request, capfd):
    net = request.getfixturevalue(case)
    clone = l2l.algorithms.MAML(net, lr=0.1).clone()
    with pytest.raises(UnboundLocalError):
        clone.adapt(squared(clone))
    assert "Maybe try with allow_nograd=True" in capfd.readouterr().out


@pytest.mark.parametrize("wrap", [MAML, MetaSGD, lambda net, lr: GBML(net, lambda p: None, lr)])
@pytest.mark.parametrize("case", ["partly_frozen", "idle"])
def test_ours_leaves_them_as_they_are(case, wrap, request):
    net = request.getfixturevalue(case)
    trained = dict(net.named_parameters())
    still = {name for name in trained if name in ("0.weight", "idle.weight", "idle.bias")}
    loss = squared(net)
    grads = torch.autograd.grad(loss, [p for name, p in trained.items() if name not in still])
    want = dict(zip([name for name in trained if name not in still], grads, strict=True))
    clone = wrap(net, 0.1).clone()
    clone.adapt(squared(clone))
    for name, adapted in clone.module.named_parameters():
        expected = trained[name] if name in still else trained[name] - 0.1 * want[name]
        torch.testing.assert_close(adapted, expected)


def test_theirs_metasgd_refuses_frozen_parameters(partly_frozen):
    clone = l2l.algorithms.MetaSGD(partly_frozen, lr=0.1).clone()
    with pytest.raises(RuntimeError, match="does not require grad"):
        clone.adapt(squared(clone))


# -- a loss that does not reach the model ---------------------------------------------------------------


def test_theirs_takes_a_step_that_does_nothing(idle):
    clone = l2l.algorithms.MAML(idle, lr=0.1, allow_nograd=True).clone()
    before = clone.module.weight.clone()
    clone.adapt(torch.ones(1, requires_grad=True).sum())
    assert torch.equal(clone.module.weight, before)


@pytest.mark.parametrize("wrap", [MAML, MetaSGD, lambda net, lr: GBML(net, lambda p: None, lr)])
def test_ours_says_that_the_loss_does_not_reach(idle, wrap):
    clone = wrap(idle, 0.1).clone()
    with pytest.raises(AdaptationError, match=r"reaches none of .*compute the loss with the clone"):
        clone.adapt(torch.ones(1, requires_grad=True).sum())
    with pytest.raises(AdaptationError, match="no graph"):
        clone.adapt(torch.ones(()))
    with pytest.raises(AdaptationError, match="reaches none of"):
        clone.adapt(squared(idle) * 2)  # of the base, not of the clone


# -- softmax after top-1 --------------------------------------------------------------------------------


class TopOne(nn.Module):
    """A gate as it is often written: the softmax comes after the choice of one, and is 1."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])

    def forward(self, x):
        best, index = self.gate(x).topk(1)
        both = torch.cat([expert(x) for expert in self.experts], 1)
        return best.softmax(1) * both.gather(1, index)


def test_theirs_adapts_no_gate_behind_a_softmax_over_one():
    torch.manual_seed(0)
    net = TopOne()
    assert moved(l2l.algorithms.MAML(net, lr=0.1, allow_nograd=True).clone(), net).isdisjoint({"gate.weight"})


def test_ours_names_the_dead_gate():
    torch.manual_seed(0)
    with pytest.raises(AdaptationError, match=r"dead gate: \('gate.weight', 'gate.bias'\); .*SwitchRouter"):
        check_for_adaptation(TopOne(), squared)


@pytest.mark.parametrize(
    "router", [SwitchRouter(4, jitter_eps=0.0, capacity=None), TopKRouter(4, 1), TopKRouter(4, 1, renormalize=True)]
)
def test_ours_adapts_the_gates_of_modmoe(router):
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(4, 8), 3), router)
    assert check_for_adaptation(layer, squared).dead_gate == ()
    assert moved(MAML(layer, 0.1, adapt="router").clone(), layer) == {"pool.rows.gate.weight.c0"}


# -- buffers, hooks, lists ------------------------------------------------------------------------------


def test_theirs_changes_the_bases_statistics():
    net = nn.BatchNorm1d(4)
    l2l.clone_module(net)(X)
    assert net.num_batches_tracked.item() == 1


def test_ours_leaves_the_base_bit_unchanged(layer_of):
    layer = layer_of()
    net = nn.Sequential(nn.BatchNorm1d(4), layer)
    layer(X)
    routing = layer.routing
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for wrapper in (MAML(net, 0.1), MetaSGD(net, 0.1), GBML(net, lambda p: None, 0.1)):
        for evaluation in (False, True):
            clone = wrapper.clone(evaluation=evaluation)
            for _ in range(2):
                clone.adapt(squared(clone))
            squared(clone).backward()
    assert layer.routing is routing
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_theirs_fires_the_bases_hooks_and_lists_the_bases_modules():
    net, calls = nn.Linear(4, 1), []
    net.register_forward_hook(lambda *args: calls.append(1))
    net.steps = [net]
    clone = l2l.clone_module(net)
    clone(X)
    assert calls == [1]
    assert clone.steps[0] is net


def test_ours_fires_none_and_lists_its_own():
    net, calls = nn.Linear(4, 1), []
    net.register_forward_hook(lambda *args: calls.append(1))
    net.steps = [net]
    clone = MAML(net, 0.1).clone()
    clone(X)
    assert calls == []
    assert clone.module.steps[0] is clone.module


# -- tied experts: #174 ---------------------------------------------------------------------------------


@pytest.fixture
def tied():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net


def test_theirs_metasgd_unties(tied):
    clone = l2l.algorithms.MetaSGD(tied, lr=0.1).clone()
    clone.adapt(squared(clone))
    assert clone.module[0].weight is not clone.module[2].weight
    assert not torch.equal(clone.module[0].weight, clone.module[2].weight)


@pytest.mark.parametrize("wrap", [MAML, MetaSGD, lambda net, lr: GBML(net, lambda p: None, lr)])
def test_ours_keeps_tied_parameters_tied_and_equals_functional_call(tied, wrap):
    parameters = dict(tied.named_parameters())
    loss = functional_call(tied, parameters, (X,), tie_weights=True).square().mean()
    grads = torch.autograd.grad(loss, list(parameters.values()))
    stepped = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), grads, strict=True)}
    clone = wrap(tied, 0.1).clone()
    clone.adapt(squared(clone))
    assert clone.module[0].weight is clone.module[2].weight
    torch.testing.assert_close(clone(X), functional_call(tied, stepped, (X,), tie_weights=True))


# -- experts added after wrapping -----------------------------------------------------------------------


def moved(clone, base):
    """Names of the parameters that a step has changed."""
    clone.adapt(squared(clone))
    old = dict(base.named_parameters())
    return {name for name, value in clone.module.named_parameters() if not torch.equal(value, old[name])}


class Mean(nn.Module):
    """Experts in a list that is not modmoe's."""

    def __init__(self, num_experts):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 1) for _ in range(num_experts))

    def forward(self, x):
        return torch.stack([expert(x) for expert in self.experts]).mean(0)


@pytest.mark.parametrize("kind", ["MetaSGD", "GBML"])
def test_theirs_never_adapts_a_new_expert(kind):
    torch.manual_seed(0)
    net = Mean(2)
    wrapped = {
        "MetaSGD": lambda: l2l.algorithms.MetaSGD(net, lr=0.1),
        "GBML": lambda: l2l.algorithms.GBML(net, l2l.optim.ModuleTransform(nn.Linear), lr=0.1),
    }[kind]()
    net.experts.append(nn.Linear(4, 1))
    assert not any(name.startswith("experts.2") for name in moved(wrapped.clone(), net))


@pytest.mark.parametrize("wrap", [MAML, MetaSGD, lambda net, lr: GBML(net, l2l.optim.ModuleTransform(nn.Linear), lr)])
def test_ours_follows_lists_that_are_not_modmoes(wrap):
    torch.manual_seed(0)
    net = Mean(2)
    wrapper = wrap(net, 0.1)
    net.experts.append(nn.Linear(4, 1))
    with pytest.raises(StaleWrapperError, match=r"experts.2.bias"):
        wrapper.clone()
    wrapper.sync()
    assert {"experts.2.weight", "experts.2.bias"} <= moved(wrapper.clone(), net)


@pytest.mark.parametrize("wrap", [MAML, MetaSGD, lambda net, lr: GBML(net, lambda p: None, lr)])
def test_ours_raises_until_synced_and_then_adapts_it(layer_of, wrap):
    layer = layer_of(2, 2)
    wrapper = wrap(layer, 0.1)
    optimizer = torch.optim.Adam(wrapper.parameters(), lr=0.01)
    layer.add_experts(2)
    layer.router.top_k = 4
    with pytest.raises(StaleWrapperError, match=r"pool.rows.expert.w_in.*wrapper.sync\(optimizer\)"):
        wrapper.clone()
    wrapper.sync(optimizer)
    assert sum(name.endswith("c1") for name in moved(wrapper.clone(), layer)) == 5
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in wrapper.parameters() if parameter.requires_grad}


def test_theirs_leaves_a_new_expert_out_of_the_optimizer(layer_of):
    layer = layer_of(2, 2)
    wrapped = l2l.algorithms.MAML(layer, lr=0.1)
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.1)
    layer.add_experts(2)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not any(id(p) in held for name, p in wrapped.named_parameters() if name.endswith("c1"))


# -- attention, second order: #429 ----------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = (part.reshape(1, 1, 6, 4) for part in self.qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_theirs_fails_in_the_outer_backward():
    torch.manual_seed(0)
    clone = l2l.algorithms.MAML(Attention(), lr=0.1).clone()
    clone.adapt(squared(clone))
    loss = squared(clone)
    with pytest.raises(RuntimeError, match="not implemented"):
        loss.backward()


def test_ours_says_before_the_first_step_what_to_use():
    torch.manual_seed(0)
    net = Attention()
    clone = MAML(net, 0.1).clone()
    with pytest.raises(AdaptationError, match=r"ScaledDotProduct.*sdpa_kernel\(SDPBackend.MATH\)"):
        clone.adapt(squared(clone))
    with pytest.raises(AdaptationError, match="second order"):
        check_for_adaptation(net, squared, second_order=True)
    with sdpa_kernel(SDPBackend.MATH):
        clone.adapt(squared(clone))
        squared(clone).backward()
    assert net.qkv.weight.grad.any()
    first = MAML(net, 0.1, first_order=True).clone()
    first.adapt(squared(first))


# -- memory at evaluation: #284, #278 -------------------------------------------------------------------


def graph_after(clone, steps):
    """Number of operations that the evaluation error keeps alive, and whether they lead to the base."""
    for _ in range(steps):
        clone.adapt(squared(clone))
    waiting, seen, leaves = [squared(clone).grad_fn], set(), set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves |= {id(node.variable)} if hasattr(node, "variable") else set()
            waiting += [parent for parent, _ in node.next_functions]
    return len(seen), leaves


@pytest.mark.parametrize("first_order", [True, False])
def test_theirs_keeps_every_step_alive_with_the_error(first_order):
    net = nn.Linear(4, 1)
    wrapped = l2l.algorithms.MAML(net, lr=0.1, first_order=first_order)
    (short, _), (long, leaves) = graph_after(wrapped.clone(), 1), graph_after(wrapped.clone(), 6)
    assert long > short
    assert id(net.weight) in leaves


@pytest.mark.parametrize("wrap", [MAML, MetaSGD, lambda net, lr: GBML(net, lambda p: None, lr)])
def test_ours_keeps_nothing_in_evaluation(wrap):
    net = nn.Linear(4, 1)
    wrapper = wrap(net, 0.1)
    (short, _), (long, leaves) = (graph_after(wrapper.clone(evaluation=True), steps) for steps in (1, 6))
    assert long == short
    assert id(net.weight) not in leaves


def test_ours_holds_the_same_number_of_tensors_after_every_evaluation(layer_of):
    wrapper = MetaSGD(layer_of(4), 0.1)
    counts, total = [], 0.0
    for _ in range(4):
        clone = wrapper.clone(evaluation=True)
        clone.adapt(squared(clone))
        total = total + squared(clone).detach()
        del clone
        counts.append(sum(type(thing) in (torch.Tensor, nn.Parameter) for thing in gc.get_objects()))
    assert counts[1] == counts[2] == counts[3]


# -- custom datasets: #180 ------------------------------------------------------------------------------


class OwnDataset(torch.utils.data.Dataset):
    """Five classes of four points; what a point is labelled is not known before it is read."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.full((4,), float(index)), index % 5


def test_custom_datasets_work_and_adapt():
    data = l2l.data.MetaDataset(OwnDataset(), labels_to_indices={c: list(range(c, 20, 5)) for c in range(5)})
    sample = l2l.data.TaskDataset(
        data,
        task_transforms=[
            l2l.data.transforms.NWays(data, 2),
            l2l.data.transforms.KShots(data, 2),
            l2l.data.transforms.LoadData(data),
            l2l.data.transforms.RemapLabels(data),
        ],
        num_tasks=3,
    )
    x, y = sample.sample()
    assert x.shape == (4, 4)
    assert sorted(y.tolist()) == [0, 0, 1, 1]
    clone = MAML(nn.Linear(4, 2), 0.001).clone()
    before = nn.functional.cross_entropy(clone(x), y)
    clone.adapt(before)
    assert nn.functional.cross_entropy(clone(x), y) < before


# -- deepcopy of a wrapper ------------------------------------------------------------------------------


def test_wrappers_are_copied_with_their_pools(layer_of):
    wrapper = MetaSGD(layer_of(3), 0.1)
    twin = copy.deepcopy(wrapper)
    twin.module.add_experts(1)
    with pytest.raises(StaleWrapperError):
        twin.clone()
    assert safe_clone(wrapper.module).pool.num_experts == 3
    wrapper.clone()
