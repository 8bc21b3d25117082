"""Growing whole models, with pools that layers share, and counting by hand."""

import pytest
import torch
from torch import nn

from modmoe import (
    DenseRouter,
    ExpertPool,
    GaussianRouter,
    MLPExpert,
    MoELayer,
    TopKRouter,
    count_parameters,
    freeze,
    grow,
    pools,
    remove,
    unfreeze,
)

D, H = 3, 4
EXPERT = D * H + H + H * D + D  # w_in, b_in, w_out, b_out: 12 + 4 + 12 + 3 = 31


class TwoLayersOnePool(nn.Module):
    def __init__(self, routers=None):
        super().__init__()
        pool = ExpertPool(MLPExpert(D, H), 2)
        self.first, self.second = (MoELayer(pool, router) for router in routers or (DenseRouter(D), DenseRouter(D)))

    def forward(self, x):
        return self.second(self.first(x))


class TwoPools(nn.Module):
    def __init__(self, second=None):
        super().__init__()
        self.first = MoELayer(ExpertPool(MLPExpert(D, H), 2), DenseRouter(D))
        self.second = MoELayer(ExpertPool(MLPExpert(D, H), 3), second or TopKRouter(D, top_k=2))

    def forward(self, x):
        return self.second(self.first(x))


def snapshot(module: nn.Module) -> tuple[dict, list[int]]:
    """All values with the books, and which tensor objects hold the parameters."""
    return {key: value.clone() for key, value in module.state_dict().items()}, [id(p) for p in module.parameters()]


def assert_unchanged(module: nn.Module, before: tuple[dict, list[int]]) -> None:
    values, identities = snapshot(module)
    assert values.keys() == before[0].keys()
    assert all(torch.equal(values[key], before[0][key]) for key in values)
    assert identities == before[1]


def test_a_shared_pool_is_visited_once():
    model = TwoLayersOnePool()
    assert list(pools(model)) == ["first.pool"]
    assert grow(model, 2, task="a") == {"first.pool": [2, 3]}
    pool = model.first.pool
    assert pool.ids == (0, 1, 2, 3)
    assert pool.tasks() == (None, None, "a", "a")
    freeze(model, [0, 3])
    assert pool.frozen_ids == (0, 3)
    unfreeze(model, {"first.pool": [3]})
    assert pool.frozen_ids == (0,)
    remove(model, {"first.pool": [0, 2]})
    assert pool.ids == (1, 3)
    assert {tuple(pool.namespace(name)["weight"].shape) for name in ("gate", "gate_2")} == {(2, D)}
    model(torch.randn(4, D)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_two_pools_grow_by_name():
    model = TwoPools()
    new = grow(model)
    assert new == {"first.pool": [2], "second.pool": [3]}
    freeze(model, new)
    assert model.first.pool.frozen_ids == (2,)
    assert model.second.pool.frozen_ids == (3,)
    unfreeze(model, {"second.pool": [3]})
    assert model.first.pool.frozen_ids == (2,)
    assert model.second.pool.frozen_ids == ()
    remove(model, new)
    assert model.first.pool.ids == (0, 1)
    assert model.second.pool.ids == (0, 1, 2)
    freeze(model, [1])  # the same id in both
    assert model.first.pool.frozen_ids == model.second.pool.frozen_ids == (1,)


def test_freeze_without_ids_freezes_shared_experts_too():
    model = TwoPools()
    model.first.shared_expert = nn.Linear(D, D)
    model(torch.randn(4, D)).sum().backward()
    freeze(model)
    assert [p for p in model.parameters() if p.requires_grad] == []
    assert all(p.grad is None for p in model.parameters())
    assert model.second.pool.frozen_ids == (0, 1, 2)


def test_copies_in_two_pools():
    model = TwoPools(DenseRouter(D))
    x = torch.randn(9, D)
    before = model(x)
    grow(model, 2, init="copy")
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)


