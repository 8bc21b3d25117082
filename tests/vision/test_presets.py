"""Presets by their parameter counts, and the operations that they take."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import modmoe
from modmoe.vision import (
    active_flops,
    matched_features,
    matched_slot_features,
    moe_layers,
    vmoe_base,
    vmoe_small,
    vmoe_tiny,
)


@pytest.mark.parametrize(
    ("make", "D", "patch", "total", "active"),
    [
        (vmoe_tiny, 192, 16, 9_862_312, 6_311_848),
        (vmoe_small, 384, 32, 39_426_280, 25_247_464),
        (vmoe_base, 768, 16, 152_692_456, 96_023_272),
    ],
)
def test_parameters_by_hand(make, D, patch, total, active):
    with torch.device("meta"):  # nothing is computed
        model = make()
    S, H = (224 // patch) ** 2, 4 * D
    embed = 3 * patch**2 * D + D + S * D
    body = 4 * D + (3 * D * D + 3 * D) + (D * D + D)  # two norms, queries with keys and values, projection
    mlp = 2 * D * H + H + D
    expected = embed + 12 * body + 10 * mlp + 2 * (8 * mlp + 8 * D) + 2 * D + 1000 * D + 1000
    count = modmoe.count_parameters(model)
    assert count.total == expected == total
    assert count.active == expected - 2 * 6 * mlp == active  # 2 of 8 experts in two blocks
    assert model.moe_blocks == (9, 11)


def test_options_take_the_place_of_a_preset_s():
    model = vmoe_tiny(10, 32, depth=2, blocks="all", num_experts=4)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert [layer.pool.num_experts for layer in moe_layers(model).values()] == [4, 4]


@pytest.mark.parametrize("kind", ["vit", "vmoe", "soft"])
def test_operations_are_what_torch_counts(kind, build, images):
    model = build(kind).eval()
    for layer in moe_layers(model).values():
        layer.backend = "reference"
    # of attention, torch counts this kernel's products only
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(images)
    assert counter.get_total_flops() == 5 * active_flops(model)


def test_experts_of_equal_cost(build):
    dense = build("vit", hidden_features=64)
    # (64 - 4 / 2) / 2 = 31 and 4 * 64 / 4 - 6 = 58: no rounding, so equal to the last operation
    assert matched_features(64, 4, 2) == 31
    assert matched_slot_features(64, 4, 4) == 58
    sparse = build("vmoe", hidden_features=64, num_experts=4, expert_features=31)
    soft = build("soft", hidden_features=64, num_experts=2, slots=2, expert_features=58)
    assert active_flops(dense) == active_flops(sparse) == active_flops(soft)


def test_bad_input(build):
    with pytest.raises(ValueError, match="the gate alone costs more than the dense block"):
        matched_features(4, 8, 2)
    with pytest.raises(ValueError, match="mixing tokens alone costs more"):
        matched_slot_features(64, 64, 64)
    model = build("vit")
    model.blocks[0].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match="operations of Identity are not known"):
        active_flops(model)
