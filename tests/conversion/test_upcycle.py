"""Sparse upcycling: what is recognised, that the model computes what it did, and that it can be trained and grown."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torchvision.models import SwinTransformer, VisionTransformer

from modmoe import DenseRouter, MoELayer, TopKRouter, grow, pools, sync_optimizer
from modmoe.conversion import SwiGLU, upcycle

D, H = 6, 10
TRANSFORMER = {"d_model": D, "nhead": 2, "dim_feedforward": H, "dropout": 0.0, "batch_first": True}


class Llama(nn.Module):
    """Two hand-written layers of attention and SwiGLU, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(D),
                    "attention": nn.MultiheadAttention(D, 2, batch_first=True),
                    "ffn": SwiGLU(D, H),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(D, 3)

    def forward(self, x):
        for block in self.blocks:
            y = block["norm"](x)
            x = x + block["attention"](y, y, y, need_weights=False)[0]
            x = x + block["ffn"](x)
        return self.head(x)


def vit():
    return VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=3)


def swin():
    return SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], stochastic_depth_prob=0.0, num_classes=3)


MODELS = {
    "vit": (vit, r"encoder\.layers\..*\.mlp", 2, lambda: torch.randn(3, 3, 8, 8)),
    "swin": (swin, r"features\..*\.mlp", 2, lambda: torch.randn(2, 3, 16, 16)),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**TRANSFORMER), 2),
        r"layers\.\d+",
        2,
        lambda: torch.randn(3, 4, D),
    ),
    "llama": (Llama, r".*\.ffn", 2, lambda: torch.randn(3, 4, D)),
}


def build(name: str) -> tuple[nn.Module, str, int, torch.Tensor]:
    torch.manual_seed(0)
    make, select, num_blocks, data = MODELS[name]
    model = make()
    for parameter in model.parameters():  # some start at zero: the head of the ViT, biases
        nn.init.normal_(parameter, std=0.3)
    return model, select, num_blocks, data()


# -- the model computes what it did ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_what_it_did(name, top_k, training):
    model, select, num_blocks, x = build(name)
    model.train(training)
    before = model(x).detach()
    assert before.std() > 0.01
    layers = upcycle(model, select, num_experts=3, top_k=top_k)
    assert len(layers) == num_blocks
    assert all(model.get_submodule(path) is layer for path, layer in layers)
    assert all(module.training == training for module in model.modules())
    after = model(x)
    assert all(layer.routing.choices.shape[1] == top_k for _, layer in layers)
    assert_close(after, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_weights_that_do_not_add_up_to_one_change_the_output(top_k):
    model, select, _, x = build("llama")
    dense = copy.deepcopy(model)
    layers = upcycle(
        model, select, 3, make_router=lambda d: TopKRouter(d, top_k, order="softmax_topk", renormalize=False)
    )
    assert (model(x) - dense(x)).abs().max() > 1e-2
    # the first layer by itself: its weights add up to s < 1, and so its output is s times the block's
    block, layer = dense.blocks[0]["ffn"], layers[0][1]
    expected = layer.route(x).matrix().sum(1).view(3, 4, 1)
    assert 0.0 < expected.min() < expected.max() < 1.0
    assert_close(layer(x), expected * block(x), atol=1e-6, rtol=1e-5)


def test_copies_by_hand():
    block = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        block[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        block[0].bias.copy_(torch.tensor([0.0, 1.0]))
        block[2].weight.copy_(torch.tensor([[2.0, 3.0]]))
        block[2].bias.fill_(8.0)
    model = nn.Sequential(block)
    ((_, layer),) = upcycle(model, "0", 2)
    for expert_id in layer.pool.ids:
        state = layer.pool.expert_state(expert_id)
        assert state["expert.w_in"].tolist() == [[[1.0, -1.0]]]
        assert state["expert.w_out"].tolist() == [[[2.0], [3.0]]]
    # x = 2: relu(2) * 2 + relu(-2 + 1) * 3 + 8 = 12; x = -1: 0 * 2 + relu(1 + 1) * 3 + 8 = 14
    assert_close(model(torch.tensor([[2.0], [-1.0]])), torch.tensor([[12.0], [14.0]]))


def test_the_router_is_fresh():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(200, 4), nn.GELU(), nn.Linear(4, 200)))
    ((_, layer),) = upcycle(model, "0", 50)
    gate = layer.pool.namespace("gate")["weight"]
    # 10,000 draws: the standard error of the standard deviation is 0.02 / sqrt(20,000) = 0.00014
    assert gate.std().item() == pytest.approx(0.02, abs=0.0007)