ERRORS = {
    "grow 0": (lambda m: grow(m, 0), "n must be at least 1"),
    "grow task": (lambda m: grow(m, task=1.5), "a task is a str, an int or None"),
    "copy in one pool only": (lambda m: grow(m, init="copy"), "know no such growth"),
    "freeze in one pool only": (lambda m: freeze(m, [2]), r"no experts with ids \[2\]"),
    "unfreeze in one pool only": (lambda m: unfreeze(m, [2]), r"no experts with ids \[2\]"),
    "unknown later id": (lambda m: freeze(m, {"first.pool": [1], "second.pool": [9]}), r"no experts with ids \[9\]"),
    "unknown pool": (lambda m: freeze(m, {"first.pool": [1], "third.pool": [0]}), r"no pools named \['third.pool'\]"),
    "remove in one pool only": (lambda m: remove(m, [2]), r"no experts with ids \[2\]"),
    "remove all of one": (lambda m: remove(m, {"first.pool": [1], "second.pool": [0, 1, 2]}), "at least one expert"),
    "fewer than k": (lambda m: remove(m, {"first.pool": [1], "second.pool": [0, 1]}), "top_k=2 experts cannot"),
}


@pytest.mark.parametrize(("act", "match"), ERRORS.values(), ids=ERRORS.keys())
def test_one_pools_refusal_leaves_every_pool_unchanged(act, match):
    model = TwoPools()
    freeze(model, [0])
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        act(model)
    assert_unchanged(model, before)


def test_remove_asks_every_layer_of_a_shared_pool():
    model = TwoLayersOnePool((DenseRouter(D), TopKRouter(D, top_k=2)))
    before = snapshot(model)
    with pytest.raises(ValueError, match="top_k=2 experts cannot be chosen out of 1"):
        remove(model, [0])
    assert_unchanged(model, before)


def test_a_model_without_pools():
    with pytest.raises(ValueError, match="Linear contains no ExpertPool"):
        grow(nn.Linear(2, 2))


# -- counting --------------------------------------------------------------------------------------


def test_count_a_grown_layer():
    layer = MoELayer(ExpertPool(MLPExpert(D, H), 3), TopKRouter(D, top_k=2), shared_expert=nn.Linear(D, D))
    # 3 experts of 31, 3 gate rows of 3, the shared expert 3 * 3 + 3 = 12: 93 + 9 + 12 = 114
    # active: two of three experts: 114 - 31 = 83
    assert count_parameters(layer) == (114, 0, 114, 83, 0)
    layer.freeze([0, 2])
    # frozen: two experts and their gate rows: 2 * (31 + 3) = 68
    assert count_parameters(layer) == (114 - 68, 68, 114, 83, 0)
    layer.add_experts(1, hidden_features=10)
    # the new one: 3 * 10 + 10 + 10 * 3 + 3 = 73, and a gate row; total 114 + 76 = 190
    # active: idle is half of the four experts, (3 * 31 + 73) / 2 = 83: 190 - 83 = 107
    assert count_parameters(layer) == (46 + 76, 68, 190, 107, 0)
    layer.freeze()  # the shared expert's 12 are parameters without gradient now
    assert count_parameters(layer) == (0, 190, 190, 107, 0)
    layer.remove([0, 3])
    assert count_parameters(layer) == (0, 190 - 34 - 76, 80, 80, 0)


def test_count_a_shared_pool_once():
    model = TwoLayersOnePool((TopKRouter(D, top_k=1), DenseRouter(D)))
    # 2 experts of 31; gate rows: 2 * 3, and 2 * (3 + 1): 62 + 6 + 8 = 76; the dense layer leaves nothing idle
    assert count_parameters(model) == (76, 0, 76, 76, 0)
    model = TwoLayersOnePool((TopKRouter(D, top_k=1), TopKRouter(D, top_k=1)))
    # 62 + 6 + 6 = 74; each layer leaves one expert idle
    assert count_parameters(model) == (74, 0, 74, 74 - 31, 0)


def test_count_two_pools():
    model = TwoPools()
    # first: 2 * (31 + 3 + 1) = 70, all active; second: 3 * (31 + 3) = 102, one expert idle
    assert count_parameters(model) == (172, 0, 172, 172 - 31, 0)
    freeze(model, {"second.pool": [1]})
    assert count_parameters(model) == (172 - 34, 34, 172, 141, 0)


def test_count_statistics_apart():
    layer = MoELayer(ExpertPool(MLPExpert(D, H), 2), GaussianRouter(D))
    layer.observe(0, torch.randn(6, D), torch.tensor([0, 0, 0, 1, 1, 1]))
    # each class: label, count, log_norm, a mean of 3, scatter and whitening of 3 * 3: 1 + 1 + 1 + 3 + 9 + 9 = 24
    assert count_parameters(layer) == (62, 0, 62, 31, 2 * 24)
    layer.freeze([0])
    assert count_parameters(layer) == (31, 31, 62, 31, 2 * 24)
