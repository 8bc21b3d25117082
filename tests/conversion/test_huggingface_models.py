"""Small models of transformers whose sparse blocks become growable layers: equal before, alive after, and back."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import modmoe
from modmoe.conversion.huggingface import Kind, transformers_config
from modmoe.conversion.huggingface_models import (
    GrowableBlock,
    replace_moe_blocks,
    restore_moe_blocks,
    sync_config,
)

KINDS: list[Kind] = ["mixtral", "qwen2_moe", "deepseek_v3"]
GROWTH = {"mixtral": 1, "qwen2_moe": 1, "deepseek_v3": 2}  # deepseek: as many as there are groups
PAD = 0
MakeModel = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def make_model() -> MakeModel:
    """A language model of two layers with random weights; transformers takes seconds to import, so once, and here."""
    from transformers import (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
    )

    shared = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shared |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
    shared |= {"num_experts_per_tok": 2, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}

    def build(kind: Kind, seed: int = 0, **settings) -> nn.Module:
        torch.manual_seed(seed)
        if kind == "mixtral":
            config = MixtralConfig(**{**shared, "intermediate_size": 8, "num_local_experts": 4, **settings})
            return MixtralForCausalLM(config).eval()
        if kind == "qwen2_moe":
            sizes = {"intermediate_size": 24, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 24}
            return Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**shared, **sizes, "num_experts": 4, **settings})).eval()
        sizes = {"intermediate_size": 24, "moe_intermediate_size": 8, "n_routed_experts": 4, "n_group": 2}
        sizes |= {"topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": None, "v_head_dim": 8, "qk_nope_head_dim": 8}
        sizes |= {"qk_rope_head_dim": 4, "first_k_dense_replace": 1}
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**shared, **sizes, **settings})).eval()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1)
        return model

    return build


def tokens(seed: int = 0, batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, 32, (batch, length), generator=torch.manual_seed(seed))


def generated(model: nn.Module) -> list[list[int]]:
    prompt = tokens(1, 2, 4)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0  # padding on the left
    return model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False).tolist()


def blocks(model: nn.Module) -> list[GrowableBlock]:
    return [module for module in model.modules() if isinstance(module, GrowableBlock)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_model_computes_and_generates_what_it_did(kind, make_model):
    model = make_model(kind)
    replaced = copy.deepcopy(model)
    layers = replace_moe_blocks(replaced)
    assert list(layers) == [f"model.layers.{index}.mlp" for index in ((1,) if kind == "deepseek_v3" else (0, 1))]
    assert [block.layer for block in blocks(replaced)] == list(layers.values())
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    with torch.no_grad():
        ours, theirs = (m(tokens(), attention_mask=mask).logits for m in (replaced, model))
    assert theirs.std() > 0.1
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert generated(replaced) == generated(model)
    assert len(set(generated(model)[0])) > 2
    assert len(modmoe.pools(replaced)) == len(layers)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # the name of 5.0 to 6.0
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_grown_model_trains_and_generates(kind, checkpointing, make_model):
    model = make_model(kind)
    replace_moe_blocks(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()

    def step() -> float:
        optimizer.zero_grad()
        loss = model(tokens(2, 8, 16), labels=tokens(2, 8, 16)).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    step()
    modmoe.freeze(model)
    new = modmoe.grow(model, GROWTH[kind])
    modmoe.sync_optimizer(optimizer, model)
    pools = modmoe.pools(model)

    def states(select: Callable[[int, list[int]], bool]) -> list[Tensor]:
        return [
            tensor
            for name, pool in pools.items()
            for expert_id in pool.ids
            if select(expert_id, new[name])
            for key, tensor in pool.expert_state(expert_id).items()
            if not key.endswith("selection_bias")  # it moves by update_router only
        ]

    frozen, grown = states(lambda i, ids: i not in ids), states(lambda i, ids: i in ids)
    losses = [step() for _ in range(8)]
    assert losses[-1] < losses[0] - 0.02
    after = states(lambda i, ids: i not in ids)
    assert all(torch.equal(left, right) for left, right in zip(frozen, after, strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(grown, states(lambda i, ids: i in ids), strict=True)]
    assert len(moved) == 4 * len(pools) * GROWTH[kind]
    assert all(moved)
    model.eval()
    assert len(generated(model)[0]) == 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used_before", [False, True])
def test_router_logits_and_their_loss_are_recorded(kind, used_before, make_model):
    """transformers hooks the modules of its router's class once: before the replacement, or after it."""
    model = make_model(kind)
    replaced = copy.deepcopy(model)
    if used_before:
        replaced(tokens(), output_router_logits=True)
    replace_moe_blocks(replaced)
    theirs = model(tokens(), labels=tokens(), output_router_logits=True)
    for _ in range(2):
        ours = replaced(tokens(), labels=tokens(), output_router_logits=True)
        assert len(ours.router_logits) == len(theirs.router_logits) == len(blocks(replaced))
        for left, right in zip(ours.router_logits, theirs.router_logits, strict=True):
            assert_close(left, right, rtol=1e-5, atol=1e-5)
        assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
        if kind != "deepseek_v3":  # it has no such loss
            assert_close(ours.aux_loss, theirs.aux_loss, rtol=1e-5, atol=1e-5)
    if kind != "deepseek_v3":
        ours.aux_loss.backward()
        theirs.aux_loss.backward()
        theirs_grad = model.model.layers[1].mlp.gate.weight.grad
        assert theirs_grad.abs().max() > 1e-3
        pool = blocks(replaced)[1].layer.pool
        assert_close(pool.growable("gate", "weight").banks()[0][0].grad, theirs_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_theirs_finds_no_logits_in_a_layer_without_a_recorder(kind, make_model):
    """Why a MoELayer does not stand there by itself: transformers' loss takes the first of an empty tuple of logits."""
    model = make_model(kind)
    for name, layer in replace_moe_blocks(model).items():
        model.get_submodule(name.removesuffix(".mlp")).mlp = layer
    assert model(tokens()).logits.shape == (2, 9, 32)
    with pytest.raises(IndexError):
        model(tokens(), labels=tokens(), output_router_logits=True)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_the_balancing_loss_of_a_grown_model_needs_sync_config(kind, make_model):
    model = make_model(kind)
    replace_moe_blocks(model)
    modmoe.grow(model)
    with pytest.raises(RuntimeError, match=r"size of tensor a \(4\) must match"):
        model(tokens(), labels=tokens(), output_router_logits=True)
    written = sync_config(model)
    name = "num_local_experts" if kind == "mixtral" else "num_experts"
    assert (written[name], getattr(model.config, name), model.num_experts) == (5, 5, 5)
    ours = model(tokens(), labels=tokens(), output_router_logits=True)
    restored = copy.deepcopy(model)
    restore_moe_blocks(restored)
    theirs = restored(tokens(), labels=tokens(), output_router_logits=True)
    assert theirs.router_logits[0].shape == (18, 5)
    assert_close(ours.aux_loss, theirs.aux_loss, rtol=1e-5, atol=1e-5)
    assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_bit_by_bit(kind, make_model):
    model = make_model(kind)
    before = copy.deepcopy(model)
    replace_moe_blocks(model)
    assert not any("gate_up_proj" in key for key in model.state_dict())
    restore_moe_blocks(model)
    assert list(model.state_dict()) == list(before.state_dict())
    for key, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(tokens()).logits, before(tokens()).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_grown_model_comes_back_larger_and_can_be_saved(kind, tmp_path, make_model):
    model = make_model(kind)
    replace_moe_blocks(model)
    modmoe.grow(model, GROWTH[kind])
    with torch.no_grad():
        logits = model(tokens()).logits
    restore_moe_blocks(model)
    assert_close(model(tokens()).logits, logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    name = "num_experts" if kind == "qwen2_moe" else "num_local_experts"
    assert getattr(loaded.config, name) == 4 + GROWTH[kind]
    assert len(loaded.model.layers[1].mlp.gate.weight) == 4 + GROWTH[kind]
    assert_close(loaded(tokens()).logits, logits, rtol=1e-5, atol=1e-5)


def test_a_frozen_model_becomes_a_frozen_one_and_back(make_model):
    model = make_model("qwen2_moe").requires_grad_(False)
    layers = replace_moe_blocks(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(layer.pool.frozen_ids == (0, 1, 2, 3) for layer in layers.values())
    once = copy.deepcopy(model)
    restore_moe_blocks(once)
    assert not any(parameter.requires_grad for parameter in once.parameters())
    modmoe.grow(model)
    restore_moe_blocks(model)
    assert all(p.requires_grad == (".mlp." in name) for name, p in model.named_parameters())


def test_dtype_and_mode_are_kept(make_model):
    model = make_model("deepseek_v3").to(torch.bfloat16)
    model.model.layers[1].mlp.gate.float()
    model.train()
    replace_moe_blocks(model)
    (block,) = blocks(model)
    assert block.layer.pool.namespace("expert")["w_in"].dtype == torch.bfloat16
    assert block.layer.pool.namespace("gate")["selection_bias"].dtype == torch.float32
    assert all(module.training for module in model.modules())
    restore_moe_blocks(model)
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert model.model.layers[1].mlp.experts.down_proj.dtype == torch.bfloat16
    assert all(module.training for module in model.modules())


def test_a_replaced_model_is_saved_and_loaded_by_modmoe(tmp_path, make_model):
    model = make_model("mixtral")
    replace_moe_blocks(model)
    modmoe.grow(model)
    modmoe.save_checkpoint(tmp_path / "model.safetensors", model)
    other = make_model("mixtral", seed=1)
    replace_moe_blocks(other)
    modmoe.load_checkpoint(tmp_path / "model.safetensors", other)
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)


def test_layers_that_do_not_agree_change_nothing(make_model):
    model = make_model("mixtral")
    first, _ = replace_moe_blocks(model).values()
    first.add_experts(1)
    with pytest.raises(ValueError, match="one config serves all blocks, but they need"):
        restore_moe_blocks(model)
    assert len(blocks(model)) == 2
    assert (model.config.num_local_experts, model.num_experts) == (4, 4)
    assert transformers_config("mixtral", first)["num_local_experts"] == 5


def test_groups_of_unequal_size_change_nothing(make_model):
    model = make_model("deepseek_v3")
    replace_moe_blocks(model)
    modmoe.grow(model)
    recorded = model(tokens(), output_router_logits=True).router_logits
    assert recorded[0].shape == (18, 5)  # the model itself works
    with pytest.raises(ValueError, match=r"2 groups of one size, these groups have \[3, 2\]"):
        restore_moe_blocks(model)
    assert len(blocks(model)) == 1
    assert model.config.n_routed_experts == 4


def test_models_without_blocks(make_model):
    with pytest.raises(ValueError, match="Linear contains none of"):
        replace_moe_blocks(nn.Linear(2, 2))
    model = make_model("mixtral")
    for function in (restore_moe_blocks, sync_config):
        with pytest.raises(ValueError, match="contains no growable block: call replace_moe_blocks first"):
            function(model)


def test_a_refused_block_leaves_the_model_as_it_was(make_model):
    model = make_model("mixtral", hidden_act="gelu")
    before = list(model.modules())
    with pytest.raises(ValueError, match="hidden_act='gelu' has no counterpart"):
        replace_moe_blocks(model)
    assert list(model.modules()) == before
