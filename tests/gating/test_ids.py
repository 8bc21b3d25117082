"""HashRouter and GroupedRandomRouter: fixed, even, independent, and well defined when the pool grows."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modmoe import ExpertPool, GroupedRandomRouter, HashRouter, MLPExpert, MoELayer, Router
from modmoe.gating.ids import hash_scores, mix_bits

TOKENS = torch.arange(6000)


def layer_of(router: Router, num_experts: int = 3) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(ExpertPool(MLPExpert(2, 3), num_experts), router)


def expert_ids(layer: MoELayer, ids: Tensor, **options) -> Tensor:
    """The stable id of each token's expert."""
    position = layer.route(torch.zeros(len(ids), 2), ids=ids, **options).expert_index
    return torch.tensor(layer.pool.ids)[position]


def mixed(bits: int) -> int:
    """In Python's integers: twice, the upper half is folded into the lower and the whole is multiplied."""
    for _ in range(2):
        bits = ((bits ^ bits >> 16) * 0x45D9F3B) % 2**32
    return bits ^ bits >> 16


def test_mixing_by_hand():
    # 1 has nothing in its upper half: times 0x45d9f3b it is that; 0x45d9f3b ^ 0x45d = 0x45d9b66, and
    # 0x45d9b66 * 0x45d9f3b modulo 2^32 is 0x31252a82; its upper half folded in: 0x31252a82 ^ 0x3125 = 0x31251ba7
    assert 0x45D9B66 * 0x45D9F3B % 2**32 == 0x31252A82
    assert mix_bits(torch.tensor([0, 1])).tolist() == [0, 0x31251BA7]
    assert len(mix_bits(TOKENS).unique()) == len(TOKENS)  # one to one


@pytest.mark.parametrize("seed", [0, 3])
def test_equals_the_formula_in_integers(seed):
    # A model that was saved yesterday has to find its experts tomorrow: the formula must not change.
    ids, experts = [0, 1, 50256, 2**31 + 5, 2**40 + 1, 2**62], (0, 1, 7)
    start = mixed(seed + 1)
    scores = hash_scores(torch.tensor(ids), experts, seed)
    for row, token in enumerate(ids):
        bits = mixed(mixed(token % 2**32 ^ start) ^ token >> 32)
        for column, expert in enumerate(experts):
            pair = mixed((mixed(bits ^ mixed(expert ^ start + 1)) + bits) % 2**32)
            assert scores[row, column].item() == (pair >> 8) / 2**24


def test_each_expert_has_its_share_and_seeds_are_independent():
    layer, other = layer_of(HashRouter(2)), layer_of(HashRouter(2, seed=1))
    first, second = expert_ids(layer, TOKENS), expert_ids(other, TOKENS)
    # 2000 of 6000 each; the standard deviation is sqrt(6000 * 1/3 * 2/3) = 36.5
    assert (torch.bincount(first) - 2000).abs().max() < 150
    # two independent tables agree for a third of the ids
    assert abs((first == second).sum().item() - 2000) < 150
    joint = torch.bincount(first * 3 + second, minlength=9)
    assert (joint - 6000 / 9).abs().max() < 110  # standard deviation 24
    # neither does it depend on a token's neighbours
    assert abs((first[1:] == first[:-1]).sum().item() - 2000) < 150


def test_growth_moves_ids_to_the_newcomer_only():
    layer = layer_of(HashRouter(2))
    before = expert_ids(layer, TOKENS)
    layer.add_experts(1)
    after = expert_ids(layer, TOKENS)
    moved = before != after
    assert (after[moved] == 3).all()
    assert abs(moved.sum().item() - 1500) < 150  # a quarter
    assert torch.equal(expert_ids(layer, TOKENS, expert_mask=torch.tensor([True, True, True, False])), before)
    layer.remove([1])
    left = expert_ids(layer, TOKENS)
    assert torch.equal(left[after != 1], after[after != 1])
    layer.remove([3])
    layer.add_experts(1)  # id 4, and not 3 again
    assert 4 in expert_ids(layer, TOKENS)


def test_weight_one_and_equal_to_a_loop():
    layer = layer_of(HashRouter(2))
    layer.freeze([1])
    x, ids = torch.randn(2, 4, 2), torch.randint(0, 99, (2, 4))
    y = layer(x, ids=ids)
    chosen = layer.routing.expert_index.view(2, 4)
    for b, s in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        assert_close(y[b, s], layer.expert_output(int(chosen[b, s]), x[b, s]))
    assert (layer.routing.weight == 1).all()
    assert layer.router.weight_sum == "1"


