"""Online streams: parts of an experience, with and without task boundaries."""

import pytest
import torch

import modmoe
from modmoe.continual import ExpertPoolPlugin, NewClasses, PoolClassifier
from modmoe.continual.streams import to_online

pytestmark = [pytest.mark.filterwarnings("ignore:No loggers specified")]
D = 4


def make(strategy_of, router=None, **options):
    torch.manual_seed(0)
    model = PoolClassifier(modmoe.MLPExpert(D, 8, 8), router or modmoe.GaussianRouter(D), 6)
    return model, strategy_of(model, [ExpertPoolPlugin(**options)], epochs=8)


def accuracy(model, tasks):
    x, y = torch.cat([t.test_x for t in tasks]), torch.cat([t.test_y for t in tasks])
    return float((model.eval()(x).argmax(1) == y).double().mean())


def test_with_boundaries_it_grows_once_per_task_not_per_part(blobs, strategy_of):
    tasks = blobs(3)
    model, strategy = make(strategy_of)
    for part in to_online(tasks, 6, access_task_boundaries=True):
        strategy.train(part)
        last_of_its_task = part.is_last_subexp
        assert (model.training_id in model.pool.frozen_ids) == last_of_its_task
    assert model.pool.num_experts == 3
    assert model.classes_of() == {0: [0, 1], 1: [2, 3], 2: [4, 5]}
    assert accuracy(model, tasks) == 1.0


def test_statistics_from_parts_equal_those_from_whole_experiences(blobs, strategy_of):
    tasks = blobs(2)
    model, strategy = make(strategy_of)
    for part in to_online(tasks, 5, access_task_boundaries=True):
        strategy.train(part)
    whole = modmoe.GaussianRouter(D)
    pool = modmoe.ExpertPool(modmoe.MLPExpert(D, 8, 8))
    layer = modmoe.MoELayer(pool, whole)
    layer.observe(0, tasks[0].train_x, tasks[0].train_y)
    parts, once = model.pool.expert_state(0), pool.expert_state(0)
    order = parts["gate.label"].argsort()
    for name in ("gate.mean", "gate.scatter", "gate.count", "gate.whiten"):
        torch.testing.assert_close(parts[name][order], once[name], atol=1e-4, rtol=1e-4)


def test_without_boundaries_a_rule_is_needed(blobs, strategy_of):
    model, strategy = make(strategy_of)
    before = model.state_dict()
    with pytest.raises(ValueError, match="needs a rule that says when to grow"):
        strategy.train(to_online(blobs(2), 6)[0])
    assert model.state_dict().keys() == before.keys()
    assert model.classes_of() == {}


def test_new_classes_rule_finds_the_tasks(blobs, strategy_of):
    tasks = blobs(3)
    model, strategy = make(strategy_of, growth=NewClasses(min_classes=2))
    for part in to_online(tasks, 6):
        strategy.train(part)
    assert model.classes_of() == {0: [0, 1], 1: [2, 3], 2: [4, 5]}
    assert model.pool.frozen_ids == (0, 1)  # nobody has said that the last task is over
    assert accuracy(model, tasks) == 1.0


def test_classes_that_appear_late_get_their_head_rows(blobs, strategy_of):
    tasks = blobs(1)
    model, strategy = make(strategy_of)
    order = tasks[0].train_y.argsort()
    sorted_task = type(tasks[0])(tasks[0].train_x[order], tasks[0].train_y[order], tasks[0].test_x, tasks[0].test_y)
    seen = []
    for part in to_online([sorted_task], 12, access_task_boundaries=True, shuffle=False):
        strategy.train(part)
        seen.append(model.classes_of()[0])
    assert seen == [[0], [0, 1]]
    live = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in strategy.optimizer.param_groups for p in group["params"]} == live


def test_a_gate_that_needs_all_data_at_once_refuses_parts(blobs, strategy_of):
    model, strategy = make(strategy_of, router=modmoe.PPCARouter(D, components=1, rank=2))
    with pytest.raises(ValueError, match=r"PPCARouter is fitted to all of a task's data at once"):
        strategy.train(to_online(blobs(1), 6, access_task_boundaries=True)[0])
    assert model.classes_of() == {}


def test_rule_arguments():
    with pytest.raises(ValueError, match="min_classes must be at least 1"):
        NewClasses(0)
