"""Conversion of torchvision's and timm's ViT and Swin models, and of weights from a file."""

import copy
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close
from torchvision.models import SwinTransformer, VisionTransformer

import modmoe
from modmoe import VMoERouter
from modmoe.analysis import usage_metrics
from modmoe.errors import MissingExtraError
from modmoe.vision import ViT, carry_balancing_losses, load_backbone, moe_layers, to_moe, transformer_blocks


def vit(depth=4):
    return VisionTransformer(8, 4, num_layers=depth, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=3)


def swin():
    return SwinTransformer([2, 2], 8, [1, 3], [2, 2], [2, 2], stochastic_depth_prob=0.0, num_classes=3)


class Mlp(nn.Module):
    """A feed-forward block with timm's names and dropouts."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(12, 8), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class TimmBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(8), nn.Linear(8, 8)
        self.norm2, self.mlp = nn.LayerNorm(8), Mlp()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmLike(nn.Module):
    """Blocks in stages, as in timm's Swin, and a pooling head whose ``mlp`` stands beside no ``attn``."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"blocks": nn.Sequential(*(TimmBlock() for _ in range(n)))}) for n in (1, 3)
        )
        self.attn_pool = nn.ModuleDict({"mlp": Mlp()})

    def forward(self, x):
        for stage in self.layers:
            x = stage["blocks"](x)
        return self.attn_pool["mlp"](x.mean(1))


MODELS = {
    "vit": (vit, lambda: torch.randn(3, 3, 8, 8), "encoder.layers.encoder_layer_{}.mlp", (1, 3)),
    "swin": (swin, lambda: torch.randn(2, 3, 16, 16), "features.{}.mlp", ("3.0", "3.2")),
    "timm": (TimmLike, lambda: torch.randn(3, 5, 8), "layers.{}.mlp", ("1.blocks.0", "1.blocks.2")),
}


def build(name):
    torch.manual_seed(0)
    make, data, path, chosen = MODELS[name]
    model = make()
    for parameter in model.parameters():  # some start at zero
        nn.init.normal_(parameter, std=0.3)
    return model.eval(), data(), [path.format(block) for block in chosen]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_what_it_did(name, top_k):
    model, x, names = build(name)
    before = model(x)
    layers = to_moe(model, "last-2", num_experts=3, top_k=top_k)
    # Swin's stages have 1 and 3 blocks: of the four, counted through, 1 and 3 are the second stage's first and last
    assert [path for path, _ in layers] == names
    after = model(x)
    assert all(layer.routing.choices.shape[1] == top_k for _, layer in layers)
    assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert all(usage_metrics(layer.routing)["dropped_fraction"] == 0.0 for layer in moe_layers(model).values())


@pytest.mark.parametrize(("blocks", "expected"), [("every-2", (1, 3)), ("all", (0, 1, 2, 3)), ([2], (2,))])
def test_patterns(blocks, expected):
    model = vit()
    names = transformer_blocks(model)
    assert [path for path, _ in to_moe(model, blocks, 2)] == [names[position] for position in expected]


def test_our_own_dense_vit():
    model = ViT(8, 4, 3, 8, 4, 2, 12).eval()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    assert [path for path, _ in to_moe(model)] == ["blocks.1.mlp", "blocks.3.mlp"]
    assert_close(model(x), before, atol=1e-5, rtol=1e-5)


def test_routers_by_name_and_by_function():
    model = vit()
    ((_, layer),) = to_moe(model, [0], 4, router="expert_choice")
    assert isinstance(layer.router, modmoe.ExpertChoiceRouter)
    ((_, layer),) = to_moe(model, [1], 4, router=lambda features: VMoERouter(features, 1))
    assert layer.router.top_k == 1
    with pytest.raises(ValueError, match="unknown router 'switchh'; did you mean 'switch'"):
        to_moe(model, [2], 4, router="switchh")


