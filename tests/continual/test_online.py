"""Online streams: parts of an experience, with and without task boundaries, and parts that are held back."""

import dataclasses

import pytest
import torch
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.training.plugins import SupervisedPlugin

import modmoe
from modmoe.continual import ExpertPoolPlugin, NewClasses, Novelty, PoolClassifier
from modmoe.continual.features import PatchFeatures
from modmoe.continual.streams import TaskData, split_digits, to_benchmark, to_online

pytestmark = [pytest.mark.filterwarnings("ignore:No loggers specified")]
D = 4


def make(strategy_of, router=None, epochs=8, batch_size=8, eval_every=-1, **options):
    torch.manual_seed(0)
    model = PoolClassifier(modmoe.MLPExpert(D, 8, 8), router or modmoe.GaussianRouter(D), 6)
    return model, strategy_of(
        model, [ExpertPoolPlugin(**options)], epochs=epochs, batch_size=batch_size, eval_every=eval_every
    )


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
    """Tasks of 240 samples in parts of 10: after 40 samples of warm-up and 20 parts of history there are 24 parts."""
    tasks = blobs(num_tasks, n=240)
    return tasks, to_online(tasks, 10)


def make_novel(strategy_of, new_classes=False, **options):
    rule = Novelty(num_projections=4, warmup=30, new_classes=new_classes)
    return make(strategy_of, epochs=2, batch_size=10, growth=rule, **options)


def test_novelty_finds_the_task_and_the_held_data_are_learned(blobs, strategy_of):
    tasks, parts = novelty_stream(blobs)
    model, strategy = make_novel(strategy_of)
    sizes = []
    for part in parts:
        strategy.train(part)
        sizes.append(model.pool.num_experts)
    # 24 parts a task: the 25th breaches and is held, the 26th breaches again: a new expert, which learns both
    assert sizes == [1] * 25 + [2] * 23
    assert model.classes_of() == {0: [0, 1], 1: [2, 3]}
    counts = [model.pool.expert_state(i)["gate.count"].sum().item() for i in (0, 1)]
    assert counts == [240, 240]
    assert accuracy(model, tasks) == 1.0


def test_novelty_sees_new_classes_among_inputs_that_look_alike(blobs, strategy_of):
    tasks, _ = novelty_stream(blobs)
    alike = [dataclasses.replace(tasks[0], train_y=tasks[0].train_y + 2 * i) for i in range(2)]
    for new_classes, experts in ((True, 2), (False, 1)):
        model, strategy = make_novel(strategy_of, new_classes=new_classes)
        strategy.train(to_online(alike, 10))
        assert model.pool.num_experts == experts
    # one odd sample in a part of known classes is no breach: half of a part is asked for
    odd = dataclasses.replace(tasks[0], train_y=torch.where(torch.arange(240) % 10 == 0, 3, tasks[0].train_y))
    model, strategy = make_novel(strategy_of, new_classes=True)
    strategy.train(to_online([tasks[0], odd], 10))
    assert model.pool.num_experts == 1
    assert model.classes_of() == {0: [0, 1, 3]}


def test_a_held_part_changes_nothing_and_a_false_alarm_is_learned_by_the_current_expert(blobs, strategy_of):
    _, parts = novelty_stream(blobs)
    model, strategy = make_novel(strategy_of)
    strategy.train(parts[:23])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    strategy.train(parts[24])  # one part of the other task in between
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert next(p.num_held for p in strategy.plugins if isinstance(p, ExpertPoolPlugin)) == 1
    strategy.train(parts[23])
    assert model.pool.num_experts == 1
    assert model.classes_of()[0] == [0, 1, 2, 3]
    assert model.pool.expert_state(0)["gate.count"].sum() == 250


def test_no_growth_beyond_the_cap(blobs, strategy_of):
    _, parts = novelty_stream(blobs, num_tasks=3)
    model, strategy = make_novel(strategy_of, max_experts=2)
    strategy.train(parts)
    assert model.classes_of() == {0: [0, 1], 1: [2, 3, 4, 5]}


class Listener:
    """A rule that never grows and writes down the parts that it is asked about."""

    def __init__(self):
        self.asked = []

    def decide(self, classifier, x, y):
        self.asked.append(len(x))
        return "train"

    def state(self):
        return {}

    def load_state(self, state):
        pass


