"""Every preset: causal, padded as alone, grown, frozen, saved; and what is refused."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

import modmoe
from modmoe import ExpertChoiceRouter, ExpertPool, HashRouter, MoELayer, SmearRouter, SwiGLUExpert, TopKRouter
from modmoe.gating.capacity import Capacity
from modmoe.language import PRESETS, MoELanguageModel, language_model

NAMES = list(PRESETS)
CAPACITY = ("switch", "gshard", "glam")


def tokens_of(*shape, seed=0):
    return torch.randint(19, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("preset", NAMES)
def test_no_logit_depends_on_later_tokens(preset, training, build, domains_of):
    if training and preset in CAPACITY:
        pytest.skip("their capacities, in training, depend on how many tokens there are")
    model, domains = build(preset).train(training), domains_of(preset, 2)
    x = tokens_of(2, 20)
    y = model(x, domains=domains)
    for end in (1, 13):
        changed = x.clone()
        changed[:, end:] = (x[:, end:] + 1 + tokens_of(2, 20 - end, seed=1) % 18) % 19
        assert (changed[:, end:] != x[:, end:]).all()
        assert_close(model(changed, domains=domains)[:, :end], y[:, :end], atol=1e-5, rtol=0)
        assert_close(model(x[:, :end], domains=domains), y[:, :end], atol=1e-5, rtol=0)
        assert (model(changed, domains=domains)[:, end:] - y[:, end:]).abs().max() > 1e-4


@pytest.mark.parametrize("preset", NAMES)
def test_padding_on_the_left_changes_nothing(preset, build, domains_of):
    model, x, mask = build(preset), tokens_of(2, 15), torch.ones(2, 15, dtype=torch.bool)
    mask[1, :6] = False
    domains = domains_of(preset, 2)
    y = model(x, mask, domains)
    assert_close(y[0], model(x[:1], domains=None if domains is None else domains[:1])[0], atol=1e-5, rtol=0)
    assert_close(y[1, 6:], model(x[1:, 6:], domains=None if domains is None else domains[1:])[0], atol=1e-5, rtol=0)


def test_learned_positions_and_layer_norm(size):
    torch.manual_seed(0)
    other = dataclasses.replace(size, norm="layer", positions="learned")
    model = language_model("moa", other, 4).eval()
    assert isinstance(model.norm, torch.nn.LayerNorm)
    x = torch.full((1, 6), 3)
    y = model(x)
    assert (y[:, 1] - y[:, 5]).abs().max() > 1e-4  # equal tokens, at other places
    assert_close(model(x[:, :4]), y[:, :4], atol=1e-5, rtol=0)


@pytest.mark.parametrize("preset", ["switch", "deepseek", "moa", "demix"])
def test_growth_and_freezing(preset, build, domains_of):
    model, x, domains = build(preset).train(), tokens_of(3, 12), domains_of(preset, 3)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    modmoe.freeze(model, [0])
    modmoe.sync_optimizer(optimizer, model)
    frozen = [layer.pool.expert_state(0) for layer in model.layers]
    before = model.head.weight.clone()
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(x, domains).backward()
        optimizer.step()
        model.update_routers()
    moments = optimizer.state[model.head.weight]["exp_avg"].clone()
    new = modmoe.grow(model, 1)
    modmoe.sync_optimizer(optimizer, model)
    assert torch.equal(optimizer.state[model.head.weight]["exp_avg"], moments)
    listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert listed == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer.zero_grad()
    model.loss(x, domains).backward()
    optimizer.step()
    assert {ids[0] for ids in new.values()} == {len(model.layers[0].pool.ids) - 1}
    for layer, state in zip(model.layers, frozen, strict=True):
        now = layer.pool.expert_state(0)
        assert all(torch.equal(now[name], state[name]) for name in state)
    assert not torch.equal(model.head.weight, before)
    modmoe.remove(model, new)
    assert model.eval()(x, domains=domains).isfinite().all()


@pytest.mark.parametrize("preset", NAMES)
def test_saved_and_loaded(preset, build, domains_of, tmp_path):
    model, x, domains = build(preset), tokens_of(3, 9), domains_of(preset, 3)
    if model.layers:
        modmoe.grow(model, 2)
        modmoe.freeze(model, [1])
    modmoe.save_checkpoint(tmp_path / "model.safetensors", model)
    fresh = build(preset, seed=1)
    modmoe.load_checkpoint(tmp_path / "model.safetensors", fresh)
    assert torch.equal(fresh(x, domains=domains), model(x, domains=domains))


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (torch.zeros(1, 25, dtype=torch.int64), None, "a sequence of 25 tokens is past the context of 24"),
        (torch.zeros(5, dtype=torch.int64), None, r"shape \(B, S\) are needed"),
        (torch.zeros(1, 5), None, "integer tokens"),
        (torch.full((1, 5), 19), None, r"tokens lie in \[0, 19\), got 19 to 19"),
        (torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5), "a bool mask"),
    ],
)
def test_bad_input(tokens, mask, message, build):
    with pytest.raises(ValueError, match=message):
        build("mixtral")(tokens, mask)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (SmearRouter(16), "SmearRouter looks ahead"),
        (ExpertChoiceRouter(16), "ExpertChoiceRouter looks ahead"),
        (TopKRouter(16, 1, capacity=Capacity(1.25)), "looks ahead in evaluation too"),
        (HashRouter(16), "needs token ids"),
    ],
)
def test_routers_that_no_language_model_can_use(router, message, size):
    with pytest.raises(ValueError, match=message):
        MoELanguageModel(size, lambda: MoELayer(ExpertPool(SwiGLUExpert(16, 4), 4), router))


def test_blocks_that_are_not_there(size):
    with pytest.raises(ValueError, match=r"blocks \[2\] are named, the model has 0 to 1"):
        MoELanguageModel(size, moe_blocks=[2])
