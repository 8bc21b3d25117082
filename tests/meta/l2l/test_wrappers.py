"""What the wrappers keep for each row follows the rows: rates, transforms, optimizer slots."""

import learn2learn as l2l
import pytest
import torch
from torch import nn

from modmoe.meta.l2l import ANIL, GBML, MAML, AdaptationError, MetaSGD, StaleWrapperError

X = torch.linspace(-1, 1, 24).reshape(6, 4)


def squared(module):
    return module(X).square().mean()


def transformed(module, lr=0.1, **options):
    return GBML(module, l2l.optim.ModuleTransform(nn.Linear), lr, **options)


def test_rates_by_hand():
    # w = 2, x = 1, L = w^2, dL/dw = 4, rate 0.1: w' = 2 - 0.4 = 1.6; L' = 2.56, dL'/drate = 2 w' * -4 = -12.8.
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 2.0)
    wrapper = MetaSGD(net, 0.1)
    clone = wrapper.clone()
    clone.adapt(clone(torch.ones(1, 1)).square().sum())
    loss = clone(torch.ones(1, 1)).square().sum()
    loss.backward()
    assert loss.item() == pytest.approx(2.56)
    assert wrapper.lrs.of("weight").grad.item() == pytest.approx(-12.8)


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("kind", ["MAML", "MetaSGD", "GBML"])
def test_plain_modules_adapt_as_in_learn2learn(kind, first_order):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    torch.manual_seed(1)
    ours = {"MAML": MAML, "MetaSGD": MetaSGD, "GBML": transformed}[kind](net, 0.1, first_order=first_order)
    torch.manual_seed(1)
    theirs = {
        "MAML": lambda: l2l.algorithms.MAML(net, 0.1, first_order=first_order),
        "MetaSGD": lambda: l2l.algorithms.MetaSGD(net, 0.1, first_order=first_order),
        "GBML": lambda: l2l.algorithms.GBML(
            net, l2l.optim.ModuleTransform(nn.Linear), 0.1, first_order=first_order
        ).double(),
    }[kind]()
    if kind == "GBML":
        for mine, other in zip(ours.compute_update.parameters(), theirs.compute_update.parameters(), strict=True):
            other.data.copy_(mine.data)
    gradients = []
    for wrapper in (ours, theirs):
        clone = wrapper.clone()
        for _ in range(2):
            clone.adapt((clone(X.double()) - 1).square().mean())
        loss = (clone(X.double()) - 1).square().mean()
        gradients.append((loss, *torch.autograd.grad(loss, list(net.parameters()))))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


def test_transforms_adapt_as_in_learn2learn():
    torch.manual_seed(0)
    net = nn.Linear(4, 1).double()
    ours = transformed(net, adapt_transform=True)
    theirs = l2l.algorithms.GBML(net, l2l.optim.ModuleTransform(nn.Linear), 0.1, adapt_transform=True).double()
    for mine, other in zip(ours.compute_update.parameters(), theirs.compute_update.parameters(), strict=True):
        other.data.copy_(mine.data)
    results = []
    for wrapper in (ours, theirs):
        clone = wrapper.clone()
        for _ in range(3):
            clone.adapt((clone(X.double()) - 1).square().mean())
        loss = (clone(X.double()) - 1).square().mean()
        results.append((loss, *torch.autograd.grad(loss, list(wrapper.compute_update.parameters()))))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def test_anil_adapts_the_head_only_and_trains_the_features():
    torch.manual_seed(0)
    features, head = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()), nn.Linear(3, 1)
    wrapper = ANIL(features, head, 0.1)
    clone = wrapper.clone()
    clone.adapt(squared(clone))
    assert clone.module.features[0].weight is features[0].weight
    assert not torch.equal(clone.module.head.weight, head.weight)
    squared(clone).backward()
    assert features[0].weight.grad.any()
    assert features[1].num_batches_tracked.item() == 0


def test_a_head_of_experts_adapts_under_anil(layer_of):
    wrapper = ANIL(nn.Linear(4, 4), layer_of(3), 0.1)
    wrapper.module.head.add_experts(1)
    with pytest.raises(StaleWrapperError, match=r"head.pool.rows"):
        wrapper.clone()
    wrapper.sync()
    names = set(wrapper.clone()._cloned.tensors)
    assert all(name.startswith("head.") for name in names)
    assert "head.pool.rows.expert.w_in.c1" in names


def rate_rows(wrapper, name="w_in"):
    """owner -> the rates of its row."""
    growable = wrapper.module.pool.growable("expert", name)
    mirror = wrapper.lrs.grown[f"of/pool/rows/expert/{name}"]
    assert [rows for _, rows, _ in mirror.banks()] == [rows for _, rows, _ in growable.banks()]
    return {row.owner: tensor[i].detach().clone() for tensor, rows, _ in mirror.banks() for i, row in enumerate(rows)}


