"""Online streams: parts of an experience, with and without task boundaries."""

import pytest
import torch

import modmoe
from modmoe.continual import ExpertPoolPlugin, NewClasses, Novelty, PoolClassifier, save_stream
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


def novelty_stream(blobs, num_tasks=2):
    """Tasks of 400 samples in parts of 10: after 100 samples of warm-up and 20 parts of history there is room."""
    tasks = blobs(num_tasks, n=400)
    return tasks, to_online(tasks, 10)


def novelty(**options):
    return Novelty(num_projections=4, warmup=100, **options)


def test_novelty_finds_the_task_and_the_held_data_are_learned(blobs, strategy_of):
    tasks, parts = novelty_stream(blobs)
    model, strategy = make(strategy_of, growth=novelty())
    sizes = []
    for part in parts:
        strategy.train(part)
        sizes.append(model.pool.num_experts)
    # 40 parts a task: the 41st breaches and is held, the 42nd breaches again: a new expert, which learns both
    assert sizes == [1] * 41 + [2] * 39
    assert model.classes_of() == {0: [0, 1], 1: [2, 3]}
    counts = [model.pool.expert_state(i)["gate.count"].sum().item() for i in (0, 1)]
    assert counts == [400, 400]
    assert accuracy(model, tasks) == 1.0


def test_a_held_part_changes_nothing_until_it_is_learned(blobs, strategy_of):
    _, parts = novelty_stream(blobs)
    model, strategy = make(strategy_of, growth=novelty())
    for part in parts[:40]:
        strategy.train(part)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    strategy.train(parts[40])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_false_alarm_is_learned_by_the_current_expert(blobs, strategy_of):
    _, parts = novelty_stream(blobs)
    model, strategy = make(strategy_of, growth=novelty())
    for part in [*parts[:39], parts[40], parts[39]]:  # one part of the other task in between
        strategy.train(part)
    assert model.pool.num_experts == 1
    assert model.classes_of()[0] == [0, 1, 2, 3]
    assert model.pool.expert_state(0)["gate.count"].sum() == 410


def test_no_growth_beyond_the_cap(blobs, strategy_of):
    _, parts = novelty_stream(blobs, num_tasks=3)
    model, strategy = make(strategy_of, growth=novelty(), max_experts=2)
    for part in parts:
        strategy.train(part)
    assert model.classes_of() == {0: [0, 1], 1: [2, 3, 4, 5]}


def test_a_rule_with_state_cannot_be_resumed(blobs, strategy_of, tmp_path):
    _, strategy = make(strategy_of, growth=novelty())
    with pytest.raises(ValueError, match="the state of the rule Novelty cannot be saved"):
        save_stream(tmp_path / "stream", strategy)


def test_rule_arguments():
    with pytest.raises(ValueError, match="history at least 20"):
        Novelty(history=5)
    with pytest.raises(ValueError, match="max_experts limits a growth rule"):
        ExpertPoolPlugin(max_experts=3)
    with pytest.raises(ValueError, match="min_classes must be at least 1"):
        NewClasses(0)
