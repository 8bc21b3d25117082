"""Blocks of transformers against layers made of their state dicts: numbers, both layouts, growth.

The tests named "theirs ..." show where transformers 5.24.0 computes something else, and say so.
"""

import importlib
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import modmoe.conversion.huggingface as huggingface
from modmoe import DeepSeekV3Router, MoELayer
from modmoe.conversion.huggingface import (
    Kind,
    expert_order,
    from_transformers,
    to_transformers,
    transformers_config,
)

D, H = 16, 8
KINDS: list[Kind] = ["mixtral", "qwen2_moe", "deepseek_v3"]
BIAS = "gate.e_score_correction_bias"
NAMES = {"mixtral": ("w1", "w3", "w2")}

Block = tuple[nn.Module, object]
MakeBlock = Callable[..., Block]


@pytest.fixture(scope="module")
def make_block() -> MakeBlock:
    """A block with random weights, and its config; transformers takes seconds to import, so once, and here."""
    from transformers import DeepseekV3Config, MixtralConfig, Qwen2MoeConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    def build(kind: Kind, seed: int = 0, implementation: str | None = None, **settings) -> Block:
        torch.manual_seed(seed)
        if kind == "mixtral":
            config = MixtralConfig(**{"hidden_size": D, "intermediate_size": H, "num_local_experts": 4, **settings})
            block_class = MixtralSparseMoeBlock
        elif kind == "qwen2_moe":
            sizes = {"hidden_size": D, "moe_intermediate_size": H, "shared_expert_intermediate_size": 24}
            config = Qwen2MoeConfig(**{**sizes, "num_experts": 6, "num_experts_per_tok": 2, **settings})
            block_class = Qwen2MoeSparseMoeBlock
        else:
            sizes = {"hidden_size": D, "moe_intermediate_size": H, "n_routed_experts": 8, "n_shared_experts": 2}
            choice = {"num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
            config = DeepseekV3Config(**{**sizes, **choice, **settings})
            block_class = DeepseekV3MoE
        config._experts_implementation = implementation
        block = block_class(config)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.normal_(0.0, 0.5)
            if kind == "deepseek_v3":
                block.gate.e_score_correction_bias.normal_(0.0, 0.3)
        return block, config

    return build


def per_expert(kind: Kind, fused: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layout of published checkpoints, by hand."""
    names = NAMES.get(kind, ("gate_proj", "up_proj", "down_proj"))
    state = {key: tensor for key, tensor in fused.items() if not key.startswith("experts.")}
    for expert, (gate_up, down) in enumerate(
        zip(fused["experts.gate_up_proj"], fused["experts.down_proj"], strict=True)
    ):
        for name, weight in zip(names, (*gate_up.chunk(2), down), strict=True):
            state[f"experts.{expert}.{name}.weight"] = weight
    return state


def assert_near(ours: Tensor | None, theirs: Tensor | None, tolerance: float, why: str = "") -> None:
    """Within a tolerance of the largest entry, or of 1: sums of many terms are as exact as their largest."""
    assert ours is not None
    assert theirs is not None
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    scale = max(1.0, theirs.abs().max().item())
    assert (ours - theirs).abs().max().item() <= tolerance * scale, why


def gradients(kind: Kind, layer: MoELayer) -> dict[str, Tensor]:
    """The layer's gradients by transformers' names: they are written over the weights, and these converted."""
    with torch.no_grad():
        for parameter in layer.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    return {key: tensor for key, tensor in to_transformers(kind, layer).items() if key != BIAS}


def assert_same_state(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype
        assert torch.equal(left[key], right[key]), key


# -- numbers -----------------------------------------------------------------------------------------------------------

CASES = {
    "mixtral, 2 of 4": ("mixtral", {}),
    "mixtral, 3 of 8": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 3}),
    "mixtral, all": ("mixtral", {"num_experts_per_tok": 4}),
    "qwen2, 2 of 6": ("qwen2_moe", {"norm_topk_prob": False}),
    "qwen2, 1 of 6": ("qwen2_moe", {"norm_topk_prob": False, "num_experts_per_tok": 1}),
    "qwen2, 3 of 6, normalised": ("qwen2_moe", {"norm_topk_prob": True, "num_experts_per_tok": 3}),
    "deepseek, 3 of 2 of 4 groups": ("deepseek_v3", {}),
    "deepseek, not normalised": ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 1.5}),
    "deepseek, 3 of 1 of 2 groups": ("deepseek_v3", {"n_group": 2, "topk_group": 1}),
    "deepseek, no groups": ("deepseek_v3", {"n_group": 1, "topk_group": 1, "n_routed_experts": 5}),
    "deepseek, 1, not normalised": ("deepseek_v3", {"norm_topk_prob": False, "num_experts_per_tok": 1}),
}


@pytest.mark.parametrize("implementation", [None, "eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_theirs(case, implementation, make_block):
    kind, settings = CASES[case]
    for seed, shape in enumerate([(2, 13), (1, 1)]):
        block, config = make_block(kind, seed, implementation, **settings)
        layer = from_transformers(kind, block.state_dict(), config)
        x, x_theirs = (torch.randn(*shape, D, generator=torch.manual_seed(seed)).requires_grad_() for _ in range(2))
        y, y_theirs = layer(x), block(x_theirs)
        assert y_theirs.abs().max() > 0.5
        assert_near(y, y_theirs, 1e-5)
        direction = torch.randn(y.shape)
        for output in (y, y_theirs):
            (output * direction).sum().backward()
        assert_near(x.grad, x_theirs.grad, 1e-5)
        theirs = {name: parameter.grad for name, parameter in block.named_parameters()}
        ours = gradients(kind, layer)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert theirs[name].abs().max() > 1e-3, name
            assert_near(ours[name], theirs[name], 1e-5, name)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_theirs_where_their_weights_do_not_pass_float32(kind, make_block):
    """transformers computes every softmax and sigmoid in float32. With one normalised expert the weight is 1 anyway."""
    settings = {} if kind == "mixtral" else {"norm_topk_prob": True}
    block, config = make_block(kind, num_experts_per_tok=1, **settings)
    block.double()
    layer = from_transformers(kind, block.state_dict(), config)
    x = torch.randn(2, 9, D, dtype=torch.float64)
    y, theirs = layer(x), block(x)
    assert y.dtype == torch.float64
    assert_near(y, theirs, 1e-12)
    for output in (y, theirs):
        output.square().sum().backward()
    ours = gradients(kind, layer)
    for name, parameter in block.named_parameters():
        if name != "gate.weight":
            assert_near(ours[name], parameter.grad, 1e-12, name)


def test_order_of_groups_by_hand(make_block):
    # groups {0, 1} and {2, 3} there; ids 0, 2 and 1, 3 here: position 0 is their 0, 1 their 2, 2 their 1, 3 their 3
    block, config = make_block("deepseek_v3", n_routed_experts=4, n_group=2, topk_group=2)
    state = {**block.state_dict(), BIAS: torch.tensor([0.0, 1.0, 2.0, 3.0])}
    layer = from_transformers("deepseek_v3", state, config)
    gate = layer.pool.namespace("gate")
    assert gate["selection_bias"].tolist() == [0.0, 2.0, 1.0, 3.0]
    assert torch.equal(gate["weight"], state["gate.weight"][[0, 2, 1, 3]])
    assert torch.equal(layer.pool.namespace("expert")["w_out"][1], state["experts.down_proj"][2].T)
    router = layer.router
    assert isinstance(router, DeepSeekV3Router)
    assert router.groups(gate).tolist() == [0, 1, 0, 1]
    assert expert_order(layer) == [0, 2, 1, 3]


# -- where theirs is otherwise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_theirs_gives_the_gate_of_one_normalised_expert_no_gradient(kind, make_block):
    """With k = 1 transformers divides a score by itself: the gate never learns. Ours gets the gradient of log p."""
    settings = {} if kind == "mixtral" else {"norm_topk_prob": True}
    block, config = make_block(kind, num_experts_per_tok=1, **settings)
    layer = from_transformers(kind, block.state_dict(), config)
    x = torch.randn(1, 30, D)
    y, theirs = layer(x), block(x)
    assert_close(y, theirs, rtol=1e-5, atol=1e-5)
    for output in (y, theirs):
        output.square().mean().backward()
    ours = gradients(kind, layer)["gate.weight"]
    assert (ours.abs().amax(1) > 1e-3).sum() >= 3
    assert block.gate.weight.grad.abs().max() < 1e-4 * ours.abs().max()  # rounding


def test_theirs_masks_groups_with_minus_infinity_as_ours_does(make_block):
    """Masked with 0, as in former versions, experts of other groups would win wherever s + b is negative.

    5.24.0 masks with -inf: with b = -2 everywhere the choices are equal, and within the best groups.
    """
    block, config = make_block("deepseek_v3")
    block.gate.e_score_correction_bias.fill_(-2.0)
    layer = from_transformers("deepseek_v3", block.state_dict(), config)
    x = torch.randn(1, 40, D)
    _, _, theirs = block.gate(x)
    ours = torch.tensor(expert_order(layer)).argsort()  # our position -> their expert
    assert torch.equal(ours[layer.route(x).choices].sort(1).values, theirs.sort(1).values)
    assert max(len(set((row // 2).tolist())) for row in theirs) == 2
    assert_close(layer(x), block(x), rtol=1e-5, atol=1e-5)


def test_theirs_loses_the_weights_of_tiny_scores(make_block):
    """DeepSeek-V3's weights are s / (sum + 1e-20): for logits of -60 (s = 9e-27) 1e-6 of what they should add up to."""
    block, config = make_block("deepseek_v3", n_group=1, topk_group=1, routed_scaling_factor=1.0)
    with torch.no_grad():
        block.gate.weight.copy_(torch.eye(8, D))
    layer = from_transformers("deepseek_v3", block.state_dict(), config)
    x = torch.full((1, 1, D), -60.0) - 0.1 * torch.arange(D)
    _, theirs, _ = block.gate(x)
    assert theirs.sum() < 1e-5
    assert_close(layer.route(x).weight.sum(), torch.tensor(1.0))


def test_theirs_scores_in_bfloat16(make_block):
    """Mixtral's and Qwen2-MoE's logits are rounded to the model's dtype: 64 and 64.2 are equal there, not here."""
    block, config = make_block("mixtral", num_local_experts=2)
    block.to(torch.bfloat16)
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.weight[:, 0] = 1.0
        block.gate.weight[1, 1] = 1.0
    layer = from_transformers("mixtral", block.state_dict(), config)
    x = torch.zeros(1, 1, D, dtype=torch.bfloat16)
    x[..., 0], x[..., 1] = 64.0, 0.2
    _, theirs, _ = block.gate(x)
    assert theirs.tolist() == [[0.5, 0.5]]
    # 1 / (1 + e^-0.2) = .5498
    assert_close(layer.route(x).weight, torch.tensor([0.5498, 0.4502]), rtol=0, atol=2e-4)


def test_theirs_rounds_float64_weights_to_float32(make_block):
    block, config = make_block("mixtral")
    block.double()
    layer = from_transformers("mixtral", block.state_dict(), config)
    x = torch.randn(1, 20, D, dtype=torch.float64)
    exact = (x[0] @ block.gate.weight.T).softmax(1).topk(2).values
    exact = exact / exact.sum(1, keepdim=True)
    assert_close(layer.route(x).weight.view(20, 2), exact, rtol=1e-14, atol=1e-14)
    assert (block.gate(x)[1] - exact).abs().max() > 1e-9


def test_theirs_takes_experts_of_other_groups_where_the_chosen_ones_are_too_small(make_block):
    """3 experts out of 1 group of 2: transformers' third has s + b = -inf and stands in another group. Refused here."""
    block, config = make_block("deepseek_v3", topk_group=1)
    _, weights, choices = block.gate(torch.randn(1, 5, D))
    assert all(len(set((row // 2).tolist())) > 1 for row in choices)
    assert (weights > 0).all()
    with pytest.raises(ValueError, match="top_k=3 experts do not fit into 1 groups of 2"):
        from_transformers("deepseek_v3", block.state_dict(), config)


def test_theirs_jitters_its_own_input_in_place(make_block):
    """Mixtral's router_jitter_noise changes the caller's tensor, and what the experts see. Refused here."""
    block, config = make_block("mixtral", router_jitter_noise=0.1)
    x = torch.ones(1, 3, D)
    block.train()(x)
    assert not torch.equal(x, torch.ones(1, 3, D))
    with pytest.raises(ValueError, match=r"router_jitter_noise=0\.1 has no counterpart here, only 0\.0 has"):
        from_transformers("mixtral", block.state_dict(), config)


# -- layouts, dtypes, round trips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_bit_by_bit_in_both_layouts(kind, dtype, make_block):
    block, config = make_block(kind)
    fused = block.to(dtype).state_dict()
    if kind == "deepseek_v3":
        fused |= {key: tensor.float() + 1e-5 for key, tensor in fused.items() if key.startswith("gate.")}
    apart = per_expert(kind, fused)
    for state in (fused, apart):
        layer = from_transformers(kind, state, config)
        assert_same_state(to_transformers(kind, layer), fused)
        assert_same_state(to_transformers(kind, layer, layout="per_expert"), apart)
        assert layer(torch.randn(3, D, dtype=dtype)).dtype == dtype
        assert {parameter.dtype for name, parameter in layer.named_parameters() if "gate.weight" not in name} == {dtype}


@pytest.mark.parametrize("kind", KINDS)
def test_settings_come_back(kind, make_block):
    block, config = make_block(kind)
    layer = from_transformers(kind, block.state_dict(), config)
    settings = transformers_config(kind, layer)
    assert len(settings) >= 4
    assert settings == {name: getattr(config, name) for name in settings}
    again = from_transformers(kind, to_transformers(kind, layer), settings)  # a mapping serves as well
    x = torch.randn(7, D)
    assert torch.equal(again(x), layer(x))


def test_what_is_written_is_no_view(make_block):
    block, config = make_block("qwen2_moe")
    layer = from_transformers("qwen2_moe", block.state_dict(), config)
    state = to_transformers("qwen2_moe", layer)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())
    before = {key: tensor.clone() for key, tensor in state.items()}
    with torch.no_grad():
        for parameter in [*layer.parameters(), *block.parameters()]:
            parameter.add_(1.0)
    assert_same_state(state, before)
    assert_close(layer.pool.namespace("gate")["weight"], before["gate.weight"] + 1)  # nor was what was read


def test_a_bfloat16_deepseek_keeps_its_gate_in_float32_and_grows_so(make_block):
    block, config = make_block("deepseek_v3")
    block.to(torch.bfloat16)
    block.gate.float()
    layer = from_transformers("deepseek_v3", block.state_dict(), config)
    layer.add_experts(1)
    growables = {name: layer.pool.growable("gate", name).stack(layer.pool.ids) for name in layer.pool.namespace("gate")}
    assert {name: tensor.dtype for name, tensor in growables.items()} == dict.fromkeys(growables, torch.float32)
    assert layer.pool.namespace("expert")["w_in"].dtype == torch.bfloat16
    layer.remove([8])
    x = torch.randn(1, 40, D, dtype=torch.bfloat16)
    assert_close(layer(x), block(x), rtol=2**-6, atol=2**-4)  # bfloat16 keeps 8 bits; sums of 16 products


def test_prefixes(make_block):
    block, config = make_block("mixtral")
    prefix = "model.layers.3.block_sparse_moe."
    published = {prefix + key: tensor for key, tensor in per_expert("mixtral", block.state_dict()).items()}
    published["model.layers.3.self_attn.q_proj.weight"] = torch.zeros(1)
    published["model.layers.30.block_sparse_moe.gate.weight"] = torch.zeros(1)
    layer = from_transformers("mixtral", published, config, prefix=prefix)
    written = to_transformers("mixtral", layer, "per_expert", prefix=prefix)
    assert len(written) == 13
    assert_same_state(written, {key: published[key] for key in written})


def test_seeds_and_random_state_are_left_alone(make_block):
    block, config = make_block("qwen2_moe")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    from_transformers("qwen2_moe", block.state_dict(), config)
    assert torch.equal(torch.get_rng_state(), before)


def test_transformers_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it raises now
    with pytest.raises(ImportError):
        importlib.import_module("transformers")
    folder = Path(huggingface.__file__).parent
    fresh = {path.name: runpy.run_path(str(path)) for path in folder.glob("huggingface*.py")}
    assert len(fresh) == 3
    state = {"gate.weight": torch.eye(2, 4), "experts.gate_up_proj": torch.ones(2, 6, 4)}
    state["experts.down_proj"] = torch.ones(2, 4, 3)
    config = {"hidden_size": 4, "intermediate_size": 3, "num_local_experts": 2, "num_experts_per_tok": 1}
    y = fresh["huggingface.py"]["from_transformers"]("mixtral", state, config)(torch.ones(1, 4))
    # silu(4) * 4 * 3 = 4 / (1 + e^-4) * 12 = 47.1366
    assert_close(y, torch.full((1, 4), 47.1366), rtol=0, atol=1e-4)


# -- growth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "n"), [("mixtral", 1), ("qwen2_moe", 1), ("deepseek_v3", 4)])
def test_a_grown_layer_is_written_as_a_larger_block(kind, n, make_block):
    block, config = make_block(kind)
    layer = from_transformers(kind, block.state_dict(), config)
    layer.freeze([0, 1])
    layer.add_experts(n)
    settings = transformers_config(kind, layer)
    larger, _ = make_block(kind, seed=1, **settings)
    larger.load_state_dict(to_transformers(kind, layer))
    assert len(larger.gate.weight) == len(block.gate.weight) + n
    x = torch.randn(2, 40, D)
    y = layer(x)
    assert_close(larger(x), y, rtol=1e-5, atol=1e-5)
    assert layer.routing is not None
    assert (layer.routing.expert_index >= len(block.gate.weight)).any()  # the new ones work as well
    assert not torch.allclose(block(x), y)


def test_groups_of_unequal_size_cannot_be_written(make_block):
    block, config = make_block("deepseek_v3", n_group=2, topk_group=2)
    layer = from_transformers("deepseek_v3", block.state_dict(), config)
    layer.add_experts(1)
    message = r"2 groups of one size, these groups have \[5, 4\] experts: add or remove experts"
    with pytest.raises(ValueError, match=message):
        to_transformers("deepseek_v3", layer)
    layer.add_experts(1)
    layer.remove([0, 2])
    with pytest.raises(ValueError, match=r"these groups have \[3, 5\]"):
        transformers_config("deepseek_v3", layer)
    layer.remove([7, 9])  # ids 1, 3, 4, 5, 6, 8: gaps, but three in each group
    assert expert_order(layer) == [2, 4, 5, 0, 1, 3]
    smaller, _ = make_block("deepseek_v3", seed=1, **transformers_config("deepseek_v3", layer))
    smaller.load_state_dict(to_transformers("deepseek_v3", layer))
    x = torch.randn(1, 20, D)
    assert_close(smaller(x), layer(x), rtol=1e-5, atol=1e-5)
    layer.router.top_k = 2
    layer.remove([1, 3, 4, 6])
    with pytest.raises(ValueError, match=r"scores a group by its two best experts, these groups have \[1, 1\]"):
        to_transformers("deepseek_v3", layer)


def test_without_groups_a_pool_of_any_size_is_written(make_block):
    block, config = make_block("deepseek_v3", n_group=1, topk_group=1, n_routed_experts=5)
    layer = from_transformers("deepseek_v3", block.state_dict(), config)
    layer.remove([1, 2])
    state = to_transformers("deepseek_v3", layer)
    assert torch.equal(state["gate.weight"], block.gate.weight[[0, 3, 4]])
