"""Branch-Train-MiX: experts from branches, everything else averaged."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from modmoe import DenseRouter, MoELayer, TopKRouter
from modmoe.conversion import SwiGLU, branch_train_mix

D, H = 4, 6


class Block(nn.Module):
    def __init__(self, ffn: nn.Module | None = None):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(D)
        self.ffn = SwiGLU(D, H) if ffn is None else ffn
        self.register_buffer("table", torch.arange(3))

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.ffn(self.norm(x.transpose(1, 2)).transpose(1, 2))


def seed_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).eval()


def branches(num: int) -> list[nn.Module]:
    """Branches of one seed that have learned different things."""
    models = [copy.deepcopy(seed_model()) for _ in range(num)]
    for number, model in enumerate(models):
        torch.manual_seed(number + 1)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data += 0.3 * torch.rand_like(tensor)
    return models


SELECT = r"\d\.ffn"


@pytest.mark.parametrize("make_router", [None, DenseRouter, lambda d: TopKRouter(d, 1, renormalize=True)])
@pytest.mark.parametrize("experts_per_branch", [1, 2])
def test_equal_branches_make_the_seed(make_router, experts_per_branch):
    seed = seed_model()
    model, layers = branch_train_mix(
        [copy.deepcopy(seed) for _ in range(3)], SELECT, make_router=make_router, experts_per_branch=experts_per_branch
    )
    x = torch.randn(5, 3, D)
    assert [name for name, _ in layers] == ["0.ffn", "1.ffn"]
    assert all(model.get_submodule(name) is layer and isinstance(layer, MoELayer) for name, layer in layers)
    assert [layer.pool.num_experts for _, layer in layers] == [3 * experts_per_branch] * 2
    assert not any(module.training for module in model.modules())
    assert_close(model(x), seed(x), atol=1e-5, rtol=1e-5)


def test_averages_by_hand():
    def branch(value: float, count: int) -> nn.Module:
        model = nn.ModuleDict(
            {
                "head": nn.Linear(1, 1),
                "norm": nn.BatchNorm1d(1),
                "ffn": nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)),
            }
        )
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
        model["norm"].running_mean.fill_(10 * value)
        model["norm"].num_batches_tracked.fill_(count)
        return model

    given = [branch(1.0, 7), branch(2.0, 8), branch(6.0, 9)]
    model, ((_, layer),) = branch_train_mix(given, "ffn", experts_per_branch=2, tasks=["a", None, "c"])
    # (1 + 2 + 6) / 3 = 3; the running mean (10 + 20 + 60) / 3 = 30; of the counters 7, 8, 9 the first
    assert model["head"].weight.item() == model["head"].bias.item() == model["norm"].weight.item() == 3.0
    assert model["norm"].running_mean.item() == 30.0
    assert model["norm"].num_batches_tracked.item() == 7
    values = [layer.pool.expert_state(expert_id)["expert.w_in"].item() for expert_id in layer.pool.ids]
    assert values == [1.0, 1.0, 2.0, 2.0, 6.0, 6.0]
    assert layer.pool.tasks() == ("a", "a", None, None, "c", "c")


def test_each_expert_is_its_branch_s_block_and_the_rest_is_the_mean():
    given = branches(3)
    before = [copy.deepcopy(branch.state_dict()) for branch in given]
    model, layers = branch_train_mix(given, SELECT)
    x = torch.randn(7, D)
    for name, layer in layers:
        for position, branch in enumerate(given):
            expert_id = layer.pool.ids[position]
            assert_close(layer.expert_output(expert_id, x), branch.get_submodule(name)(x), atol=1e-6, rtol=1e-6)
    state = model.state_dict()
    for name in before[0]:
        if ".ffn." not in name and before[0][name].is_floating_point():
            mean = torch.stack([branch[name].double() for branch in before]).mean(0)
            assert_close(state[name].double(), mean, atol=1e-7, rtol=1e-6)
    for branch, old in zip(given, before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in branch.state_dict().items())
        assert isinstance(branch[0].ffn, SwiGLU)


def test_the_seed_s_block_is_one_more_branch():
    seed = seed_model()
    model, layers = branch_train_mix([*branches(2), seed], SELECT, make_router=lambda d: TopKRouter(d, 3))
    x = torch.randn(7, D)
    assert_close(layers[0][1].expert_output(2, x), seed[0].ffn(x), atol=1e-6, rtol=1e-6)
    model.train()(torch.randn(3, 2, D)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_transformer_encoder_in_half_precision():
    torch.manual_seed(0)
    make = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    seed = nn.TransformerEncoder(make, 2).to(torch.bfloat16).eval()
    model, layers = branch_train_mix([seed, copy.deepcopy(seed)], r"layers\.\d", top_k=1)
    assert [name for name, _ in layers] == ["layers.0.linear1", "layers.1.linear1"]
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    assert_close(model(x), seed(x), atol=2e-2, rtol=2e-2)


def test_what_the_first_branch_says_of_trainability_stays():
    given = branches(2)
    given[0][0].attention.in_proj_weight.requires_grad_(False)
    model, _ = branch_train_mix(given, SELECT)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.attention.in_proj_weight"]


def test_refusals():
    given = branches(2)
    with pytest.raises(ValueError, match="at least one branch and one expert of each are needed, got 0 branches"):
        branch_train_mix([], SELECT)
    with pytest.raises(ValueError, match="at least one branch and one expert"):
        branch_train_mix(given, SELECT, experts_per_branch=0)
    with pytest.raises(ValueError, match="1 tasks for 2 branches"):
        branch_train_mix(given, SELECT, tasks=["a"])
    with pytest.raises(ValueError, match="'mlp' matches none of the modules"):
        branch_train_mix(given, "mlp")
    wider = nn.Sequential(Block(SwiGLU(D, H + 1)), Block()).eval()
    with pytest.raises(
        ValueError,
        match=r"branch 1 differs from the first one in 3 of its tensors: '0.ffn.down_proj.weight' is "
        r"torch.float32 \(4, 7\) instead of torch.float32 \(4, 6\)",
    ):
        branch_train_mix([given[0], wider], SELECT)
    strange, moved = copy.deepcopy(given[0]), copy.deepcopy(given[0])
    strange[0].norm = nn.Identity()
    moved[1].table += 1
    with pytest.raises(ValueError, match=r"branch 2 differs .* in 1 of its modules: '0.norm' is Identity instead of B"):
        branch_train_mix([*given, strange], SELECT)
    with pytest.raises(ValueError, match=r"branch 1 differs from the first one in the buffer '1.table'"):
        branch_train_mix([given[0], moved], SELECT)
    gelus = [nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.GELU(a), nn.Linear(3, 2))) for a in ("none", "tanh")]
    with pytest.raises(ValueError, match="the branches' blocks '0' are different kinds of experts"):
        branch_train_mix(gelus, "0")
