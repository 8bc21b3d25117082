"""What from_transformers and to_transformers refuse, before anything is built; without transformers."""

import pytest
import torch
from torch import Tensor, nn

import modmoe.conversion.huggingface as huggingface
from modmoe import DeepSeekV3Router, ExpertPool, MLPExpert, MoELayer, NoisyTopKRouter, SwiGLUExpert, TopKRouter
from modmoe.conversion.huggingface import SharedSwiGLU, from_transformers, to_transformers, transformers_config
from modmoe.gating.capacity import Capacity

D, H = 16, 8


def layer_with(expert=None, router=None, shared=None) -> MoELayer:
    return MoELayer(ExpertPool(expert or SwiGLUExpert(D, H), 4), router or TopKRouter(D, 2), shared_expert=shared)


def unequal() -> MoELayer:
    layer = layer_with()
    layer.add_experts(1, hidden_features=3)
    return layer


@pytest.fixture
def mixtral(monkeypatch) -> tuple[dict[str, Tensor], dict]:
    """A state dict and a config that fit; building anything from them is an error."""

    def build(*args, **kwargs):
        raise AssertionError("something was built")

    layer = layer_with()
    monkeypatch.setattr(huggingface, "ExpertPool", build)
    return to_transformers("mixtral", layer), transformers_config("mixtral", layer)


def test_the_state_dict_of_the_refusals_fits(mixtral):
    with pytest.raises(AssertionError, match="something was built"):
        from_transformers("mixtral", *mixtral)


def test_keys_that_do_not_fit_are_listed_before_anything_is_built(mixtral):
    state, config = mixtral
    down = state.pop("experts.down_proj")
    state |= {"experts.down_proj_scale": down, "shared_expert.up_proj.weight": down}
    message = (
        r"missing \['experts\.down_proj'\]; "
        r"unknown \['experts\.down_proj_scale', 'shared_expert\.up_proj\.weight'\]"
    )
    with pytest.raises(ValueError, match=message):
        from_transformers("mixtral", state, config)
    message = r"under 'model\.' do not fit: missing \['experts\.down_proj', .*'gate\.weight'\]; unknown \[\]"
    with pytest.raises(ValueError, match=message):
        from_transformers("mixtral", state, config, prefix="model.")


def test_experts_that_are_missing_or_too_many_are_listed(mixtral):
    state, config = mixtral
    apart = to_transformers("mixtral", layer_with(), layout="per_expert")
    del apart["experts.2.w3.weight"]
    with pytest.raises(ValueError, match=r"missing \['experts\.2\.w3\.weight'\]; unknown \[\]"):
        from_transformers("mixtral", apart, config)
    both = {
        **to_transformers("mixtral", layer_with(), layout="per_expert"),
        "experts.gate_up_proj": state["experts.gate_up_proj"],
    }
    with pytest.raises(ValueError, match=r"missing \[\]; unknown \['experts\.gate_up_proj'\]"):
        from_transformers("mixtral", both, config)
    many = {**state, **{f"more.{index}": state["gate.weight"] for index in range(15)}}
    with pytest.raises(ValueError, match=r"unknown \['more\.0', 'more\.1', 'more\.10', .*\] and 3 more"):
        from_transformers("mixtral", many, config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_size", 12, r"'gate\.weight \(4, 16\), not \(4, 12\)'"),
        ("intermediate_size", 12, r"'experts\.gate_up_proj \(4, 16, 16\), not \(4, 24, 16\)'"),
        ("num_local_experts", 5, r"'experts\.down_proj \(4, 16, 8\), not \(5, 16, 8\)'"),
        ("num_local_experts", None, r"the config lacks \['num_local_experts'\]"),
        ("num_experts_per_tok", 5, "top_k=5 experts cannot be chosen out of 4"),
        ("hidden_act", "gelu", "hidden_act='gelu' has no counterpart here, only 'silu' has"),
    ],
)
def test_configs_that_do_not_fit(name, value, message, mixtral):
    state, config = mixtral
    with pytest.raises(ValueError, match=message):
        from_transformers("mixtral", state, {**config, name: value})


