"""sync_optimizer: every trainable tensor once, moments by expert, groups, order, and foreign tensors."""

import copy

import pytest
import torch
from torch import nn

from modmoe import DenseRouter, ExpertPool, MLPExpert, MoELayer, grow, sync_optimizer

D = 2
X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])


def make_layer(num_experts: int = 2, shared: nn.Module | None = None) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(ExpertPool(MLPExpert(D, 3), num_experts), DenseRouter(D), shared_expert=shared)


def step(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    optimizer.zero_grad()
    module(X).square().sum().backward()
    optimizer.step()


def held(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


def assert_in_line(optimizer: torch.optim.Optimizer, *modules: nn.Module) -> None:
    want = [id(p) for module in modules for p in module.parameters() if p.requires_grad]
    assert sorted(held(optimizer)) == sorted(want)
    assert {id(p) for p in optimizer.state} <= set(want)


def moments(optimizer, module, name: str, key: str) -> dict[int, torch.Tensor]:
    """Expert id -> its rows of an optimizer's state, for the gate or expert rows ``name``."""
    namespace, row_name = name.split(".")
    found = {}
    for tensor, rows in module.pool.growable(namespace, row_name).live():
        for index, row in enumerate(rows):
            if tensor in optimizer.state:
                found[row.owner] = optimizer.state[tensor][key][index].clone()
    return found


def describe(optimizer: torch.optim.Optimizer):
    """Everything that a second sync could change."""
    groups = [{**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups]
    return groups, {id(p): {k: id(v) for k, v in state.items()} for p, state in optimizer.state.items()}


# -- moments ---------------------------------------------------------------------------------------


def test_adam_by_hand():
    layer = make_layer(3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, betas=(0.5, 0.75))
    step(optimizer, layer)
    gradient = layer.pool.growable("gate", "bias").c0.grad.clone()
    layer.freeze([1])
    sync_optimizer(optimizer, layer)
    bias = layer.pool.growable("gate", "bias").c1
    # after one step: m = (1 - 0.5) g, v = (1 - 0.75) g^2, step 1; rows 0 and 2 of three
    assert torch.allclose(optimizer.state[bias]["exp_avg"], 0.5 * gradient[[0, 2]])
    assert torch.allclose(optimizer.state[bias]["exp_avg_sq"], 0.25 * gradient[[0, 2]] ** 2)
    assert optimizer.state[bias]["step"].item() == 1
    layer.add_experts(1)
    sync_optimizer(optimizer, layer)
    step(optimizer, layer)
    # survivors count on, the new expert starts
    steps = [optimizer.state[t]["step"].item() for t, _ in layer.pool.growable("gate", "bias").live()]
    assert steps == [2, 1]


def test_a_survivor_trains_on_as_if_nothing_had_been_split():
    """Freezing 1 and removing 3 leave 0 and 2 with the update that they would have had."""
    layer = make_layer(4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    step(optimizer, layer)
    twin, twin_optimizer = copy.deepcopy((layer, optimizer))
    layer.freeze([1])
    layer.remove([3])
    sync_optimizer(optimizer, layer)
    before = {i: layer.pool.expert_state(i) for i in (0, 2)}
    for model in (layer, twin):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.3)
    optimizer.step()
    twin_optimizer.step()
    for expert_id in (0, 2):
        got, want = layer.pool.expert_state(expert_id), twin.pool.expert_state(expert_id)
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert all(not torch.equal(got[name], before[expert_id][name]) for name in want)


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), ["momentum_buffer"]),
        (lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True), ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True), ["square_avg", "momentum_buffer", "grad_avg"]),
        (lambda p: torch.optim.Adagrad(p), ["sum"]),
        (lambda p: torch.optim.Adamax(p), ["exp_avg", "exp_inf"]),
        (lambda p: torch.optim.Rprop(p), ["prev", "step_size"]),
    ],
    ids=["sgd", "amsgrad", "rmsprop", "adagrad", "adamax", "rprop"],
)
def test_every_optimizers_state_follows_its_rows(make, keys):
    layer = make_layer(4)
    optimizer = make(layer.parameters())
    step(optimizer, layer)
    step(optimizer, layer)
    names = ("expert.w_in", "expert.b_out", "gate.weight", "gate.bias")
    before = {(name, key): moments(optimizer, layer, name, key) for name in names for key in keys}
    layer.remove([0])
    layer.freeze([2])  # two changes without a sync between them
    layer.add_experts(1)
    sync_optimizer(optimizer, layer)
    assert_in_line(optimizer, layer)
    for (name, key), want in before.items():
        got = moments(optimizer, layer, name, key)
        assert {1, 3} <= got.keys()
        assert all(torch.equal(got[i], want[i]) for i in (1, 3))
    step(optimizer, layer)