def train(wrapper, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        clone = wrapper.clone()
        clone.adapt(squared(clone))
        squared(clone).backward()
        optimizer.step()


def test_rates_and_their_moments_follow_the_experts(layer_of):
    wrapper = MetaSGD(layer_of(3, 3), 0.1)
    layer = wrapper.module
    optimizer = torch.optim.Adam(wrapper.parameters(), lr=0.01)
    train(wrapper, optimizer)
    learned = rate_rows(wrapper)
    moments = optimizer.state[wrapper.lrs.of("pool.rows.expert.w_in.c0")]["exp_avg"].clone()
    layer.add_experts(1)
    layer.freeze([0])
    layer.router.top_k = 4
    wrapper.sync(optimizer)
    after = rate_rows(wrapper)
    assert all(torch.equal(after[owner], learned[owner]) for owner in (0, 1, 2))
    assert torch.equal(after[3], torch.full((4, 8), 0.1))
    survivors = wrapper.lrs.of("pool.rows.expert.w_in.c2")
    assert torch.equal(optimizer.state[survivors]["exp_avg"], moments[1:])
    train(wrapper, optimizer)
    assert torch.equal(rate_rows(wrapper)[0], learned[0])  # frozen with its expert
    assert not torch.equal(rate_rows(wrapper)[3], after[3])
    layer.router.top_k = 2
    layer.remove([1])
    wrapper.sync(optimizer)
    assert set(rate_rows(wrapper)) == {0, 2, 3}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in wrapper.parameters()}
    assert {id(parameter) for parameter in optimizer.state} <= held


def test_transforms_follow_the_experts(layer_of):
    wrapper = transformed(layer_of(2, 2))
    layer = wrapper.module
    optimizer = torch.optim.Adam(wrapper.parameters(), lr=0.01)
    train(wrapper, optimizer, 1)

    def key(number):
        return f"of/pool/rows/expert/b_out/row{number}"

    of_first = wrapper.compute_update.transforms[key(0)].transform.weight.detach().clone()
    layer.add_experts(1)
    layer.freeze([0])
    wrapper.sync(optimizer)
    transforms = wrapper.compute_update.transforms
    assert {key(0), key(1), key(2)} <= set(transforms)
    train(wrapper, optimizer)
    assert torch.equal(transforms[key(0)].transform.weight, of_first)
    layer.add_experts(1)
    layer.remove([1])
    wrapper.sync(optimizer)
    assert key(1) not in wrapper.compute_update.transforms
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in wrapper.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("wrap", [MAML, MetaSGD, transformed])
def test_a_grown_wrapper_is_saved_and_loaded(layer_of, wrap):
    wrapper = wrap(layer_of(2), 0.1)
    wrapper.module.add_experts(2)
    wrapper.module.freeze([1])
    wrapper.sync()
    twin = wrap(layer_of(2, seed=7), 0.3)
    twin.load_state_dict(wrapper.state_dict())
    clones = [each.clone() for each in (wrapper, twin)]
    for clone in clones:
        clone.lr = 0.1
        clone.adapt(squared(clone))
    assert torch.equal(clones[0](X), clones[1](X))


@pytest.mark.parametrize("wrap", [MAML, MetaSGD, transformed])
def test_a_clone_of_a_clone_goes_on_from_it(layer_of, wrap):
    wrapper = wrap(layer_of(6), 0.1, adapt="active_experts")
    first = wrapper.clone(X[:1])
    first.adapt(first(X[:1]).square().mean())
    second = first.clone()
    assert torch.equal(second(X[:1]), first(X[:1]))
    second.adapt(second(X[:1]).square().mean())
    assert not torch.equal(second(X[:1]), first(X[:1]))


def test_a_maml_of_experts_learns_a_toy_task(layer_of):
    wrapper = MAML(layer_of(4), 0.3)
    optimizer = torch.optim.Adam(wrapper.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)

    def error(evaluation=False):
        target = torch.randn(4, generator=generator)  # tasks: a constant output, told by the context
        clone = wrapper.clone(evaluation=evaluation)
        for _ in range(2):
            clone.adapt((clone(X) - target).square().sum(1).mean())
        return (clone(-X) - target).square().mean()

    before = sum(error(True).item() for _ in range(10)) / 10
    for _ in range(40):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert sum(error(True).item() for _ in range(10)) / 10 < 0.3 * before


def test_bad_input(layer_of):
    for wrap in (MAML, MetaSGD, transformed):
        with pytest.raises(ValueError, match="lr must be above 0"):
            wrap(nn.Linear(1, 1), 0.0)
    wrapper = MAML(layer_of(), 0.1)
    with pytest.raises(AdaptationError, match="adapt a clone"):
        wrapper.adapt(squared(wrapper))
    with pytest.raises(AdaptationError, match="a clone is of one task"):
        wrapper.clone().sync()
    clone = wrapper.clone()
    clone.module.add_experts(1)
    with pytest.raises(StaleWrapperError):
        clone.clone()