def test_kinds_of_config_and_block_that_do_not_fit(mixtral):
    with pytest.raises(ValueError, match=r"unknown kind 'llama', choose one of \['deepseek_v3', 'mixtral'"):
        from_transformers("llama", *mixtral)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"the config lacks \['num_experts', 'moe_intermediate_size', 'norm_topk_prob'"
    ):
        from_transformers("qwen2_moe", *mixtral)


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ({"experts.down_proj": torch.bfloat16}, r"all but the gate, got \['torch\.bfloat16', 'torch\.float32'\]"),
        ({"experts.down_proj": torch.float8_e4m3fn, "experts.gate_up_proj": torch.float8_e4m3fn}, "float8_e4m3fn"),
        ({"gate.weight": torch.int64}, r"the gate \['torch\.int64'\]"),
        ({"gate.weight": torch.float64}, "experts in torch.float32 cannot be scored by a gate in torch.float64"),
    ],
)
def test_dtypes_that_do_not_fit(dtypes, message, mixtral):
    state, config = mixtral
    with pytest.raises(ValueError, match=message):
        from_transformers("mixtral", {**state, **{key: state[key].to(some) for key, some in dtypes.items()}}, config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_group": 3}, r"3 groups of one size, these groups have \[3, 3, 2\] experts"),
        ({"n_group": 8, "topk_group": 3}, "scores a group by its two best experts"),
        ({"topk_group": 5}, "1 <= top_groups <= num_groups is needed, got 5 and 4"),
        ({"n_shared_experts": 3}, r"'shared_experts\.gate_proj\.weight \(16, 16\), not \(24, 16\)'"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' has no counterpart here"),
    ],
)
def test_deepseek_configs_that_do_not_fit(settings, message):
    router = DeepSeekV3Router(D, 3, num_groups=4, top_groups=2)
    layer = MoELayer(ExpertPool(SwiGLUExpert(D, H), 8), router, shared_expert=SharedSwiGLU(D, 2 * H))
    state, config = to_transformers("deepseek_v3", layer), transformers_config("deepseek_v3", layer)
    assert torch.equal(from_transformers("deepseek_v3", state, config)(torch.ones(2, D)), layer(torch.ones(2, D)))
    with pytest.raises(ValueError, match=message):
        from_transformers("deepseek_v3", state, {**config, **settings})


@pytest.mark.parametrize(
    ("kind", "build", "message"),
    [
        ("mixtral", lambda: layer_with(MLPExpert(D, H)), "needs SwiGLU experts without biases"),
        ("mixtral", lambda: layer_with(SwiGLUExpert(D, H, bias=True)), "needs SwiGLU experts without biases"),
        ("mixtral", lambda: layer_with(SwiGLUExpert(D, H, D + 1)), "from D to D features"),
        ("mixtral", unequal, r"experts of one hidden size, these have \[3, 8\]"),
        ("mixtral", lambda: layer_with(router=NoisyTopKRouter(D, 2)), "needs a TopKRouter .*, got NoisyTopKRouter"),
        ("mixtral", lambda: layer_with(router=TopKRouter(D, 2, capacity=Capacity(1.0))), "without a capacity limit"),
        ("mixtral", lambda: layer_with(router=TopKRouter(D, 1)), "needs a TopKRouter with renormalize=True"),
        ("mixtral", lambda: layer_with(shared=SharedSwiGLU(D, H)), "needs no shared expert, got SharedSwiGLU"),
        ("qwen2_moe", layer_with, "needs a GatedSharedExpert, got NoneType"),
        ("qwen2_moe", lambda: layer_with(shared=SharedSwiGLU(D, H)), "needs a GatedSharedExpert, got SharedSwiGLU"),
        ("deepseek_v3", lambda: layer_with(shared=nn.Linear(D, D)), "a SharedSwiGLU as shared expert, got Linear"),
        ("deepseek_v3", lambda: layer_with(shared=SharedSwiGLU(D, H)), "needs a DeepSeekV3Router"),
        (
            "deepseek_v3",
            lambda: layer_with(router=DeepSeekV3Router(D, 2), shared=SharedSwiGLU(D, 12)),
            "a multiple of the experts' hidden size 8 is needed, got 12",
        ),
    ],
)
def test_layers_that_transformers_has_no_block_for(kind, build, message):
    with pytest.raises(ValueError, match=message):
        to_transformers(kind, build())


def test_bad_arguments():
    with pytest.raises(ValueError, match="layout is 'fused' or 'per_expert', got 'flat'"):
        to_transformers("mixtral", layer_with(), layout="flat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown kind 'llama'"):
        to_transformers("llama", layer_with())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every size must be at least 1, got 4 and 0"):
        SharedSwiGLU(4, 0)