def test_adafactors_factored_state_follows_its_rows():
    layer = make_layer(3)
    optimizer = torch.optim.Adafactor(layer.parameters())
    step(optimizer, layer)
    old = optimizer.state[layer.pool.growable("expert", "w_in").c0]
    row_var, col_var = old["row_var"].clone(), old["col_var"].clone()
    layer.freeze([0])
    sync_optimizer(optimizer, layer)
    new = optimizer.state[layer.pool.growable("expert", "w_in").c1]
    assert torch.equal(new["row_var"], row_var[1:])
    assert torch.equal(new["col_var"], col_var[1:])
    step(optimizer, layer)


def test_an_optimizer_without_state_gets_none():
    layer = make_layer(3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    step(optimizer, layer)
    layer.freeze([0])
    sync_optimizer(optimizer, layer)
    assert_in_line(optimizer, layer)
    step(optimizer, layer)


def test_before_the_first_step():
    layer = make_layer(3)
    optimizer = torch.optim.Adam(layer.parameters())
    layer.freeze([0])
    sync_optimizer(optimizer, layer)
    assert_in_line(optimizer, layer)
    assert len(optimizer.state) == 0


def test_frozen_and_back_without_a_sync_keeps_the_moments():
    layer = make_layer(3)
    optimizer = torch.optim.Adam(layer.parameters())
    step(optimizer, layer)
    before = moments(optimizer, layer, "expert.w_in", "exp_avg")
    layer.freeze([1])
    layer.unfreeze([1])
    sync_optimizer(optimizer, layer)
    after = moments(optimizer, layer, "expert.w_in", "exp_avg")
    assert after.keys() == {0, 1, 2}
    assert all(torch.equal(after[i], before[i]) for i in after)


def test_frozen_and_back_with_a_sync_starts_again():
    layer = make_layer(3)
    optimizer = torch.optim.Adam(layer.parameters())
    step(optimizer, layer)
    layer.freeze([1])
    sync_optimizer(optimizer, layer)
    layer.unfreeze([1])
    sync_optimizer(optimizer, layer)
    assert moments(optimizer, layer, "expert.w_in", "exp_avg").keys() == {0, 2}
    assert_in_line(optimizer, layer)


def test_model_and_optimizer_copied_together_before_the_sync():
    layer = make_layer(3)
    optimizer = torch.optim.Adam(layer.parameters())
    step(optimizer, layer)
    before = moments(optimizer, layer, "expert.w_in", "exp_avg")
    layer.freeze([1])
    pairs = [copy.deepcopy((layer, optimizer)), copy.deepcopy((optimizer, layer))[::-1], (layer, optimizer)]
    for model, its_optimizer in pairs:  # the original comes last: the copies must not have disturbed it
        sync_optimizer(its_optimizer, model)
        assert_in_line(its_optimizer, model)
        after = moments(its_optimizer, model, "expert.w_in", "exp_avg")
        assert after.keys() == {0, 2}
        assert all(torch.equal(after[i], before[i]) for i in after)


def test_a_host_that_has_put_the_new_tensors_in_already():
    layer = make_layer(3)
    optimizer = torch.optim.Adam(layer.parameters())
    step(optimizer, layer)
    before = moments(optimizer, layer, "expert.w_in", "exp_avg")
    layer.freeze([1])
    fresh = [p for p in layer.parameters() if id(p) not in held(optimizer)]
    optimizer.param_groups[0]["params"].extend(fresh)  # as Avalanche does
    sync_optimizer(optimizer, layer)
    assert_in_line(optimizer, layer)
    after = moments(optimizer, layer, "expert.w_in", "exp_avg")
    assert all(torch.equal(after[i], before[i]) for i in (0, 2))


# -- what is held ----------------------------------------------------------------------------------


def test_twice_is_once():
    layer = make_layer(3)
    optimizer = torch.optim.Adam([{"params": layer.pool.parameters()}, {"params": [], "lr": 1.0}])
    step(optimizer, layer)
    layer.freeze([1])
    layer.add_experts(1)
    sync_optimizer(optimizer, layer)
    before = describe(optimizer)
    sync_optimizer(optimizer, layer)
    assert describe(optimizer) == before


def test_many_growths_stay_in_one_group():
    layer = make_layer(1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(8):
        step(optimizer, layer)
        layer.freeze()
        grow(layer)
        sync_optimizer(optimizer, layer)
        assert_in_line(optimizer, layer)
    assert len(optimizer.param_groups) == 1
    assert len(held(optimizer)) == 6  # four rows of the expert, weight and bias of its gate
    assert optimizer.param_groups[0].keys() == torch.optim.AdamW(layer.parameters()).param_groups[0].keys()


def two_groups(layer: MoELayer) -> torch.optim.Optimizer:
    experts = list(layer.pool.rows["expert"].parameters())
    gates = list(layer.pool.rows["gate"].parameters())
    return torch.optim.Adam([{"params": experts, "lr": 0.1}, {"params": gates, "lr": 0.01}])


def assert_two_groups(optimizer: torch.optim.Optimizer, layer: MoELayer) -> None:
    experts, gates = ([id(p) for p in layer.pool.rows[name].parameters()] for name in ("expert", "gate"))
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [experts, gates]


def test_a_new_cohort_joins_its_siblings_group():
    layer = make_layer(2)
    optimizer = two_groups(layer)
    step(optimizer, layer)
    layer.freeze([0])
    layer.add_experts(1)
    sync_optimizer(optimizer, layer)
    assert_two_groups(optimizer, layer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]


def test_a_new_cohort_joins_the_group_of_siblings_that_are_all_frozen():
    layer = make_layer(2)
    optimizer = two_groups(layer)
    layer.freeze()
    sync_optimizer(optimizer, layer)
    assert held(optimizer) == []
    saved = copy.deepcopy(optimizer.state_dict())
    layer.add_experts(1)
    other = copy.deepcopy(layer)
    sync_optimizer(optimizer, layer)
    assert_two_groups(optimizer, layer)
    # also through an optimizer's state dict
    resumed = torch.optim.Adam([{"params": []}, {"params": [nn.Parameter(torch.zeros(1))]}])
    resumed.param_groups[1]["params"].clear()
    resumed.load_state_dict(saved)
    sync_optimizer(resumed, other)
    assert_two_groups(resumed, other)


def test_frozen_shared_parts_leave_and_come_back():
    layer = make_layer(2, shared=nn.Linear(D, D))
    optimizer = torch.optim.SGD(
        [{"params": layer.pool.parameters(), "lr": 0.1}, {"params": layer.shared_expert.parameters(), "lr": 0.5}],
        momentum=0.9,
        weight_decay=0.1,
    )
    step(optimizer, layer)
    layer.freeze()
    sync_optimizer(optimizer, layer)
    assert held(optimizer) == []
    assert len(optimizer.state) == 0
    layer.shared_expert.requires_grad_(True)
    sync_optimizer(optimizer, layer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 2]
    assert_in_line(optimizer, layer.shared_expert)


def test_foreign_tensors_are_left_alone():
    layer = make_layer(2)
    first, last = nn.Linear(D, D), nn.Linear(D, D)
    model = nn.Sequential(first, layer, last)
    optimizer = torch.optim.Adam([*first.parameters(), *layer.parameters(), *last.parameters()])
    step(optimizer, model)
    state = {id(p): optimizer.state[p] for module in (first, last) for p in module.parameters()}
    layer.freeze([0])
    layer.add_experts(2)
    sync_optimizer(optimizer, layer)  # which knows nothing of first and last
    assert held(optimizer) == [id(p) for module in (first, layer, last) for p in module.parameters()]
    assert all(optimizer.state[p] is state[id(p)] for module in (first, last) for p in module.parameters())
    other = make_layer(1)
    sync_optimizer(optimizer, other)  # another model joins; nobody leaves
    assert_in_line(optimizer, first, layer, last, other)


def test_two_optimizers_on_one_model():
    layer = make_layer(2)
    pair = [torch.optim.Adam(layer.parameters()), torch.optim.SGD(layer.parameters(), momentum=0.9)]
    for optimizer in pair:
        step(optimizer, layer)
    before = [moments(o, layer, "gate.weight", k) for o, k in zip(pair, ("exp_avg", "momentum_buffer"), strict=True)]
    layer.freeze([0])
    for optimizer in pair:
        sync_optimizer(optimizer, layer)
        assert_in_line(optimizer, layer)
    after = [moments(o, layer, "gate.weight", k) for o, k in zip(pair, ("exp_avg", "momentum_buffer"), strict=True)]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(after, before, strict=True))


def test_an_optimizer_with_names_keeps_them_right():
    layer = make_layer(2)
    optimizer = torch.optim.Adam(layer.named_parameters())
    layer.freeze([0])
    layer.add_experts(1)
    sync_optimizer(optimizer, layer)
    (group,) = optimizer.param_groups
    assert dict(zip(group["param_names"], map(id, group["params"]), strict=True)) == {
        name: id(p) for name, p in layer.named_parameters()
    }


def test_training_goes_on_equally_after_save_and_load():
    layer = make_layer(2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(2):
        step(optimizer, layer)
        layer.freeze([layer.pool.ids[-1]])
        layer.add_experts(2)
        sync_optimizer(optimizer, layer)
        step(optimizer, layer)
    loaded = make_layer(1)
    loaded.load_state_dict(layer.state_dict())
    resumed = torch.optim.Adam(loaded.parameters(), lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, opt in ((layer, optimizer), (loaded, resumed)):
        step(opt, model)
    want, got = layer.state_dict(), loaded.state_dict()
    assert got.keys() == want.keys()
    assert [key for key in want if not torch.equal(got[key], want[key])] == []


def test_an_optimizer_does_not_mix_up_experts_of_before_and_after_a_load():
    layer = make_layer(2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(5, D)).sum().backward()
    optimizer.step()
    other = make_layer(1)
    other.add_experts(1, hidden_features=6)  # its row 1 is larger than the row 1 that the optimizer knows
    layer.load_state_dict(other.state_dict())
    sync_optimizer(optimizer, layer)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in layer.parameters()}
    assert len(optimizer.state) == 0
    layer(torch.randn(5, D)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == len(list(layer.parameters()))
