"""MoAttention: attention heads as experts over shared keys and values (backends: tests/kernels)."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from modmoe import (
    AttentionExpert,
    DenseRouter,
    ExpertPool,
    MLPExpert,
    MoAttention,
    MoELayer,
    SmearRouter,
    TopKRouter,
    count_parameters,
    freeze,
    sync_optimizer,
)
from modmoe.gating.base import Assignment

D, H = 6, 4


class LaterTokens(DenseRouter):
    """A router that says that it looks ahead."""

    @property
    def causal(self) -> bool:
        return False


class AnyOrder(TopKRouter):
    """A router whose triples stand in no promised order."""

    def assign(self, *args) -> Assignment:
        return super().assign(*args)._replace(top_k=None)


def heads(num_experts: int = 4, top_k: int = 2, causal: bool = False) -> MoAttention:
    torch.manual_seed(0)
    layer = MoAttention(ExpertPool(AttentionExpert(D, H), num_experts), TopKRouter(D, top_k), causal=causal)
    for tensor, _, _ in layer.pool.growable("gate", "weight").banks():
        nn.init.normal_(tensor)
    return layer


def by_loops(layer: MoAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """One sequence x (S, D), token by token and head by head."""
    layer.route(x, mask)
    weights = layer.routing.matrix()
    y = torch.zeros_like(x)
    for t in range(len(x)):
        last = t + 1 if layer.causal else len(x)
        seen = [s for s in range(last) if mask is None or mask[s]]
        for position, expert_id in enumerate(layer.pool.ids):
            state = layer.pool.expert_state(expert_id)
            query = x[t] @ state["expert.w_query"][0]
            logits = torch.stack([query @ (layer.key.weight @ x[s]) for s in seen]) / math.sqrt(H) if seen else x[:0, 0]
            context = sum(p * (layer.value.weight @ x[s]) for p, s in zip(logits.softmax(0), seen, strict=True))
            if weights[t, position] > 0:
                y[t] += weights[t, position] * (context @ state["expert.w_output"][0])
    return y


def test_one_head_by_hand():
    layer = MoAttention(ExpertPool(AttentionExpert(1, 1), 1), DenseRouter(1))
    with torch.no_grad():
        layer.pool.growable("expert", "w_query").banks()[0][0].fill_(1.0)
        layer.pool.growable("expert", "w_output").banks()[0][0].fill_(10.0)
        layer.key.weight.fill_(math.log(3))
        layer.value.weight.fill_(2.0)
    x = torch.tensor([[1.0], [0.0]])
    # keys ln 3 and 0, values 2 and 0. Token 0: logits (ln 3, 0), weights 3/4 and 1/4: .75 * 2 * 10 = 15
    # token 1: query 0, weights 1/2 and 1/2: .5 * 2 * 10 = 10
    assert_close(layer(x), torch.tensor([[15.0], [10.0]]))
    layer.causal = True  # token 0 sees itself alone: 2 * 10 = 20
    assert_close(layer(x), torch.tensor([[20.0], [10.0]]))


@pytest.mark.parametrize("causal", [False, True])
def test_all_heads_with_equal_weights_are_torch_s_multi_head_attention(causal):
    torch.manual_seed(0)
    num_heads = D // 2
    layer = MoAttention(ExpertPool(AttentionExpert(D, 2), num_heads), DenseRouter(D), causal=causal)
    for name in ("weight", "bias"):
        nn.init.zeros_(layer.pool.growable("gate", name).banks()[0][0])
    queries = layer.pool.growable("expert", "w_query").stack(layer.pool.ids)  # (heads, D, 2)
    outputs = layer.pool.growable("expert", "w_output").stack(layer.pool.ids)  # (heads, 2, D)
    plain = nn.MultiheadAttention(D, num_heads, bias=False, batch_first=True)
    with torch.no_grad():
        shared = [w.weight.repeat(num_heads, 1) for w in (layer.key, layer.value)]  # every head reads the same
        plain.in_proj_weight.copy_(torch.cat([queries.permute(0, 2, 1).flatten(0, 1), *shared]))
        plain.out_proj.weight.copy_(outputs.flatten(0, 1).T)
    x = torch.randn(2, 5, D)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    expected, _ = plain(x, x, x, attn_mask=hidden, need_weights=False)
    assert_close(num_heads * layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_it_equals_a_loop_over_tokens_and_heads(causal):
    layer = heads(causal=causal)
    x = torch.randn(2, 5, D)
    y = layer(x)
    assert_close(y, torch.stack([by_loops(layer, one) for one in x]), atol=1e-5, rtol=1e-5)
    mask = torch.tensor([True, False, True, True, False])
    layer.freeze([1])
    x = x[0].requires_grad_()
    got, expected = layer(x, mask=mask), by_loops(layer, x, mask)
    assert_close(got, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(5, D) * mask.unsqueeze(1)
    inputs = [x, layer.key.weight, layer.value.weight]
    inputs += [layer.pool.growable("gate", "weight").live()[0][0]]
    grads = [torch.autograd.grad((y * direction).sum(), inputs) for y in (got, expected)]
    for fast, slow in zip(*grads, strict=True):
        assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_causal_attention_does_not_look_ahead():
    x = torch.randn(2, 7, D)
    for place in range(7):
        other = x.clone()
        other[:, place] += 1.0
        for causal in (True, False):
            layer = heads(causal=causal)
            changed = (layer(x) - layer(other)).abs().amax((0, 2)) > 1e-6
            assert changed[place:].all()
            assert changed[:place].all() if not causal else not changed[:place].any()


@pytest.mark.parametrize("causal", [False, True])
def test_padding_never_changes_a_real_token(causal):
    layer = heads(causal=causal)
    x = torch.randn(2, 4, D)
    padded = torch.full((2, 7, D), torch.nan)
    place = torch.tensor([1, 2, 4, 6])
    padded[:, place] = x
    padded[0, 5], padded[1, 3] = torch.inf, 1e30
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[:, place] = True
    x, padded = x.requires_grad_(), padded.requires_grad_()
    y, y_padded = layer(x), layer(padded, mask=mask)
    assert_close(y_padded[:, place], y, atol=1e-6, rtol=1e-5)
    assert (y_padded[~mask] == 0).all()
    y.sum().backward()
    y_padded.sum().backward()
    assert_close(padded.grad[:, place], x.grad, atol=1e-5, rtol=1e-5)
    assert (padded.grad[~mask] == 0).all()
    nobody = layer(padded.detach(), mask=torch.zeros(2, 7, dtype=torch.bool))
    assert (nobody == 0).all()


def test_sequences_do_not_see_each_other():
    layer = heads()
    x = torch.randn(2, 3, 5, D)
    y = layer(x)
    assert y.shape == x.shape
    assert_close(layer(x[1, 2]), y[1, 2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    layer = heads(3, causal=causal).double()
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


def test_growth_and_freezing():
    layer = heads(2)
    x = torch.randn(3, 5, D)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    key, value = layer.key.weight.detach().clone(), layer.value.weight.detach().clone()
    before = [layer.expert_output(i, x) for i in (0, 1)]
    freeze(layer)  # the keys and values are shared: frozen with all heads
    (new,) = layer.add_experts(1)
    layer.unfreeze([1])
    sync_optimizer(optimizer, layer)
    assert not layer.key.weight.requires_grad
    optimizer.zero_grad()
    layer(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.key.weight, key)
    assert torch.equal(layer.value.weight, value)
    assert torch.equal(layer.expert_output(0, x), before[0])
    assert not torch.equal(layer.expert_output(1, x), before[1])
    layer.remove([1])
    assert layer.pool.ids == (0, new)
    assert torch.equal(layer.expert_output(0, x), before[0])


def test_a_survivor_keeps_its_moments():
    layer = heads(2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(3, 5, D)).square().sum().backward()
    optimizer.step()
    moments = optimizer.state[layer.pool.growable("expert", "w_query").banks()[0][0]]["exp_avg"][1].clone()
    layer.freeze([0])
    sync_optimizer(optimizer, layer)
    ((survivor, _),) = layer.pool.growable("expert", "w_query").live()
    assert torch.equal(optimizer.state[survivor]["exp_avg"][0], moments)
    assert layer.key.weight.requires_grad  # some heads are live: what all share stays so


def test_a_head_s_own_output_is_its_part_of_the_layer_s():
    layer = heads(3, top_k=3)
    x = torch.randn(4, D)
    y = layer(x)
    weights = layer.routing.matrix()
    assert_close(sum(weights[:, [i]] * layer.expert_output(i, x) for i in range(3)), y, atol=1e-6, rtol=1e-5)


def test_it_saves_loads_copies_and_counts():
    layer = heads(3)
    layer.freeze([0])
    x = torch.randn(2, 5, D)
    fresh = MoAttention(ExpertPool(AttentionExpert(D, H), 2), TopKRouter(D, 2))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    # a head: 2 * 24, a gate row: 6, keys and values: 2 * 24; two of three heads compute a token
    counts = count_parameters(layer)
    assert (counts.total, counts.active) == (3 * (48 + 6) + 48, 2 * 48 + 3 * 6 + 48)


def test_autocast():
    layer = heads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(2, 5, D))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert torch.isfinite(layer.key.weight.grad).all()


def test_it_learns_to_copy_the_first_token():
    torch.manual_seed(0)
    layer = MoAttention(ExpertPool(AttentionExpert(D, H), 3), TopKRouter(D, 2), causal=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    x = torch.randn(100, 4, D)
    x[:, :, 0], x[:, 0, 0] = 0.0, 3.0  # the first token is marked; its second feature is wanted everywhere
    target = x[:, :1, 1].expand(-1, 4)
    for _ in range(200):
        loss = (layer(x)[..., 2] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * target.var().item()


def test_refusals():
    with pytest.raises(ValueError, match="every size of an expert must be at least 1, got 0 and 4"):
        AttentionExpert(0, 4)
    with pytest.raises(ValueError, match="a pool of AttentionExpert is needed, got MLPExpert"):
        MoAttention(ExpertPool(MLPExpert(D, 4)), DenseRouter(D))
    pool = ExpertPool(AttentionExpert(D, H), 3)
    with pytest.raises(ValueError, match="causal attention needs a causal router, LaterTokens looks ahead"):
        MoAttention(pool, LaterTokens(D), causal=True)
    with pytest.raises(ValueError, match="use MoAttention for MoELayer"):
        MoELayer(pool, DenseRouter(D))(torch.randn(2, D))
    with pytest.raises(ValueError, match=r"sequences \(..., S, 6\) are needed, got \(6,\)"):
        MoAttention(pool, DenseRouter(D))(torch.randn(D))
    with pytest.raises(ValueError, match="does not hold the same number of choices"):
        MoAttention(pool, AnyOrder(D, 2))(torch.randn(2, D))
    with pytest.raises(ValueError, match="and whole tokens: SmearRouter gives merges"):
        MoAttention(pool, SmearRouter(D))(torch.randn(2, D))
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64"):
        MoAttention(pool, DenseRouter(D))(torch.randn(2, D).double())