def test_a_rule_is_asked_about_every_part_once(blobs, strategy_of):
    rule = Listener()
    model, strategy = make(strategy_of, epochs=1, growth=rule)
    strategy.train(to_online(blobs(1), 10))
    assert rule.asked == [10, 10, 4]
    assert model.pool.num_experts == 1


def test_an_expert_that_was_removed_or_frozen_is_replaced_by_a_new_one(blobs, strategy_of):
    tasks = blobs(1, n=80)
    model, strategy = make(strategy_of, epochs=1, growth=Listener())
    parts = to_online(tasks, 20)
    strategy.train(parts[0])
    model.pool.freeze([0])
    strategy.train(parts[1])  # the rule says "train"
    assert (model.training_id, model.pool.frozen_ids) == (1, (0,))
    model.pool.remove([1])
    strategy.train(parts[2])
    assert model.training_id == 2
    assert model.pool.expert_state(2)["gate.count"].sum() == 20


def test_a_task_whose_last_part_is_not_marked_is_frozen_when_the_next_one_begins(blobs, strategy_of):
    # Avalanche 0.6.0 forgets the mark if the size divides the task; to_online mends it
    stream = split_online_stream(to_benchmark(blobs(2)).train_stream, 8, access_task_boundaries=True)
    model, strategy = make(strategy_of, epochs=1)
    marks = []
    for part in stream:
        marks.append(part.is_last_subexp)
        strategy.train(part)
    assert not any(marks)
    assert model.pool.frozen_ids == (0,)
    assert model.classes_of() == {0: [0, 1], 1: [2, 3]}


# -- settling ----------------------------------------------------------------------------------------------


class Counted(modmoe.GaussianRouter):
    """Counts what would be a large system to solve."""

    def __init__(self):
        super().__init__(D)
        self.settled = []

    def settle(self, pool, namespace, expert_id):
        assert expert_id not in pool.frozen_ids
        self.settled.append(expert_id)


@pytest.mark.parametrize("boundaries", [True, False])
def test_the_gate_is_settled_once_a_call_and_task(boundaries, blobs, strategy_of):
    options = {} if boundaries else {"growth": NewClasses(min_classes=2)}
    model, strategy = make(strategy_of, router=Counted(), epochs=1, **options)
    parts = to_online(blobs(3), 6, access_task_boundaries=boundaries)  # four parts a task
    settled = model.layer.router.settled
    strategy.train(parts[:2])
    assert settled == [0]
    strategy.train(parts[2:])
    assert settled == [0, 0, 1, 2]


def test_plugins_that_come_later_find_a_settled_gate_at_the_end_of_a_task(blobs, strategy_of):
    # EWC's importances come from a pass in eval mode, in after_training_exp
    seen = []

    class Look(SupervisedPlugin):
        def after_training_exp(self, strategy, *args, **kwargs):
            seen.append(len(strategy.model.layer.router.settled))

    _, strategy = make(strategy_of, router=Counted(), epochs=1)
    strategy.plugins.insert(1, Look())
    strategy.train(to_online(blobs(2), 6, access_task_boundaries=True))  # four parts a task
    assert seen == [0, 0, 0, 1, 1, 1, 1, 2]


def test_an_eval_in_the_midst_of_training_sees_a_settled_gate(blobs, strategy_of):
    tasks = blobs(1)
    model, strategy = make(strategy_of, router=Counted(), epochs=1, eval_every=0)
    benchmark = to_benchmark(tasks)
    strategy.train(to_online(tasks, 6, access_task_boundaries=True), eval_streams=[benchmark.test_stream])
    # each of the four parts is followed by an eval of Avalanche's
    assert model.layer.router.settled == [0, 0, 0, 0]


def test_a_solved_gate_from_parts_equals_one_from_whole_tasks(blobs, strategy_of):
    tasks, scores = blobs(3), []
    for stream in (to_online(tasks, 6, access_task_boundaries=True), to_benchmark(tasks).train_stream):
        model, strategy = make(strategy_of, router=modmoe.StickRouter(D, 6, ridge=1.0), epochs=1)
        strategy.train(stream)
        assert model.pool.frozen_ids == (0, 1, 2)
        scores.append(torch.stack([model.layer.expert_score(i, tasks[1].test_x) for i in range(3)]))
    torch.testing.assert_close(*scores, atol=1e-3, rtol=1e-3)