# -- torch's own transformer layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu, nn.GELU(approximate="tanh")])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_with_padding(activation, batch_first, norm_first, grad):
    torch.manual_seed(0)
    options = {**TRANSFORMER, "batch_first": batch_first, "norm_first": norm_first, "activation": activation}
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(**options), 2)
    x = torch.randn(3, 5, D)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])  # left aligned, as nested tensors need
    given = x if batch_first else x.transpose(0, 1)
    new = copy.deepcopy(model)
    layers = upcycle(new, r"layers\.\d", 3)
    assert [path for path, _ in layers] == ["layers.0.linear1", "layers.1.linear1"]
    for training in (True, False):
        for mask in (None, padding):
            fused = not isinstance(activation, nn.GELU)  # torch's fused path takes the exact gelu for any nn.GELU
            torch.backends.mha.set_fastpath_enabled(fused)
            with torch.set_grad_enabled(grad):
                expected = model.train(training)(given, src_key_padding_mask=mask)
                torch.backends.mha.set_fastpath_enabled(True)
                found = new.train(training)(given, src_key_padding_mask=mask)
            if not batch_first:
                expected, found = expected.transpose(0, 1), found.transpose(0, 1)
            real = torch.ones_like(padding) if mask is None else ~padding  # the fused path writes zeros into padding
            assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
            assert layers[1][1].routing.num_tokens == 15


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_one_layer_in_the_middle_of_an_encoder():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(**TRANSFORMER), 3).eval()
    padding = torch.arange(4) >= torch.tensor([[4], [2]])
    x = torch.randn(2, 4, D)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        upcycle(model, r"layers\.1", 2)
        assert_close(model(x, src_key_padding_mask=padding)[~padding], expected[~padding], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_a_layer_that_is_the_model(kind):
    torch.manual_seed(0)
    model = kind(**TRANSFORMER).eval()
    inputs = [torch.randn(2, 3, D)] * (1 if kind is nn.TransformerEncoderLayer else 2)
    with torch.no_grad():
        before = model(*inputs)
        ((path, layer),) = upcycle(model, lambda name, module: module is model, 2)
        assert path == "linear1"
        assert_close(model(*inputs), before, atol=1e-5, rtol=1e-5)
        assert layer.routing is not None  # it was called: no fused path went round it


def test_a_transformer_layer_keeps_its_output_dropout():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(**{**TRANSFORMER, "dropout": 0.5}), 1)
    with pytest.raises(ValueError, match=r"'layers.0' has dropout of 0.5 before its last linear layer"):
        upcycle(model, r"layers\.0", 2)
    assert isinstance(model.layers[0].linear1, nn.Linear)
    upcycle(model, r"layers\.0", 2, omit_inner_dropout=True)
    assert model.layers[0].dropout2.p == 0.5
    zeros = (model.layers[0]._ff_block(torch.randn(50, 40, D)) == 0).double().mean()
    assert zeros.item() == pytest.approx(0.5, abs=0.03)  # 12,000 draws: a standard error of 0.005


# -- selection ---------------------------------------------------------------------------------------------------------


class Changed(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return 2 * super()._ff_block(x)


def test_selection():
    def block():
        return nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))

    model = nn.ModuleDict({"a": block(), "ab": block()})
    assert [path for path, _ in upcycle(copy.deepcopy(model), "a", 2)] == ["a"]  # the whole name
    assert [path for path, _ in upcycle(copy.deepcopy(model), "a.?", 2)] == ["a", "ab"]
    with pytest.raises(ValueError, match=r"'mlp' matches none of the modules \['a', 'a.0'"):
        upcycle(model, "mlp", 2)
    with pytest.raises(ValueError, match="nothing is selected of the modules"):
        upcycle(model, lambda name, module: False, 2)
    with pytest.raises(ValueError, match="'0' stands inside '', and both are selected"):
        upcycle(nn.Sequential(block()), ".?", 2)
    with pytest.raises(ValueError, match="the model itself is selected"):
        upcycle(block(), "", 2)
    with pytest.raises(ValueError, match="noise must be at least 0, got -1"):
        upcycle(model, "a", 2, noise=-1)
    with pytest.raises(ValueError, match="top_k=2 experts cannot be chosen out of 1"):
        upcycle(model, "a", 1)
    with pytest.raises(ValueError, match=r"'0' is no feed-forward block .*: it has parameters beyond"):
        upcycle(nn.Sequential(Changed(**TRANSFORMER)), "0", 2)
    assert isinstance(model["a"], nn.Sequential)


