"""One task learned by two experts, as after a false alarm: found, merged, and room for the next task."""

import copy

import pytest
import torch
from torch import nn

from modmoe import GaussianRouter, MLPExpert, PPCARouter, sync_optimizer
from modmoe.continual import ConsolidationPlugin, ExpertPoolPlugin, PoolClassifier, merge_experts, redundant_experts
from modmoe.continual.streams import TaskData, to_benchmark, to_online
from modmoe.growth import pools

pytestmark = [
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
D = 4


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def draw_blobs(num_tasks, n=400):
    """Two classes a task, 8 standard deviations apart, so that any two experts can agree; test data are drawn anew."""
    generator = torch.Generator().manual_seed(3)
    tasks = []
    for task in range(num_tasks):
        apart = nn.functional.normalize(torch.randn(1, D, generator=generator))
        centres = 6 * torch.randn(1, D, generator=generator) + torch.cat([apart, -apart])
        y = torch.arange(2 * n) % 2
        x = centres[y] + 0.25 * torch.randn(2 * n, D, generator=generator)
        y = y + 2 * task
        tasks.append(TaskData(x[:n], y[:n], x[n:], y[n:]))
    return tasks


def halves(task):
    half = len(task.train_x) // 2
    return [
        TaskData(task.train_x[s], task.train_y[s], task.test_x, task.test_y) for s in (slice(half), slice(half, None))
    ]


def accuracy(model, tasks):
    x, y = torch.cat([t.test_x for t in tasks]), torch.cat([t.test_y for t in tasks])
    return float((model.eval()(x).argmax(1) == y).double().mean())


def learner(strategy_of, *plugins, **options):
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.03)

    torch.manual_seed(0)
    model = PoolClassifier(MLPExpert(D, 8, 8), GaussianRouter(D), 6)
    return model, strategy_of(model, [ExpertPoolPlugin(**options), *plugins], adam, epochs=12, batch_size=20)


def test_a_task_that_two_experts_learned_becomes_one_again(strategy_of):
    first, second = draw_blobs(2)
    model, strategy = learner(strategy_of)
    for experience in to_benchmark([first, *halves(second)]).train_stream:
        strategy.train(experience)
    assert model.pool.num_experts == 3
    before, known = accuracy(model, [first, second]), model.pool.expert_state(0)
    (pair,) = redundant_experts(model, second.train_x)
    assert {pair.keep, pair.drop} == {1, 2}
    merge_experts(model, pair.keep, pair.drop)
    sync_optimizer(strategy.optimizer, model)
    assert model.pool.num_experts == 2
    assert before > 0.95
    assert accuracy(model, [first, second]) >= before
    assert same(known, model.pool.expert_state(0))
    assert redundant_experts(model, second.train_x, min_agreement=0.01) == []


def test_the_plugin_merges_at_the_boundary_and_evaluation_changes_nothing(strategy_of):
    first, second = draw_blobs(2)
    model, strategy = learner(strategy_of, ConsolidationPlugin())
    stream = to_benchmark([first, *halves(second)])
    sizes = []
    for experience in stream.train_stream:
        strategy.train(experience)
        sizes.append(model.pool.num_experts)
        before = copy.deepcopy(model.state_dict())
        strategy.eval(stream.test_stream)
        assert same(before, model.state_dict())
    assert sizes == [1, 2, 2]
    assert model.pool.ids == (0, 3)
    assert model.pool.frozen_ids == (0, 3)
    assert model.pool.expert_state(3)["gate.count"].sum() == 400
    live = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in strategy.optimizer.param_groups for p in group["params"]} == live
    assert accuracy(model, [first, second]) > 0.95


class Alarms:
    """Grow when the gate has observed so many samples in all, whatever they are."""

    def __init__(self, *observed):
        self.observed = observed

    def decide(self, classifier, x, y):
        observed = int(classifier.pool.namespace("gate")["count"].sum())
        return "grow" if observed in self.observed else "train"


@pytest.mark.parametrize("consolidates", [False, True])
def test_under_a_cap_a_merged_false_alarm_leaves_room_for_the_next_task(strategy_of, consolidates):
    """Two tasks of 400 samples in parts of 40; a false alarm after 200, a true one after 400; room for two experts."""
    tasks = draw_blobs(2)
    plugins = [ConsolidationPlugin(min_samples=100)] if consolidates else []
    model, strategy = learner(strategy_of, *plugins, growth=Alarms(200, 400), max_experts=2)
    sizes = []
    for part in to_online(tasks, 40):
        strategy.train(part)
        sizes.append(model.pool.num_experts)
    if not consolidates:
        assert sizes == [1] * 5 + [2] * 15
        assert model.classes_of() == {0: [0, 1], 1: [0, 1, 2, 3]}  # the newest had to learn the second task as well
        return
    assert sizes == [1] * 5 + [2] * 2 + [1] * 3 + [2] * 10  # compared after three parts of 40, merged at once
    assert list(model.classes_of().values()) == [[0, 1], [2, 3]]
    counts = [model.pool.expert_state(i)["gate.count"].sum().item() for i in model.pool.ids]
    assert counts == [400, 400]
    assert accuracy(model, tasks) > 0.95


class HoldsAfterAlarm(Alarms):
    """A false alarm, and then nobody learns anything any more."""

    def decide(self, classifier, x, y):
        return super().decide(classifier, x, y) if classifier.pool.num_experts == 1 else "hold"


def test_parts_that_nobody_has_learned_are_not_compared(strategy_of):
    model, strategy = learner(strategy_of, ConsolidationPlugin(0.5, min_samples=80), growth=HoldsAfterAlarm(200))
    for part in to_online(draw_blobs(1), 40):
        strategy.train(part)
    assert model.pool.ids == (0, 1)  # of the 200 samples of the new expert's stream it has learned 40


def test_the_plugin_refuses(strategy_of):
    experience = to_benchmark(draw_blobs(1)).train_stream[0]
    model = PoolClassifier(MLPExpert(D, 8, 8), PPCARouter(D, components=1, rank=2), 6)
    with pytest.raises(ValueError, match="with a gate whose rows can be merged: PPCARouter cannot"):
        strategy_of(model, [ExpertPoolPlugin(), ConsolidationPlugin()]).train(experience)
    assert next(iter(pools(model).values())).num_experts == 1
    with pytest.raises(ValueError, match=r"a PoolClassifier is needed, .*: Linear cannot merge"):
        strategy_of(nn.Linear(D, 6), [ConsolidationPlugin()]).train(experience)
    with pytest.raises(ValueError, match="min_samples must be at least 1"):
        ConsolidationPlugin(min_samples=0)
    with pytest.raises(ValueError, match="min_agreement must be in"):
        ConsolidationPlugin(min_agreement=2)