def test_ids_of_padding_are_not_read():
    layer = layer_of(HashRouter(2))
    x, ids, mask = torch.randn(5, 2), torch.tensor([4, -7, 4, 9, 2**62]), torch.tensor([True, False, True, True, False])
    y = layer(x, mask=mask, ids=ids)
    assert_close(y[mask], layer(x[mask], ids=ids[mask]))
    assert layer.route(x, mask=mask, ids=ids).choices[:, 0].ge(0).equal(mask)


def test_ids_are_needed():
    layer = layer_of(HashRouter(2))
    with pytest.raises(ValueError, match="HashRouter needs a token id for each token"):
        layer.route(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="scores ids and not features"):
        layer.expert_score(0, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="a hash gives each token one expert, got top_k=2"):
        layer.route(torch.zeros(3, 2), ids=torch.arange(3), top_k=2)
    with pytest.raises(ValueError, match="a seed of at least 0"):
        HashRouter(2, seed=-1)


# -- random experts within the domain's group --------------------------------------------------------------------------


def grouped(num_experts: int = 6) -> MoELayer:
    return layer_of(GroupedRandomRouter(2, num_groups=2, vocab_size=1000), num_experts)


def packed(layer: MoELayer, domain: int, tokens: Tensor) -> Tensor:
    return layer.router.pack(torch.full_like(tokens, domain), tokens)


def test_packing_by_hand():
    router = GroupedRandomRouter(2, num_groups=3, vocab_size=100)
    assert router.pack(torch.tensor([0, 2]), torch.tensor([7, 99])).tolist() == [7, 299]
    assert router.pack(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)).tolist() == []
    with pytest.raises(ValueError, match=r"domain ids in \[0, 3\) are needed, got 0 to 3"):
        router.pack(torch.tensor([0, 3]), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"token ids in \[0, 100\) are needed, got -1 to 4"):
        router.pack(torch.tensor([0, 0]), torch.tensor([-1, 4]))


def test_a_domain_uses_its_group_evenly():
    layer, tokens = grouped(), torch.arange(1000)
    first, second = (expert_ids(layer, packed(layer, domain, tokens)) for domain in (0, 1))
    assert first.unique().tolist() == [0, 2, 4]  # stable id modulo 2
    assert second.unique().tolist() == [1, 3, 5]
    assert (torch.bincount(first)[::2] - 1000 / 3).abs().max() < 75  # standard deviation 15


def test_growth_of_one_group_leaves_the_other():
    layer, tokens = grouped(), torch.arange(1000)
    before = [expert_ids(layer, packed(layer, domain, tokens)) for domain in (0, 1)]
    layer.add_experts(1)  # id 6: group 0
    after = [expert_ids(layer, packed(layer, domain, tokens)) for domain in (0, 1)]
    assert torch.equal(after[1], before[1])
    moved = after[0] != before[0]
    assert (after[0][moved] == 6).all()
    assert 150 < moved.sum() < 350  # a quarter


def test_groups_by_hand_are_saved_and_frozen():
    layer, tokens = grouped(3), torch.arange(1000)
    layer.router.assign_group(layer.pool, layer.namespace, 2, 1)
    layer.freeze([2])
    loaded = grouped(1)
    loaded.load_state_dict(layer.state_dict())
    assert expert_ids(loaded, packed(loaded, 0, tokens)).unique().tolist() == [0]
    assert expert_ids(loaded, packed(loaded, 1, tokens)).unique().tolist() == [1, 2]
    with pytest.raises(ValueError, match="expert 2 is frozen"):
        layer.router.assign_group(layer.pool, layer.namespace, 2, 0)
    with pytest.raises(ValueError, match=r"a group in \[0, 2\) is needed, got 2"):
        layer.router.assign_group(layer.pool, layer.namespace, 0, 2)


def test_a_group_without_an_open_expert_is_an_error():
    layer = grouped(2)
    ids = layer.router.pack(torch.tensor([0, 1]), torch.tensor([5, 5]))
    with pytest.raises(ValueError, match="the group has no open expert: token 1 of 2"):
        layer.route(torch.zeros(2, 2), ids=ids, expert_mask=torch.tensor([True, False]))
    mask = torch.tensor([True, False])  # padding needs none
    assert layer.route(torch.zeros(2, 2), ids=ids, mask=mask, expert_mask=torch.tensor([True, False])).load[0] == 1
    with pytest.raises(ValueError, match="num_groups and vocab_size must be at least 1"):
        GroupedRandomRouter(2, 0, 10)
