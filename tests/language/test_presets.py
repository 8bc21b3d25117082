"""Presets: equal active parameters, the places of experts, and each paper's marks."""

import pytest
import torch

from modmoe import DeepSeekV3Router, MoELayer, count_parameters
from modmoe.conversion import SharedSwiGLU, SwiGLU
from modmoe.language import PRESETS, HeadMixture, ModelSize, block_numbers, language_model

MIXTURES = [name for name in PRESETS if name != "dense"]


def test_dense_parameters_by_hand():
    # embedding and head 2 * 256 * 64; 4 blocks of 4 * 64^2 attention, 3 * 64 * 192 SwiGLU and 2 norms; the last norm
    assert count_parameters(language_model("dense")).total == 32_768 + 4 * (16_384 + 36_864 + 128) + 64


@pytest.mark.parametrize("preset", MIXTURES)
@pytest.mark.parametrize("size", [ModelSize(), ModelSize(features=32, num_blocks=2, num_heads=2, hidden_features=128)])
def test_active_parameters_are_the_dense_twin_s_but_for_the_gates(preset, size):
    dense, model = language_model("dense", size), language_model(preset, size)
    gates = sum(
        model_layer.pool.growable(model_layer.namespace, name).stack(model_layer.pool.ids).numel()
        for model_layer in model.layers
        for name, spec in model_layer.router.row_specs().items()
        if spec.trainable
    )
    assert model.active_parameters() - gates == dense.active_parameters() == count_parameters(dense).total
    assert gates <= 0.05 * dense.active_parameters()
    assert count_parameters(model).total > model.active_parameters()


def test_places_of_experts():
    assert block_numbers(6, every=2) == [1, 3, 5]
    assert block_numbers(6, every=1) == list(range(6))
    assert block_numbers(6, every=4) == [3]
    assert block_numbers(6, last=2) == [4, 5]


@pytest.mark.parametrize("options", [{}, {"every": 1, "last": 1}, {"every": 0}, {"last": 7}])
def test_places_that_do_not_exist(options):
    with pytest.raises(ValueError, match=r"every"):
        block_numbers(6, **options)


@pytest.mark.parametrize("preset", ["switch", "gshard", "glam"])
def test_experts_in_every_second_block(preset):
    model = language_model(preset)
    assert [type(block.feed_forward) for block in model.blocks] == [SwiGLU, MoELayer] * 2
    last = language_model(preset, last=3)
    assert [type(block.feed_forward) for block in last.blocks] == [SwiGLU, *[MoELayer] * 3]


def test_deepseek_has_small_experts_a_shared_one_and_a_bias_that_moves():
    model = language_model("deepseek")
    layer = model.layers[0]
    assert layer.pool.num_experts == 16
    assert layer.pool.record(0).sizes == {"hidden_features": 48}
    assert isinstance(layer.shared_expert, SharedSwiGLU)
    assert isinstance(layer.router, DeepSeekV3Router)
    model.train().loss(torch.randint(256, (4, 33)))
    bias = layer.pool.growable(layer.namespace, "selection_bias")
    assert bias.stack(layer.pool.ids).abs().max() == 0
    load = layer.routing.load.double()
    model.update_routers()
    # b += u sign(mean load - load) with u = 0.001
    expected = 0.001 * torch.sign(load.mean() - load)
    torch.testing.assert_close(bias.stack(layer.pool.ids).double(), expected, atol=1e-9, rtol=0)


def test_moa_has_heads_in_place_of_attention():
    model = language_model("moa")
    assert all(isinstance(block.attention, HeadMixture) for block in model.blocks)
    assert all(isinstance(block.feed_forward, SwiGLU) for block in model.blocks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixtrall",), "unknown preset 'mixtrall'; did you mean 'mixtral'"),
        (("mixtral", ModelSize(hidden_features=33)), "divides hidden_features by 2"),
        (("mixtral", None, 1), "top_k=2"),
        (("moa", ModelSize(features=66, num_heads=3)), "divisible by 4"),
        (("dense", None, 8, 2), "no blocks with experts"),
    ],
)
def test_what_cannot_be_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        language_model(*arguments)


@pytest.mark.parametrize("options", [{"context": 0}, {"norm": "batch"}, {"positions": "none"}])
def test_sizes_that_cannot_be(options):
    with pytest.raises(ValueError, match=r"at least 1|norm is|positions are"):
        language_model("dense", ModelSize(**options))