# -- parts that are held for the backbone --------------------------------------------------------------------


def make_with_filters(strategy_of, **options):
    torch.manual_seed(0)
    backbone = PatchFeatures(image_size=8, num_filters=6, patch_size=3, pool=2)
    size = backbone.out_features
    router = modmoe.GaussianRouter(size, regularization=0.1)
    model = PoolClassifier(modmoe.MLPExpert(size, 8, 8), router, 4, backbone=backbone)
    return model, strategy_of(model, [ExpertPoolPlugin(**options)], epochs=1, batch_size=20)


def digits_in_parts(size=20, **options):
    return to_online(split_digits(0)[:2], size, **options)


@pytest.mark.parametrize(
    ("samples", "num_held"),
    [(None, 0), (20, 0), (21, 1), (100, 4)],
    ids=["first part", "exactly one part", "one more", "five parts"],
)
def test_a_backbone_waits_for_its_samples_and_what_was_held_is_learned(samples, num_held, strategy_of):
    model, strategy = make_with_filters(strategy_of, backbone_samples=samples, growth=Listener())
    parts = digits_in_parts()
    fresh = model.state_dict()
    fresh = {name: tensor.clone() for name, tensor in fresh.items()}
    for part in parts[:num_held]:
        strategy.train(part)
        assert all(torch.equal(fresh[name], tensor) for name, tensor in model.state_dict().items())
    strategy.train(parts[num_held])
    alone = PatchFeatures(image_size=8, num_filters=6, patch_size=3, pool=2)
    alone.fit(torch.stack([x for part in parts[: num_held + 1] for x, *_ in part.dataset]))
    assert torch.equal(model.backbone.kernel, alone.kernel)
    assert model.pool.expert_state(0)["gate.count"].sum() == 20 * (num_held + 1)
    rule = next(p.growth for p in strategy.plugins if isinstance(p, ExpertPoolPlugin))
    assert rule.asked == [20] * (num_held + 1)
    strategy.train(parts[num_held + 1])
    assert torch.equal(model.backbone.kernel, alone.kernel)
    assert model.pool.expert_state(0)["gate.count"].sum() == 20 * (num_held + 2)


def test_classes_that_were_held_get_their_head_rows(strategy_of):
    data = split_digits(0)[0]
    chosen = torch.cat([(data.train_y == label).nonzero()[:20, 0] for label in (0, 1)])
    task = TaskData(data.train_x[chosen], data.train_y[chosen], data.test_x, data.test_y)
    model, strategy = make_with_filters(strategy_of, backbone_samples=40)
    parts = to_online([task], 20, access_task_boundaries=True, shuffle=False)  # all zeros, then all ones
    strategy.train(parts)
    assert model.classes_of() == {0: [0, 1]}
    assert model.pool.expert_state(0)["gate.count"].tolist() == [20, 20]
    assert strategy.clock.train_iterations == 2  # batches of 20


def test_a_backbone_waits_no_longer_than_the_first_task(strategy_of):
    model, strategy = make_with_filters(strategy_of, backbone_samples=10_000)
    parts = digits_in_parts(90, access_task_boundaries=True)
    first = next(number for number, part in enumerate(parts) if part.is_last_subexp)
    assert first > 0
    for part in parts[:first]:
        strategy.train(part)
        assert not model.backbone.fitted
    strategy.train(parts[first])
    assert model.pool.frozen_ids == (0,)
    assert model.pool.expert_state(0)["gate.count"].sum() == sum(len(part.dataset) for part in parts[: first + 1])
    strategy.train(parts[first + 1])
    assert model.pool.num_experts == 2


def test_whole_experiences_are_never_held(strategy_of):
    model, strategy = make_with_filters(strategy_of, backbone_samples=10_000)
    strategy.train(to_benchmark(split_digits(0)[:1]).train_stream)
    assert model.backbone.fitted
    assert model.pool.frozen_ids == (0,)


def test_rule_arguments():
    with pytest.raises(ValueError, match="history at least 20"):
        Novelty(history=5)
    with pytest.raises(ValueError, match="max_experts limits a growth rule"):
        ExpertPoolPlugin(max_experts=3)
    with pytest.raises(ValueError, match="backbone_samples must be at least 1, got 0"):
        ExpertPoolPlugin(backbone_samples=0)
    with pytest.raises(ValueError, match="min_classes must be at least 1"):
        NewClasses(0)
