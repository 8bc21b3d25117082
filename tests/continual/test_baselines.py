"""Baselines: the size of progressive networks by hand, what they keep, and the selection of Expert Gate."""

from typing import Any

import pytest
import torch

from modmoe import MLPExpert
from modmoe.continual import ExpertPoolPlugin, PoolClassifier
from modmoe.continual.baselines import UNSEEN, ProgressiveNetworks, count_pnn, expert_gate
from modmoe.continual.streams import TaskData, to_benchmark

pytestmark = [
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def progressive(tasks, parameters=2000, **kwargs):
    torch.manual_seed(0)
    return ProgressiveNetworks(tasks, parameters, **{"learning_rate": 0.01, "batch_size": 8, "epochs": 20, **kwargs})


def samples(tasks):
    x, y = (torch.cat([getattr(task, name) for task in tasks]) for name in ("test_x", "test_y"))
    return x, y, torch.cat([torch.full((len(task.test_y),), i) for i, task in enumerate(tasks)])


def test_size_by_hand():
    # D = 4, H = 3, two tasks, heads of 2 and 4 classes.
    # First layer: columns 2 * (4*3 + 3) = 30; adapter V 4*3 + 3 = 15, one scalar, U 3*3 + 3 = 12: 58 in all.
    # Second layer: columns 2 * (3*3 + 3) = 24; adapter V 12, one scalar, U 12: 49. Heads: 3*2 + 2 + 3*4 + 4 = 24
    assert count_pnn(4, 3, [2, 4]) == 58 + 49 + 24


@pytest.mark.parametrize("same_classes", [False, True])
def test_the_built_network_has_the_size_that_was_asked_for(blobs, same_classes):
    tasks = blobs(4, same_classes=same_classes)
    learner = progressive(tasks, 2000, epochs=1)
    for experience in to_benchmark(tasks, task_labels=True).train_stream:
        learner.train_task(experience)
    assert learner.num_parameters == sum(p.numel() for p in learner.model.parameters())
    hidden, heads = learner.model.out_features_per_columns, [2] * 4 if same_classes else [2, 4, 6, 8]
    here, less, more = (abs(count_pnn(4, hidden + step, heads) - 2000) for step in (0, -1, 1))
    assert here <= min(less, more)


@pytest.mark.parametrize("same_classes", [False, True])
def test_it_learns_each_task_and_forgets_none(blobs, same_classes):
    tasks = blobs(3, same_classes=same_classes)
    x, y, task = samples(tasks)
    learner = progressive(tasks)
    seen = []
    for number, experience in enumerate(to_benchmark(tasks, task_labels=True).train_stream):
        learner.train_task(experience)
        got = learner.predict(x, task)
        assert torch.equal(got == UNSEEN, task > number)
        assert (got == y)[task <= number].double().mean() > 0.95
        seen.append(got)
    for number, got in enumerate(seen):
        assert torch.equal(got[task <= number], seen[-1][task <= number])


def test_a_prediction_comes_from_the_head_of_the_samples_own_task(blobs):
    tasks = blobs(3)
    learner = progressive(tasks, epochs=1)
    for experience in to_benchmark(tasks, task_labels=True).train_stream:
        learner.train_task(experience)
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    for number in range(3):
        assert set(learner.predict(x, torch.full((30,), number)).tolist()) <= {2 * number, 2 * number + 1}
    mixed = torch.arange(30) % 3
    alone = [learner.predict(row[None], task[None]) for row, task in zip(x, mixed, strict=True)]
    assert torch.equal(learner.predict(x, mixed), torch.cat(alone))


def test_negative_scores_do_not_lose_to_zeros_above_a_smaller_head(blobs):
    # Avalanche's own forward fills a smaller head's scores up with zeros
    tasks = blobs(3)
    x, _, task = samples(tasks)
    learner = progressive(tasks, epochs=1)
    for experience in to_benchmark(tasks, task_labels=True).train_stream:
        learner.train_task(experience)
    before = learner.predict(x, task)
    heads: Any = learner.model.classifier.classifiers
    for head in heads.values():
        head.classifier.bias.data -= 100
    assert torch.equal(learner.predict(x, task), before)


@pytest.mark.parametrize(("parameters", "num_tasks"), [(0, 2), (100, 0)])
def test_bad_sizes(blobs, parameters, num_tasks):
    with pytest.raises(ValueError, match=f"got {parameters} and {num_tasks} tasks"):
        ProgressiveNetworks(blobs(2)[:num_tasks], parameters)


def test_expert_gate_picks_by_reconstruction_sample_by_sample(strategy_of):
    # task t varies along its own two axes of twelve: only its own autoencoder, with 6 units, reconstructs it
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for number in range(3):
        x = torch.zeros(60, 12)
        x[:, 4 * number : 4 * number + 2] = 2 * torch.randn(60, 2, generator=generator)
        y = 2 * number + (x[:, 4 * number] > 0).long()
        tasks.append(TaskData(x, y, x, y))
    torch.manual_seed(0)
    model = PoolClassifier(MLPExpert(12, 16, 8), expert_gate(12), 6)
    strategy = strategy_of(model, [ExpertPoolPlugin()], epochs=10)
    for experience in to_benchmark(tasks).train_stream:
        strategy.train(experience)
    rows = model.pool.namespace(model.layer.namespace)
    assert rows.owner("label").tolist() == [0, 1, 2]  # one autoencoder for each expert
    assert rows["encoder"].shape == (3, 6, 12)
    x, y, task = samples(tasks)
    model.eval()
    chosen = model.layer.route(x).choices[:, 0]
    assert (chosen == task).double().mean() > 0.95  # near the origin all three reconstruct well
    errors = -model.layer.router.score(x, rows)
    assert torch.equal(chosen, errors.argmin(1))
    assert (model(x).argmax(1) == y).double().mean() > 0.9
