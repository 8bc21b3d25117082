import copy

import pytest
import torch

from modmoe import sync_optimizer
from modmoe.meta.evidence import BayesianExpertClassifier, BayesianExpertMixture, prediction_loss


def train(model, tasks, optimizer, steps=5):
    for _ in range(steps):
        loss = prediction_loss(model(tasks), tasks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def densities(model, tasks, experts=None):
    predictive = model(tasks, experts)
    values = [predictive.log_marginal(tasks.target_y), predictive.log_joint(tasks.target_y), predictive.mean]
    return [value.detach().clone() for value in (*values, predictive.log_evidence, predictive.expert_evidence)]


@pytest.mark.parametrize("switch", [False, True])
def test_a_copy_changes_no_answer(mixture_of, tasks_of, switch):
    model, tasks = mixture_of(2, switch=switch), tasks_of()
    before = densities(model, tasks)
    assert model.grow(2, init="copy") == [2, 3]
    for value, old in zip(densities(model, tasks)[:4], before[:4], strict=True):
        torch.testing.assert_close(value, old)


@pytest.mark.parametrize("switch", [False, True])
def test_frozen_experts_answer_the_same_to_the_last_bit(mixture_of, tasks_of, switch):
    model, tasks = mixture_of(2, torch.float32, switch=switch), tasks_of(4, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
    train(model, tasks, optimizer)  # so that there is momentum
    model.freeze()
    old = model.pool.ids
    before, states = densities(model, tasks, old), [model.pool.expert_state(i) for i in old]
    (new,) = model.grow(1)
    sync_optimizer(optimizer, model)
    fresh = model.pool.expert_state(new)
    train(model, tasks_of(4, seed=1, dtype=torch.float32), optimizer)
    assert any(not torch.equal(value, fresh[name]) for name, value in model.pool.expert_state(new).items())
    for value, expected in zip(densities(model, tasks, old), before, strict=True):
        assert torch.equal(value, expected)
    assert torch.equal(densities(model, tasks)[4][:, :2], before[4])  # evidence, also with the new expert beside them
    for expert_id, state in zip(old, states, strict=True):
        for name, value in model.pool.expert_state(expert_id).items():
            assert torch.equal(value, state[name])


def test_survivors_keep_their_optimizer_state(mixture_of, tasks_of):
    model, tasks = mixture_of(2), tasks_of()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, tasks, optimizer)
    row = model.pool.growable("linear", "prior_mean")
    moment = optimizer.state[row.c0]["exp_avg"].clone()
    model.freeze([0])
    model.grow(1)
    sync_optimizer(optimizer, model)
    (kept,) = [tensor for tensor, rows in row.live() if rows[0].owner == 1]
    assert torch.equal(optimizer.state[kept]["exp_avg"], moment[1:])


def test_the_closest_expert_is_repeated_even_if_it_is_frozen(mixture_of, tasks_of):
    model, tasks = mixture_of(3), tasks_of()
    best = int(model.expert_evidence(tasks).sum(0).argmax())
    model.freeze([best])
    (new,) = model.grow(tasks, init="closest", task="later")
    evidence = model.expert_evidence(tasks)
    torch.testing.assert_close(evidence[:, 3], evidence[:, best])
    assert model.pool.record(new).task == "later"
    assert model.pool.frozen_ids == (best,)
    assert model.pool.namespace("gate", [new])["bias"].item() == 0.0  # a new expert's own prior weight
    assert model.grow(tasks) == [4]  # fresh


@pytest.mark.parametrize("kind", ["plain", "switch", "classifier"])
def test_a_state_dict_rebuilds_a_grown_model(tasks_of, kind):
    def build(num_experts):
        if kind == "classifier":
            return BayesianExpertClassifier(1, num_experts, 5, 4)
        return BayesianExpertMixture(1, 1, num_experts, 5, 4, switch=kind == "switch")

    torch.manual_seed(0)
    model = build(2)
    model.grow(2)
    model.freeze([0, 3])
    model.remove([1])
    if kind == "switch":
        torch.nn.init.constant_(model.breakpoints.location, 0.3)
    other = build(1)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    tasks = tasks_of(dtype=torch.float32)
    if kind == "classifier":
        labels = torch.nn.functional.one_hot(torch.arange(15).reshape(3, 5) % 3, 3).float()
        tasks = type(tasks)(tasks.context_x, labels, tasks.target_x, labels[:, :4])
    for value, expected in zip(densities(other, tasks), densities(model, tasks), strict=True):
        assert torch.equal(value, expected)
    assert other.pool.frozen_ids == (0, 3)


def test_seeded_runs_are_equal(tasks_of):
    def run():
        torch.manual_seed(3)
        model = BayesianExpertMixture(1, num_experts=2, hidden_features=5, num_features=4, switch=True)
        train(model, tasks_of(dtype=torch.float32), torch.optim.Adam(model.parameters(), 0.01))
        model.grow(1)
        return model.state_dict()

    first, second = run(), run()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bad_input(mixture_of):
    model = mixture_of(1)
    with pytest.raises(ValueError, match="needs the tasks"):
        model.grow(2, init="closest")
    with pytest.raises(ValueError, match="n must be at least 1"):
        model.grow(0)
    with pytest.raises(ValueError, match="at least one expert"):
        model.remove([0])
    model.freeze()
    with pytest.raises(ValueError, match="every expert is frozen"):
        model.grow(1, init="copy")
    assert model.pool.ids == (0,)