def test_a_block_in_two_places_becomes_one_layer():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
    model = nn.Sequential(block, nn.Tanh(), block)
    x = torch.randn(3, D)
    before = model(x)
    ((path, layer),) = upcycle(model, "2", 2)
    assert path == "2"
    assert model[0] is model[2] is layer
    assert_close(model(x), before, atol=1e-5, rtol=1e-5)


# -- noise, dtype, training, growth ------------------------------------------------------------------------------------


def test_noise_parts_the_copies():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(100, 100), nn.GELU(), nn.Linear(100, 100))
    model = nn.Sequential(block)
    ((_, layer),) = upcycle(model, "0", 4, noise=0.1)
    rows = layer.pool.namespace("expert")
    difference = rows["w_in"] - block[0].weight.T
    # 10,000 draws each: a relative standard error of 1 / sqrt(20,000) = 0.7%
    for one in difference:
        assert (one.std() / block[0].weight.std()).item() == pytest.approx(0.1, rel=0.04)
    assert torch.corrcoef(difference.flatten(1)).triu(1).abs().max() < 0.05
    assert torch.equal(rows["b_in"], block[0].bias.expand(4, 100))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_device(dtype):
    block = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)).to(dtype)
    model = nn.Sequential(block)
    x = torch.randn(3, D, dtype=dtype)
    before = block(x)
    ((_, layer),) = upcycle(model, "0", 2, make_router=DenseRouter)
    assert {tensor.dtype for tensor in layer.parameters()} == {dtype}
    y = model(x)
    assert y.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    assert_close(y, before, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
def test_on_a_gpu():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(**TRANSFORMER), 2).cuda().eval()
    x = torch.randn(3, 4, D, device="cuda")
    with torch.no_grad():
        before = model(x)
        upcycle(model, r"layers\.\d", 3)
        assert {tensor.device.type for tensor in model.parameters()} == {"cuda"}
        assert_close(model(x), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_chosen_expert_and_the_router(name, top_k):
    model, select, _, x = build(name)
    layers = upcycle(model, select, 3, top_k=top_k, noise=0.1)
    outputs = []  # of all tokens: the ViT's head reads one
    (model.encoder if name == "vit" else model).register_forward_hook(lambda _m, _x, y: outputs.append(y))
    model(x)
    outputs[0].square().sum().backward()
    for _, layer in layers:
        chosen = set(layer.routing.choices.flatten().tolist())
        for row in layer.pool.namespace("expert"):
            gradient = layer.pool.growable("expert", row).banks()[0][0].grad
            assert {e for e in range(3) if gradient[e].abs().max() > 0} == chosen
        gate = layer.pool.growable("gate", "weight").banks()[0][0].grad
        assert gate.abs().max() > 0


@pytest.mark.parametrize("name", MODELS)
def test_an_upcycled_model_grows_saves_loads_and_learns(name):
    model, select, _, x = build(name)
    upcycle(model, select, 2, noise=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    new_ids = grow(model, 2, task="new")
    assert set(new_ids) == set(pools(model))
    assert all(ids == [2, 3] for ids in new_ids.values())
    for pool in pools(model).values():
        pool.freeze([0])
    sync_optimizer(optimizer, model)
    losses = []
    for _ in range(15):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    other, _, _, _ = build(name)
    upcycle(other, select, 2)
    other.load_state_dict(model.state_dict())
    assert [pool.ids for pool in pools(other).values()] == [(0, 1, 2, 3)] * len(new_ids)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_seeded_it_repeats_itself():
    def once():
        model, select, _, x = build("vit")
        upcycle(model, select, 3, noise=0.2)
        return model(x)

    assert torch.equal(once(), once())


def test_the_layers_are_moe_layers():
    model, select, _, _ = build("vit")
    dense = copy.deepcopy(model)
    upcycle(model, select, 3)
    for name, _ in dense.named_modules():
        if name.endswith(".mlp"):
            assert isinstance(model.get_submodule(name), MoELayer)
    kept = [name for name in dense.state_dict() if ".mlp." not in name]
    assert all(torch.equal(model.state_dict()[name], dense.state_dict()[name]) for name in kept)
