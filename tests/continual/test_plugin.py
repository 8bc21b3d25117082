"""ExpertPoolPlugin on Avalanche: growth, freezing, masking and the optimizer at every boundary."""

import copy

import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn

from modmoe.continual import UNKNOWN, ExpertPoolPlugin, PoolClassifier
from modmoe.continual.streams import TaskData, to_benchmark
from modmoe.experts import MLPExpert
from modmoe.gating import GaussianRouter

pytestmark = [
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
D = 4


def blobs(num_tasks=3, n=24):
    """Two classes a task, each a tight blob around its own corner."""
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(2 * num_tasks, D, generator=generator)
    tasks = []
    for task in range(num_tasks):
        y = torch.arange(n) % 2 + 2 * task
        x = centres[y] + 0.3 * torch.randn(n, D, generator=generator)
        tasks.append(TaskData(x, y, x, y))
    return tasks


def make(num_classes=6, optimizer=None, plugins=(), epochs=8):
    torch.manual_seed(0)
    model = PoolClassifier(MLPExpert(D, 8, 8), GaussianRouter(D), num_classes)
    optimizer = optimizer or (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))
    strategy = Naive(
        model=model,
        optimizer=optimizer(model.parameters()),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        train_epochs=epochs,
        plugins=[ExpertPoolPlugin(), *plugins],
        evaluator=EvaluationPlugin(),
    )
    return model, strategy


def listed(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_learns_blobs_without_forgetting_and_grows_once_per_experience():
    tasks = blobs()
    model, strategy = make()
    for number, experience in enumerate(to_benchmark(tasks).train_stream):
        strategy.train(experience)
        assert model.pool.num_experts == number + 1
        assert model.pool.frozen_ids == tuple(range(number + 1))
    x, y = torch.cat([t.test_x for t in tasks]), torch.cat([t.test_y for t in tasks])
    assert (model.eval()(x).argmax(1) == y).double().mean() == 1.0
    assert model.pool.tasks() == (0, 1, 2)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    ],
    ids=["adam", "adamw", "sgd", "rmsprop"],
)
def test_first_expert_is_bit_identical_after_four_more_tasks(optimizer):
    tasks = blobs(num_tasks=5)
    model, strategy = make(num_classes=10, optimizer=optimizer, epochs=2)
    stream = list(to_benchmark(tasks).train_stream)
    strategy.train(stream[0])
    before = model.pool.expert_state(0)
    assert {"expert.w_in", "gate.whiten", "gate.mean", "head.weight", "head.label"} <= before.keys()
    x = tasks[0].test_x
    output, score = model.layer.expert_output(0, x), model.layer.expert_score(0, x)
    answer = model.eval()(x)
    for experience in stream[1:]:
        strategy.train(experience)
    assert same(before, model.pool.expert_state(0))
    assert torch.equal(output, model.layer.expert_output(0, x))
    assert torch.equal(score, model.layer.expert_score(0, x))
    # through the pool the products have other shapes, and may round differently in the last bit
    first_only = torch.zeros(model.pool.num_experts, dtype=torch.bool)
    first_only[0] = True
    torch.testing.assert_close(answer, model.classify(x, model.layer.route(x, expert_mask=first_only)))


class Watcher(ExpertPoolPlugin):
    """The plugin, writing down what holds at the boundaries and in the steps of each experience."""

    def __init__(self):
        super().__init__()
        self.lists, self.moved, self.outputs = [], [], []

    def before_training_exp(self, strategy, *args, **kwargs):
        super().before_training_exp(strategy)
        self.lists.append((listed(strategy.optimizer), list(strategy.model.parameters())))
        self.start = strategy.model.pool.expert_state(strategy.model.training_id)

    def after_forward(self, strategy, *args, **kwargs):
        super().after_forward(strategy)
        self.outputs.append(strategy.mb_output.detach().clone())

    def after_training_exp(self, strategy, *args, **kwargs):
        now = strategy.model.pool.expert_state(strategy.model.training_id)
        self.moved.append(not torch.equal(now["expert.w_in"], self.start["expert.w_in"]))
        super().after_training_exp(strategy)

    def after_training(self, strategy, *args, **kwargs):
        super().after_training(strategy)
        self.lists.append((listed(strategy.optimizer), []))


def watched():
    _, strategy = make(epochs=1)
    strategy.plugins = [p for p in strategy.plugins if not isinstance(p, ExpertPoolPlugin)]
    watcher = Watcher()
    strategy.plugins.insert(0, watcher)
    return strategy, watcher


def test_optimizer_holds_the_live_tensors_once_and_a_new_expert_moves_in_its_own_experience():
    strategy, watcher = watched()
    for experience in to_benchmark(blobs()).train_stream:
        strategy.train(experience)
    assert watcher.moved == [True, True, True]
    for held, live in watcher.lists:
        assert [id(p) for p in held] == [id(p) for p in live]
    assert len(strategy.optimizer.param_groups) == 1
    assert not strategy.optimizer.state  # all experts frozen: no state is kept for them


def test_logits_outside_the_experience_are_masked_in_training():
    strategy, watcher = watched()
    stream = list(to_benchmark(blobs()).train_stream)
    strategy.train(stream[0])
    strategy.train(stream[1])
    last = watcher.outputs[-1]
    assert (last[:, [0, 1, 4, 5]] == UNKNOWN).all()
    assert (last[:, [2, 3]] > UNKNOWN).all()


def test_eval_changes_nothing_before_the_first_train_and_after():
    benchmark = to_benchmark(blobs())
    model, strategy = make(epochs=1)
    for _ in range(2):
        before = copy.deepcopy(model.state_dict())
        params = [id(p) for p in listed(strategy.optimizer)]
        strategy.eval(benchmark.test_stream)
        assert same(before, model.state_dict())
        assert params == [id(p) for p in listed(strategy.optimizer)]
        strategy.train(benchmark.train_stream[0])


def test_seeded_runs_are_equal():
    states = []
    for _ in range(2):
        model, strategy = make(epochs=1)
        for experience in to_benchmark(blobs()).train_stream:
            strategy.train(experience)
        states.append(model.state_dict())
    assert same(*states)


def test_classes_seen_again_get_a_new_expert_of_their_own():
    tasks = [blobs()[0], blobs()[0]]
    model, strategy = make(epochs=1)
    for experience in to_benchmark(tasks).train_stream:
        strategy.train(experience)
    assert model.classes_of() == {0: [0, 1], 1: [0, 1]}


def test_other_models_are_refused_before_the_first_step():
    model = nn.Linear(D, 6)
    before = copy.deepcopy(model.state_dict())
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        plugins=[ExpertPoolPlugin()],
        evaluator=EvaluationPlugin(),
    )
    with pytest.raises(ValueError, match=r"needs a model with MoELayers .* Linear has none"):
        strategy.train(to_benchmark(blobs()).train_stream[0])
    assert same(before, model.state_dict())
