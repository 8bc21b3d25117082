"""ExpertChoiceRouter: who takes whom by hand, padding, closed experts, gradients."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modmoe import ExpertChoiceRouter, ExpertPool, MLPExpert, MoELayer


def layer_of(num_experts: int = 2, capacity_factor: float = 1.0) -> MoELayer:
    """A layer whose logits are its input: the gate's weight is the identity."""
    torch.manual_seed(0)
    router = ExpertChoiceRouter(num_experts, capacity_factor)
    layer = MoELayer(ExpertPool(MLPExpert(num_experts, 3), num_experts), router)
    with torch.no_grad():
        layer.pool.growable("gate", "weight").banks()[0][0].copy_(torch.eye(num_experts))
    return layer


def taken(layer: MoELayer, x: Tensor, **options) -> list[set[int]]:
    routing = layer.route(x, **options)
    pairs = list(zip(routing.expert_index.tolist(), routing.token_index.tolist(), strict=True))
    return [{token for expert, token in pairs if expert == e} for e in range(layer.pool.num_experts)]


def by_loop(layer: MoELayer, x: Tensor, mask: Tensor | None = None, expert_mask: Tensor | None = None) -> Tensor:
    """Expert after expert, token after token."""
    num_experts, c = layer.pool.num_experts, layer.router.capacity_factor
    real = [t for t in range(len(x)) if mask is None or mask[t]]
    y = torch.zeros(len(x), layer.pool.expert.out_features)
    limit = math.ceil(len(real) * c / num_experts)
    logits = x @ layer.pool.namespace("gate")["weight"].T
    for e in range(num_experts):
        if expert_mask is not None and not expert_mask[e]:
            continue
        open_experts = [i for i in range(num_experts) if expert_mask is None or expert_mask[i]]
        weight = {t: (logits[t, e].exp() / logits[t, open_experts].exp().sum()) for t in real}
        for t in sorted(real, key=lambda t: -weight[t].item())[:limit]:
            y[t] = y[t] + weight[t] * layer.expert_output(layer.pool.ids[e], x[t])
    return y


def test_each_expert_takes_its_best_tokens_by_hand():
    # x0 - x1 is 2, 1, 3, -1: expert 0 prefers tokens 2, 0, 1, 3 and expert 1 the other way round.
    x = torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    layer = layer_of()
    # C = ceil(4 * 1 / 2) = 2
    assert taken(layer, x) == [{2, 0}, {3, 1}]
    matrix = layer.route(x).matrix()
    # sigmoid of the difference: token 0 sigmoid(2) = .880797 to expert 0; token 1 sigmoid(-1) = .268941 to expert 1
    expected = [[0.880797, 0.0], [0.0, 0.268941], [0.952574, 0.0], [0.0, 0.731059]]
    assert_close(matrix, torch.tensor(expected), atol=1e-6, rtol=0)
    assert layer.route(x).load.tolist() == [2, 2]


@pytest.mark.parametrize(("num_tokens", "c", "expected"), [(5, 1.0, 3), (3, 2.0, 3), (10, 0.1, 1), (2, 9.0, 2)])
def test_the_capacity_is_rounded_up_and_never_above_the_batch(num_tokens, c, expected):
    # ceil(5 / 2) = 3; ceil(3 * 2 / 2) = 3; ceil(10 * .1 / 2) = 1; ceil(2 * 9 / 2) = 9, and there are 2 tokens
    x = torch.randn(num_tokens, 2, generator=torch.Generator().manual_seed(0))
    assert layer_of(capacity_factor=c).route(x).load.tolist() == [expected, expected]


def test_a_token_may_get_several_experts_or_none():
    x = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    layer = layer_of(capacity_factor=0.5)  # C = ceil(3 * .5 / 2) = 1
    assert taken(layer, x) == [{1}, {2}]
    assert layer(x)[0].tolist() == [0.0, 0.0]
    assert taken(layer_of(capacity_factor=2.0), x) == [{0, 1, 2}, {0, 1, 2}]


def test_equal_scores_go_to_the_earlier_token():
    assert taken(layer_of(), torch.zeros(4, 2)) == [{0, 1}, {0, 1}]


def test_padding_is_never_taken_and_does_not_count():
    # The classic mistake: padding's logits are all equal, its softmax 1/E, better than a token's bad expert.
    x = torch.tensor([[9.0, 0.0], [0.0, 0.0], [8.0, 0.0], [7.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    mask = torch.tensor([True, False, True, True, False, False])
    layer = layer_of()
    # 3 real tokens: C = ceil(3 / 2) = 2, and not ceil(6 / 2) = 3
    assert taken(layer, x, mask=mask) == [{0, 2}, {3, 2}]
    assert_close(layer(x, mask=mask)[mask], layer(x[mask]))
    assert layer.route(x, mask=torch.zeros(6, dtype=torch.bool)).load.tolist() == [0, 0]


def test_an_expert_takes_no_token_that_it_is_closed_to():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    layer = layer_of()
    open_experts = torch.ones(6, 2, dtype=torch.bool)
    open_experts[:4, 0] = False
    first, second = taken(layer, x, expert_mask=open_experts)
    assert first == {4, 5}  # fewer than C = 3: there are no others
    assert len(second) == 3
    assert taken(layer, x, expert_mask=torch.tensor([True, False]))[1] == set()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("closed", [False, True])
def test_equals_a_loop(masked, closed):
    torch.manual_seed(3)
    layer = MoELayer(ExpertPool(MLPExpert(5, 4, 2), 3), ExpertChoiceRouter(5, 1.5))
    with torch.no_grad():
        layer.pool.growable("gate", "weight").banks()[0][0].normal_()
    layer.add_experts(1, hidden_features=6)
    layer.freeze([1])
    x = torch.randn(9, 5)
    options: dict = {"mask": torch.arange(9) % 4 != 1} if masked else {}
    if closed:
        options["expert_mask"] = torch.tensor([True, False, True, True])
    with torch.no_grad():
        assert_close(layer(x, **options), by_loop(layer, x, **options), atol=1e-6, rtol=1e-5)


def test_the_gate_learns_and_a_frozen_row_does_not():
    layer = layer_of(3)
    layer.freeze([2])
    layer(torch.randn(8, 3)).square().sum().backward()
    ((rows, _),) = layer.pool.growable("gate", "weight").live()
    assert rows.shape == (2, 3)
    assert rows.grad.abs().amax(1).min() > 0


def test_what_it_depends_on():
    layer = layer_of(3).eval()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    before = layer.route(x).matrix()
    other = x.clone()
    other[5] = torch.tensor([50.0, 0.0, 0.0])  # takes a place away
    assert not torch.equal(layer.route(other).matrix()[:5], before[:5])
    assert not layer.router.causal
    assert layer.router.scope == "batch"
    assert layer.router.num_active(3) == 1


def test_bad_input():
    with pytest.raises(ValueError, match="capacity_factor must be positive, got 0"):
        ExpertChoiceRouter(4, 0)
    with pytest.raises(ValueError, match="there is no top_k for each token"):
        layer_of().route(torch.zeros(2, 2), top_k=1)
    with pytest.raises(ValueError, match="does not hold the same number of choices"):
        _ = layer_of().route(torch.zeros(2, 2)).choices
