"""AttentionRouter: the published number, tokens apart, closed experts, one expert, gradients."""

import pytest
import torch
from torch.testing import assert_close

from modmoe import AttentionRouter, ExpertPool, MLPExpert, MoELayer


def layer_of(num_experts: int = 3, top_k: int = 2, in_features: int = 4) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(ExpertPool(MLPExpert(in_features, 4), num_experts), AttentionRouter(in_features, top_k))


def test_published_number(write_rows):
    layer = layer_of(in_features=1)
    for name, values in {"query": [1.0, 0.0, -1.0], "key": [0.0, 1.0, 0.0], "value": [1.0, 2.0, 4.0]}.items():
        write_rows(layer, name, torch.tensor(values).unsqueeze(1))
    routing = layer.route(torch.ones(1, 1))
    # q k^T = [[0, 1, 0], [0, 0, 0], [0, -1, 0]]. Row 0: (1 + 2e + 4)/(2 + e) = 2.211942; row 1: 7/3;
    # row 2: (5 + 2/e)/(2 + 1/e) = 2.422319
    assert_close(routing.logits, torch.tensor([[2.211942, 2.333333, 2.422319]]), atol=1e-5, rtol=0)
    assert routing.choices.tolist() == [[2, 1]]
    # e^.088986 / (1 + e^.088986) = .522232
    assert_close(routing.weight, torch.tensor([0.522232, 0.477768]), atol=1e-5, rtol=0)


def test_against_a_loop():
    layer = layer_of()
    rows, x = layer.pool.namespace("gate"), torch.randn(5, 4)
    for token, logits in zip(x, layer.route(x).logits, strict=True):
        q, k, v = (rows[name] @ token for name in ("query", "key", "value"))
        assert_close(logits, torch.softmax(torch.outer(q, k), dim=1) @ v)


def test_tokens_never_interact():
    layer, x = layer_of(), torch.randn(2, 3, 4)
    before = layer.route(x).logits.view(2, 3, 3)
    changed = x.clone()
    changed[0, 1] = 10.0
    after = layer.route(changed).logits.view(2, 3, 3)
    same = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.equal(after[same], before[same])
    assert not torch.allclose(after[~same], before[~same])


@pytest.mark.parametrize("by_token", [False, True])
def test_masked_newcomers_change_nothing(by_token):
    layer, x = layer_of(), torch.randn(6, 4)
    layer.freeze()
    before = layer.route(x)
    layer.add_experts(2)
    is_open = torch.arange(5) < 3
    after = layer.route(x, expert_mask=is_open.expand(6, 5) if by_token else is_open)
    assert_close(after.logits[:, :3], before.logits)
    assert_close(after.matrix()[:, :3], before.matrix())
    assert not torch.allclose(layer.route(x).logits[:, :3], before.logits)  # unmasked they do
    assert not layer.router.separate_scores


def test_padding_to_which_nobody_is_open(row_gradient):
    layer, x = layer_of(), torch.randn(3, 4)
    is_open = torch.tensor([[True] * 3, [False] * 3, [True] * 3])
    mask = torch.tensor([True, False, True])
    routing = layer.route(x, mask=mask, expert_mask=is_open)
    assert torch.isfinite(routing.logits).all()
    routing.weight.square().sum().backward()
    assert torch.isfinite(row_gradient(layer, "query")).all()
    with pytest.raises(ValueError, match="every expert is masked for token 1 of 3"):
        layer.route(x, expert_mask=is_open)


def test_one_expert_scores_its_value():
    layer, x = layer_of(1, 1), torch.randn(5, 4)
    assert_close(layer.route(x).logits[:, 0], x @ layer.pool.namespace("gate")["value"][0])
    assert_close(layer(x), layer.expert_output(0, x))


@pytest.mark.parametrize("k", [1, 2])
def test_every_row_learns(k, row_gradient):
    layer = layer_of(top_k=k)
    layer(torch.randn(60, 4)).square().sum().backward()
    for name in ("query", "key", "value"):
        assert (row_gradient(layer, name).abs().sum(1) > 0).all()


def test_gradcheck():
    layer = layer_of().double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    closed = torch.tensor([[True, True, True], [True, False, True]])
    rows = layer.pool.namespace("gate")
    assert torch.autograd.gradcheck(lambda x: layer.router.scores_among(x, rows, None, closed), (x,))
