"""TaskPool: routing by the task label of each sample, on Avalanche's task-labelled streams."""

import copy
from typing import Any

import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark, nc_benchmark, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training.plugins import LwFPlugin, ReplayPlugin
from torch import nn
from torch.utils.data import TensorDataset

from modmoe import GaussianRouter, MLPExpert
from modmoe.continual import UNKNOWN, ExpertPoolPlugin, PoolClassifier, TaskPool, task_positions
from modmoe.continual.streams import TaskData, to_benchmark
from modmoe.gating import PrototypeRouter
from modmoe.routing import Routing

pytestmark = [
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def make(router=None, num_classes=6):
    torch.manual_seed(0)
    return TaskPool(PoolClassifier(MLPExpert(4, 8, 8), router or GaussianRouter(4), num_classes))


def overlapping(same_classes=False):
    """Three tasks at the same place: the label axis turns with the task, and no gate can tell them apart."""
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for task in range(3):
        x = torch.randn(200, 4, generator=generator)
        y = (x[:, task] > 0).long() + (0 if same_classes else 2 * task)
        tasks.append(TaskData(x[:100], y[:100], x[100:], y[100:]))
    return tasks


def trained(tasks, strategy_of, plugins=(), stream=None):
    model = make()
    strategy = strategy_of(model, [ExpertPoolPlugin(), *plugins], epochs=5, optimizer=fast)
    for experience in stream or to_benchmark(tasks, task_labels=True).train_stream:
        strategy.train(experience)
    return model.eval(), strategy


def fast(parameters):
    return torch.optim.Adam(parameters, lr=0.03)


def samples(tasks):
    """x, y and task of all test samples, in a mixed order."""
    x, y = (torch.cat([getattr(task, name) for task in tasks]) for name in ("test_x", "test_y"))
    task = torch.cat([torch.full((len(t.test_y),), i) for i, t in enumerate(tasks)])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    return x[order], y[order], task[order]


def accuracy(scores, y):
    return (scores.argmax(1) == y).double().mean().item()


@pytest.mark.parametrize("same_classes", [False, True], ids=["new classes", "new domains"])
def test_told_the_task_it_solves_what_its_gate_cannot(same_classes, strategy_of):
    tasks = overlapping(same_classes)
    model, _ = trained(tasks, strategy_of)
    x, y, task = samples(tasks)
    told, guessed = accuracy(model(x, task), y), accuracy(model.classifier(x), y)
    assert told > 0.9
    assert told > guessed + 0.2


def test_it_equals_routing_by_an_oracle_sample_by_sample(strategy_of):
    tasks = overlapping()
    model, _ = trained(tasks, strategy_of)
    x, _, task = samples(tasks)
    inner = model.classifier
    oracle = Routing.assigned(task_positions(inner.pool, task.tolist()), inner.pool.num_experts)
    assert torch.equal(model(x, task), inner.classify(inner.features(x), oracle))
    alone = torch.cat([model(row[None], label[None]) for row, label in zip(x, task, strict=True)])
    torch.testing.assert_close(model(x, task), alone, atol=1e-5, rtol=0)
    # classes of other tasks are nobody's there
    assert torch.equal((model(x, task) == UNKNOWN).sum(1), torch.full((len(x),), 4))


def test_one_label_for_all_and_none_for_every_task(strategy_of):
    tasks = overlapping()
    model, _ = trained(tasks, strategy_of)
    x, _, _ = samples(tasks)
    every = model(x, None)
    assert list(every) == model.tasks == [0, 1, 2]
    for task, scores in every.items():
        assert torch.equal(scores, model(x, task))
        assert torch.equal(scores, model(x, torch.full((len(x),), task)))
    assert not torch.equal(every[0], every[1])


def test_in_training_mode_the_expert_in_training_takes_every_sample(strategy_of):
    tasks = overlapping()
    model, _ = trained(tasks, strategy_of)
    x, _, task = samples(tasks)
    inner = model.train().classifier
    newest = Routing.assigned(torch.full((len(x),), 2), 3)
    assert torch.equal(model(x, task), inner.classify(x, newest))
    assert torch.equal(model(x, torch.full((len(x),), 99)), model(x, task))  # an expert of a new task may not exist yet


@pytest.mark.parametrize("router", [GaussianRouter(4, top_k=2), PrototypeRouter(4)], ids=["top 2", "prototype"])
def test_a_task_with_two_experts_is_divided_by_the_gate(router):
    model = make(router)
    inner = model.classifier
    far = torch.tensor([[4.0, 0, 0, 0], [-4.0, 0, 0, 0], [0, 4.0, 0, 0]])
    for position, (task, classes) in enumerate([(5, [0, 1]), (5, [2, 3]), (8, [4, 5])]):
        expert_id = inner.begin_task(classes, task=task)
        x = far[position] + torch.randn(20, 4, generator=torch.Generator().manual_seed(position))
        inner.observe(expert_id, x, torch.tensor(classes).repeat(10))
    scores = model.eval()(far, torch.tensor([5, 5, 8]))
    assert model.tasks == [5, 8]
    assert [int(c) // 2 for c in scores.argmax(1)] == [0, 1, 2]
    assert torch.equal(scores[:2, 4:], torch.full((2, 2), UNKNOWN))  # task 8's classes


@pytest.mark.parametrize(("labels", "unknown"), [(torch.tensor([0, 7, 1, 9]), r"\[7, 9\]"), (7, r"\[7\]")])
def test_an_unknown_label_is_named_with_the_known_ones(labels, unknown, strategy_of):
    model, _ = trained(overlapping()[:2], strategy_of)
    with pytest.raises(ValueError, match=rf"no expert belongs to task {unknown}, known are \[0, 1\]"):
        model(torch.randn(4, 4), labels)


def test_before_the_first_task_no_label_is_known():
    with pytest.raises(ValueError, match=r"no expert belongs to task \[0\], known are \[\]"):
        make().eval()(torch.randn(2, 4), torch.tensor([0, 0]))


@pytest.mark.parametrize("plugin", [lambda: ReplayPlugin(mem_size=30), lambda: LwFPlugin(1, 2)], ids=["replay", "lwf"])
def test_beside_avalanche_s_plugins(plugin, strategy_of):
    tasks = overlapping()
    model, _ = trained(tasks, strategy_of, [plugin()])
    x, y, task = samples(tasks)
    assert model.classifier.pool.tasks() == (0, 1, 2)
    assert accuracy(model(x, task), y) > 0.9


def by_nc_benchmark(tasks):
    return nc_benchmark(
        train_dataset=joined(tasks, "train"),
        test_dataset=joined(tasks, "test"),
        n_experiences=3,
        task_labels=True,
        shuffle=False,
    )


def by_task_incremental_benchmark(tasks):
    sets: Any = {part: joined(tasks, part) for part in ("train", "test")}
    labelled: Any = task_incremental_benchmark(
        class_incremental_benchmark(sets, class_order=list(range(6)), num_experiences=3)
    )
    assert not hasattr(labelled.train_stream[0], "classes_in_this_experience")
    return labelled


def joined(tasks, part):
    x, y = (torch.cat([getattr(task, f"{part}_{name}") for task in tasks]) for name in "xy")
    data: Any = TensorDataset(x, y)
    data.targets = y.tolist()
    return as_classification_dataset(data)


@pytest.mark.parametrize("make_benchmark", [by_nc_benchmark, by_task_incremental_benchmark])
def test_avalanche_s_own_task_labelled_streams_train_and_evaluate(make_benchmark, strategy_of):
    tasks = overlapping()
    benchmark = make_benchmark(tasks)
    model, strategy = trained(tasks, strategy_of, stream=benchmark.train_stream)
    before = copy.deepcopy(model.state_dict())
    evaluated, right = [], []

    class Watch(nn.CrossEntropyLoss):
        def forward(self, scores, y):
            evaluated.append(len(y))
            right.append((scores.argmax(1) == y).sum().item())
            return super().forward(scores, y)

    strategy._criterion = Watch()
    strategy.eval(benchmark.test_stream)
    assert sum(evaluated) == 300
    assert sum(right) / 300 > 0.9
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
