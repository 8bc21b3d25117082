"""Feed-forward blocks: what is recognised as an expert, by its values, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from modmoe import MLPExpert, SwiGLUExpert
from modmoe.conversion import upcycle
from modmoe.conversion.feed_forward import ACTIVATION_MODULES, read_feed_forward
from modmoe.experts.base import ACTIVATIONS

D, H = 6, 10


class Named(nn.Module):
    """A block whose layers have the names of timm, GPT-2 or whatever is given."""

    def __init__(self, first: str, last: str, act: nn.Module, bias: bool = True, out_dropout: float = 0.0):
        super().__init__()
        self.add_module(last, nn.Linear(H, D, bias))  # registered in the other order than they are called
        self.add_module(first, nn.Linear(D, H, bias))
        self.act = act
        self.dropout = nn.Dropout(out_dropout)
        self.names = (first, last)

    def forward(self, x):
        first, last = (getattr(self, name) for name in self.names)
        return self.dropout(last(self.act(first(x))))


class Written(nn.Module):
    """A block with a rule of its own for what happens between and after its two layers."""

    def __init__(self, between=F.gelu, after=None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)
        self.between, self.after = between, after

    def forward(self, x):
        y = self.fc2(self.between(self.fc1(x)))
        return y if self.after is None else self.after(self, x, y)


# -- what is recognised ------------------------------------------------------------------------------------------------


def test_every_activation_has_a_module():
    assert set(ACTIVATION_MODULES) == set(ACTIVATIONS)
    x = torch.linspace(-5, 5, 101)
    for name, make in ACTIVATION_MODULES.items():
        assert torch.equal(make()(x), ACTIVATIONS[name](x))


def test_gelu_tanh_by_hand():
    # x = 1: 0.5 (1 + tanh(sqrt(2 / pi) 1.044715)) = 0.5 (1 + tanh(0.8335595)) = 0.8411920, and Phi(1) = 0.8413447
    assert ACTIVATIONS["gelu_tanh"](torch.tensor(1.0)).item() == pytest.approx(0.8411920, abs=1e-6)
    assert ACTIVATIONS["gelu"](torch.tensor(1.0)).item() == pytest.approx(0.8413447, abs=1e-6)


ACTS = [
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (NewGELUActivation(), "gelu_tanh"),
    (nn.ReLU(inplace=True), "relu"),
    (nn.SiLU(), "silu"),
    (nn.Tanh(), "tanh"),
]


@pytest.mark.parametrize(("act", "name"), ACTS, ids=lambda a: str(a).strip("()"))
@pytest.mark.parametrize("names", [("fc1", "fc2"), ("c_fc", "c_proj")])
@pytest.mark.parametrize("bias", [True, False])
def test_named_blocks(act, name, names, bias):
    torch.manual_seed(0)
    block = Named(*names, act, bias).double()
    model = nn.ModuleDict({"mlp": block})
    x = torch.randn(4, D, dtype=torch.float64)
    before = block(x.clone())
    ((_, layer),) = upcycle(model, "mlp", 2)
    assert isinstance(layer.pool.expert, MLPExpert)
    assert (layer.pool.expert.activation, layer.pool.expert.bias) == (name, bias)
    assert set(layer.pool.namespace("expert")) == ({"w_in", "b_in", "w_out", "b_out"} if bias else {"w_in", "w_out"})
    assert_close(model["mlp"](x), before, atol=1e-12, rtol=1e-12)


def test_a_gelu_is_never_taken_for_the_other():
    # on small inputs the two differ by less than float32 shows, and a last layer of zeros would hide even that
    for approximate, name in (("none", "gelu"), ("tanh", "gelu_tanh")):
        block = nn.Sequential(nn.Linear(D, H), nn.GELU(approximate), nn.Linear(H, D))
        for parameter in block.parameters():
            nn.init.zeros_(parameter)
        assert read_feed_forward("block", block).expert.activation == name


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.LeakyReLU(), nn.ELU(), nn.Hardswish(), nn.Identity(), nn.Sigmoid()])
def test_other_activations_are_refused(act):
    model = nn.Sequential(nn.Sequential(nn.Linear(D, H), act, nn.Linear(H, D)))
    with pytest.raises(ValueError, match=r"'0' is no feed-forward block .* no activation gives what it computes"):
        upcycle(model, "0", 2)


def test_a_written_activation_and_gpt2_s_transposed_layers():
    torch.manual_seed(0)
    block = Written(lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)))
    assert read_feed_forward("block", block).expert.activation == "gelu"
    block.fc1, block.fc2 = Conv1D(H, D), Conv1D(D, H)
    model = nn.ModuleDict({"mlp": block})
    x = torch.randn(4, D)
    before = block(x)
    upcycle(model, "mlp", 2)
    assert_close(model["mlp"](x), before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_swiglu_s_roles_are_found_whatever_their_order(bias):
    class Mixtral(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(D, D, bias), nn.Linear(D, D, bias), nn.Linear(D, D, bias)

        def forward(self, x):
            return self.w2(F.silu(self.w1(x)) * self.w3(x))

    torch.manual_seed(0)
    model = nn.ModuleDict({"ffn": Mixtral()})  # square: no size tells the three apart
    x = torch.randn(4, D)
    before, w1 = model["ffn"](x), model["ffn"].w1.weight
    ((_, layer),) = upcycle(model, "ffn", 2)
    assert isinstance(layer.pool.expert, SwiGLUExpert)
    assert torch.equal(layer.pool.expert_state(0)["expert.w_gate"][0], w1.T)
    assert_close(model["ffn"](x), before, atol=1e-6, rtol=1e-6)


def test_a_single_missing_bias_is_zero():
    block = nn.Sequential(nn.Linear(D, H, bias=False), nn.GELU(), nn.Linear(H, D))
    model = nn.Sequential(block)
    ((_, layer),) = upcycle(model, "0", 2)
    assert torch.equal(layer.pool.expert_state(1)["expert.b_in"], torch.zeros(1, H))
    assert torch.equal(layer.pool.expert_state(1)["expert.b_out"][0], block[2].bias)


def test_an_mlp_expert_without_biases():
    expert = MLPExpert(2, 3, activation="relu", bias=False)
    assert set(expert.row_specs()) == {"w_in", "w_out"}
    assert expert.output_rows == ("w_out",)


def test_output_dropout_stays():
    torch.manual_seed(0)
    for block in (
        Named("fc1", "fc2", nn.GELU(), out_dropout=0.5),
        nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Dropout(0.0), nn.Linear(H, D), nn.Dropout(0.5)),
    ):
        model = nn.ModuleDict({"mlp": block})
        ((path, layer),) = upcycle(model, "mlp", 2)
        assert path == "mlp.0"
        assert model.get_submodule(path) is layer
        zeros = (model["mlp"](torch.randn(2000, D)) == 0).double().mean()
        assert zeros.item() == pytest.approx(0.5, abs=0.03)  # 12,000 draws: a standard error of 0.005


def test_inner_dropout_is_refused_unless_it_is_omitted():
    def model():
        return nn.Sequential(nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Dropout(0.1), nn.Linear(H, D)))

    with pytest.raises(ValueError, match=r"'0' has dropout of 0.1 before its last linear layer, and experts have none"):
        upcycle(model(), "0", 2)
    whole = model()
    x = torch.randn(4, D)
    before = whole.eval()(x)
    upcycle(whole, "0", 2, omit_inner_dropout=True)
    assert_close(whole.train()(x), before, atol=1e-6, rtol=1e-6)


# -- what is refused ---------------------------------------------------------------------------------------------------

STRANGE = {
    "residual": (lambda: Written(after=lambda m, x, y: x + y), "no activation gives what it computes"),
    "scaled": (lambda: Written(after=lambda m, x, y: 0.5 * y), "no activation gives what it computes"),
    "tuple": (lambda: Written(after=lambda m, x, y: (y, None)), "no activation gives what it computes"),
    "functional dropout": (
        lambda: Written(after=lambda m, x, y: F.dropout(y, 0.1, m.training)),
        "in training it computes something else, and not by a dropout module",
    ),
    "norm": (
        lambda: nn.Sequential(nn.Linear(D, H), nn.LayerNorm(H), nn.ReLU(), nn.Linear(H, D)),
        r"parameters beyond those of its linear layers: \['1.weight', '1.bias'\]",
    ),
    "prelu": (lambda: nn.Sequential(nn.Linear(D, H), nn.PReLU(), nn.Linear(H, D)), r"beyond .*: \['1.weight'\]"),
    "one layer": (lambda: nn.Sequential(nn.Linear(D, D), nn.ReLU()), "it holds 1 linear layers"),
    "attention": (lambda: nn.MultiheadAttention(D, 2), "it holds 1 linear layers"),
    "fails": (lambda: Written(lambda x: x.nothing), "trials failed: 'Tensor' object has no attribute 'nothing'"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_unknown_blocks_are_refused_and_nothing_is_changed(name):
    make, message = STRANGE[name]
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)), "b": make()})
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"'b' is no feed-forward block that an expert can copy: .*{message}"):
        upcycle(model, "[ab]", 2)
    assert dict(model.named_modules()) == before


def test_an_error_names_the_children_and_what_is_supported():
    model = nn.Sequential(nn.Sequential(nn.Linear(D, H), nn.ELU(), nn.Linear(H, D)))
    with pytest.raises(ValueError, match=r"Sequential\(0: Linear, 1: ELU, 2: Linear\)\. Supported are blocks .*gelu"):
        upcycle(model, "0", 2)