def test_a_converted_model_learns_grows_and_freezes():
    model, x, _ = build("vit")
    to_moe(model, num_experts=2, noise=0.01)
    carry_balancing_losses(model, 0.01)
    modmoe.freeze(model, [0, 1])
    modmoe.grow(model, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    frozen = [pool.expert_state(0) for pool in modmoe.pools(model).values()]
    model.train()
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < losses[0]
    for old, pool in zip(frozen, modmoe.pools(model).values(), strict=True):
        assert all(torch.equal(old[row], now) for row, now in pool.expert_state(0).items())


# -- weights -----------------------------------------------------------------------------------------------------------


def test_weights_from_a_file_reach_the_experts(tmp_path):
    torch.manual_seed(0)
    trained = load_backbone("torchvision", "swin_t", num_classes=5)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    model = load_backbone("torchvision", "swin_t", tmp_path / "weights.pth", num_classes=5)
    to_moe(model, [11], num_experts=2)
    x = torch.randn(1, 3, 32, 32)
    assert_close(model.eval()(x), trained.eval()(x), atol=1e-4, rtol=1e-4)


def test_weights_in_safetensors(tmp_path):
    path = tmp_path / "weights.safetensors"
    state = load_backbone("torchvision", "squeezenet1_1", num_classes=2).state_dict()
    save_file(state, path)
    loaded = load_backbone("torchvision", "squeezenet1_1", path, num_classes=2).state_dict()
    assert all(torch.equal(state[name], loaded[name]) for name in state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_backbone("torchvision", "squeezenet1_1", path, num_classes=3)


def test_a_converted_and_grown_model_is_loaded_into_a_converted_one():
    model, x, _ = build("vit")
    to_moe(model, num_experts=2)
    modmoe.grow(model, 1)
    fresh = vit().eval()
    to_moe(fresh, num_experts=2)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_bad_input(tmp_path, monkeypatch):
    model, _, _ = build("vit")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="unknown block pattern 'second-half'"):
        to_moe(model, "second-half")
    with pytest.raises(ValueError, match="'last-3' does not fit a model of 4 blocks"):
        to_moe(model, "last-3")
    with pytest.raises(ValueError, match="top_k=2 experts cannot be chosen out of 1"):
        to_moe(model, num_experts=1)
    assert model.state_dict().keys() == before.keys()
    with pytest.raises(ValueError, match="Sequential has no transformer blocks"):
        to_moe(nn.Sequential(nn.Linear(2, 2)))
    dropped = VisionTransformer(8, 4, 2, 2, 8, 12, dropout=0.1)
    with pytest.raises(ValueError, match="omit_inner_dropout=True"):
        to_moe(dropped, "all")
    with pytest.raises(ValueError, match="source is 'torchvision' or 'timm', got 'hub'"):
        load_backbone("hub", "vit")
    with pytest.raises(ValueError, match="Unknown model vit_z_1"):
        load_backbone("torchvision", "vit_z_1")
    with pytest.raises(FileNotFoundError, match=r"no weights at .*none\.pth"):
        load_backbone("torchvision", "swin_t", tmp_path / "none.pth")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match="pip install timm"):
        load_backbone("timm", "vit_tiny_patch16_224")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_timm_s_own_models(name):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = load_backbone("timm", name, num_classes=5).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = model(x)
        layers = to_moe(model, "last-2", num_experts=4)
        after = model(x)
    assert len(layers) == 2
    assert before.std() > 1e-3
    assert_close(after, before, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_vit_b_16_computes_what_it_did():
    torch.manual_seed(0)
    model = load_backbone("torchvision", "vit_b_16").eval()
    nn.init.normal_(model.heads.head.weight, std=0.1)  # it starts at zero, which would hide everything
    x = torch.randn(2, 3, 224, 224)
    start = time.perf_counter()
    with torch.no_grad():
        before = model(x)
        layers = to_moe(model, "every-2", num_experts=4)
        after = model(x)
    difference = float((after - before).abs().max())
    print(f"vit_b_16, {len(layers)} of 12 blocks: differs by {difference:.1e}, {time.perf_counter() - start:.0f} s")
    assert len(layers) == 6
    assert before.std() > 0.1
    assert difference < 1e-4
