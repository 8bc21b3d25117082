"""Upcycled, mixed from branches, and to and from transformers' Mixtral."""

import copy
import dataclasses

import pytest
import torch
from torch.testing import assert_close

import modmoe
from modmoe.language import fit, from_mixtral, generate, language_model, mixed_branches, to_mixtral, upcycled

TEXT = 7 * torch.arange(300) % 19


def tokens_of(*shape):
    return torch.randint(19, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("top_k", [1, 2])
def test_upcycled_starts_as_its_dense_twin(top_k, build):
    dense, x = build("dense"), tokens_of(3, 20)
    fit(dense, TEXT, 3, batch_size=2)
    model = upcycled(dense, 4, top_k)
    assert_close(model.eval()(x), dense.eval()(x), atol=1e-5, rtol=0)
    assert all(layer.pool.num_experts == 4 for layer in model.layers)
    assert not dense.layers
    losses = fit(model, TEXT, 4, batch_size=4, learning_rate=0.01)
    assert losses[-1] < losses[0]
    if top_k == 1:
        gates = 2 * 4 * 16
        assert model.active_parameters() - gates == dense.active_parameters()


def test_upcycling_a_mixture_is_refused(build):
    with pytest.raises(ValueError, match=r"feed_forward"):
        upcycled(build("mixtral"), 4)


def test_branches_are_mixed(build):
    seed, x = build("dense"), tokens_of(2, 20)
    branches = []
    for number in range(3):
        branch = copy.deepcopy(seed)
        fit(branch, TEXT[number * 100 : number * 100 + 100], 2, batch_size=2, seed=number)
        branches.append(branch.eval())
    model = mixed_branches(branches, 2, ["a", "b", "c"])
    assert model.layers[0].pool.tasks() == ("a", "b", "c")
    mean = torch.stack([branch.head.weight for branch in branches]).mean(0)
    assert_close(model.head.weight, mean)
    hidden = torch.randn(4, 16)
    for number, branch in enumerate(branches):
        assert_close(model.layers[1].expert_output(number, hidden), branch.blocks[1].feed_forward(hidden))
    assert_close(mixed_branches([seed] * 3)(x), seed(x), atol=1e-5, rtol=0)
    losses = fit(model, TEXT, 4, batch_size=4, learning_rate=0.01)
    assert losses[-1] < losses[0]


@pytest.fixture
def mixtral():
    """A tiny MixtralForCausalLM with grouped keys and another base of the angles."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=24,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    for parameter in model.parameters():  # norms too: they start at 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def test_mixtral_in_and_out(mixtral):
    x = tokens_of(2, 20)
    expected = mixtral(x).logits
    ours = from_mixtral(mixtral).eval()
    assert_close(ours(x), expected, atol=1e-4, rtol=0)
    back = to_mixtral(ours)
    assert_close(back(x).logits, expected, atol=1e-4, rtol=0)
    state = mixtral.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items())


def test_mixtral_continues_as_transformers_does(mixtral):
    x = tokens_of(1, 6)
    theirs = mixtral.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(from_mixtral(mixtral), x, 12), theirs)


def test_a_preset_that_has_grown_goes_to_transformers(build, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, x = build("mixtral"), tokens_of(2, 20)
    modmoe.freeze(model, [0])
    modmoe.grow(model, 2)
    to_mixtral(model).save_pretrained(tmp_path)
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_local_experts == 6
    assert_close(loaded(x).logits, model(x), atol=1e-4, rtol=0)
    assert_close(from_mixtral(loaded).eval()(x), model(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("switch", {}, "block 0 has SwiGLU"),
        ("moa", {}, "ordinary attention"),
        ("mixtral", {"norm": "layer"}, "needs RMSNorm"),
        ("deepseek", {}, "mixtral needs"),
    ],
)
def test_other_models_do_not_go_to_mixtral(preset, options, message, size):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=message):
        to_mixtral(language_model(preset, dataclasses.replace(size, **options), 4))


def test_settings_of_mixtral_without_a_counterpart(mixtral):
    mixtral.config.sliding_window = 8
    with pytest.raises(ValueError, match="a sliding window of 8 is shorter"):
        from_mixtral(mixtral)
    assert from_mixtral(mixtral, context=8).size.context == 8
    mixtral.config.sliding_window = None
    mixtral.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 500.0}
    with pytest.raises(ValueError, match="'yarn' have no counterpart"):
        from_mixtral(mixtral)
