"""lora_layer and merged_linear: LoRA experts around a frozen linear layer."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from modmoe import (
    DenseRouter,
    ExpertPool,
    MLPExpert,
    MoELayer,
    TopKRouter,
    count_parameters,
    lora_layer,
    merged_linear,
    sync_optimizer,
)


def trained(router=None, **options) -> MoELayer:
    """A layer with two ranks whose B are no longer zero."""
    torch.manual_seed(0)
    layer = lora_layer(nn.Linear(5, 3, **options), num_experts=2, rank=2, alpha=4.0, router=router)
    layer.add_experts(1, rank=3)
    for tensor, _, _ in layer.pool.growable("expert", "b").banks():
        nn.init.normal_(tensor)
    for tensor, _, _ in layer.pool.growable("gate", "weight").banks():
        nn.init.normal_(tensor)
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_at_creation_it_is_the_base_exactly(bias):
    torch.manual_seed(0)
    base = nn.Linear(5, 3, bias=bias)
    x = torch.randn(2, 7, 5)
    expected = base(x)
    layer = lora_layer(base, num_experts=3, rank=2)
    assert torch.equal(layer(x), expected)
    layer.add_experts(2)
    assert torch.equal(layer(x), expected)
    assert layer.shared_expert is base


def test_it_is_the_formula():
    layer = trained()
    x = torch.randn(6, 5)
    y = layer(x)
    weights = layer.routing.matrix()
    expected = layer.shared_expert(x)
    for position, expert_id in enumerate(layer.pool.ids):
        state = layer.pool.expert_state(expert_id)
        a, b = state["expert.a"][0], state["expert.b"][0]
        expected = expected + weights[:, [position]] * (4.0 / a.shape[1]) * (x @ a @ b)
    assert_close(y, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_merged_it_equals_the_layer_under_constant_weights(bias):
    layer = trained(bias=bias)
    layer.freeze([0])
    # a gate that ignores x: weights (.5, .3, .2)
    weights = torch.tensor([0.5, 0.3, 0.2])
    for tensor, _, _ in layer.pool.growable("gate", "weight").banks():
        nn.init.zeros_(tensor)
    for tensor, rows, _ in layer.pool.growable("gate", "bias").banks():
        for index, row in enumerate(rows):
            tensor.data[index] = weights[row.owner].log()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    merged = merged_linear(layer, weights)
    x = torch.randn(9, 5)
    assert_close(merged(x), layer(x), atol=1e-5, rtol=1e-5)
    assert (merged.bias is not None) == bias
    assert not torch.equal(merged.weight, layer.shared_expert.weight)
    assert all(p.requires_grad for p in merged.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert torch.equal(merged_linear(layer, torch.zeros(3)).weight, layer.shared_expert.weight)


def test_the_base_is_frozen_and_stays_so():
    torch.manual_seed(0)
    base = nn.Linear(4, 4)
    base(torch.randn(3, 4)).sum().backward()  # a gradient is left there
    optimizer = torch.optim.AdamW(base.parameters(), lr=0.1, weight_decay=0.1)
    layer = lora_layer(base, 2, rank=2)
    optimizer.add_param_group({"params": [p for p in layer.parameters() if p.requires_grad]})
    before = [p.detach().clone() for p in base.parameters()]
    optimizer.step()  # nothing is left there to apply
    assert all(torch.equal(p, value) for p, value in zip(base.parameters(), before, strict=True))
    changes = [
        lambda: layer.freeze([0]),
        lambda: layer.unfreeze([0]),
        lambda: layer.add_experts(1),
        lambda: layer.train().freeze(),
        lambda: layer.unfreeze([1, 2]),
    ]
    for change in changes:
        change()
        sync_optimizer(optimizer, layer)
        optimizer.zero_grad()
        layer(torch.randn(8, 4, requires_grad=True)).square().sum().backward()
        optimizer.step()
        assert not any(p.requires_grad for p in base.parameters())
        assert all(torch.equal(p, value) for p, value in zip(base.parameters(), before, strict=True))
    assert not torch.equal(layer.pool.expert_state(2)["expert.b"], torch.zeros(1, 2, 4))


def test_only_the_experts_and_the_gate_are_trainable():
    layer = lora_layer(nn.Linear(5, 3), num_experts=2, rank=2)
    # two experts of 5 * 2 + 2 * 3 = 16, two gate rows of 5 + 1; the base has 5 * 3 + 3
    counts = count_parameters(layer)
    assert (counts.trainable, counts.frozen) == (2 * 16 + 2 * 6, 18)


def test_all_parts_stand_on_the_base_s_device():
    router = TopKRouter(4, 2)
    router.register_buffer("shared", torch.ones(1))
    layer = lora_layer(nn.Linear(4, 2, device="meta"), 3, rank=1, router=router)
    assert {tensor.device.type for name, tensor in layer.named_parameters()} == {"meta"}
    assert router.shared.device.type == "meta"


def test_dtype_and_router():
    layer = lora_layer(nn.Linear(4, 2, dtype=torch.float64), 3, rank=1, router=TopKRouter(4, 2))
    y = layer(torch.randn(5, 4, dtype=torch.float64))
    assert y.dtype == torch.float64
    assert layer.routing.choices.shape == (5, 2)


def test_it_saves_loads_and_repeats_itself():
    layer, again = trained(), trained()
    x = torch.randn(4, 5)
    assert torch.equal(layer(x), again(x))
    layer.freeze([1])
    fresh = lora_layer(nn.Linear(5, 3), 1, rank=2, alpha=4.0)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


def test_it_learns_a_low_rank_change():
    torch.manual_seed(0)
    base = nn.Linear(6, 6)
    change = torch.randn(6, 1) @ torch.randn(1, 6)
    x = torch.randn(200, 6)
    target = base(x).detach() + x @ change
    layer = lora_layer(base, 2, rank=2)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    start = nn.functional.mse_loss(layer(x), target).item()
    for _ in range(200):
        loss = nn.functional.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert nn.functional.mse_loss(layer(x), target).item() < 0.01 * start


def test_refusals():
    layer = trained()
    with pytest.raises(ValueError, match=r"a weight for each of 3 experts is needed, got \(2,\)"):
        merged_linear(layer, torch.ones(2))
    with pytest.raises(ValueError, match=r"LoRA experts beside a linear layer are needed, got LoRA.* beside NoneType"):
        merged_linear(MoELayer(layer.pool, DenseRouter(5)), torch.ones(3))
    other = MoELayer(ExpertPool(MLPExpert(5, 4, 3)), DenseRouter(5), shared_expert=nn.Linear(5, 3))
    with pytest.raises(ValueError, match="got MLPExpert"):
        merged_linear(other, torch.ones(1))
    with pytest.raises(ValueError, match="the router takes 4 features, the experts take 5"):
        lora_layer(nn.Linear(5, 3), 2, rank=2, router=DenseRouter(4))
    with pytest.raises(ValueError, match="at least 1"):
        lora_layer(nn.Linear(5, 3), 2, rank=0)
