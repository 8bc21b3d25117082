"""A stream that was stopped and resumed gives the same parameters as one that was not."""

import pytest
import torch
from avalanche.training.plugins import ReplayPlugin
from torch import nn

import modmoe
from modmoe.continual import ExpertPoolPlugin, NewClasses, Novelty, PoolClassifier, resume_stream, save_stream
from modmoe.continual.streams import to_benchmark, to_online
from modmoe.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
D = 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.moe = modmoe.MoELayer(modmoe.ExpertPool(modmoe.MLPExpert(8, 6), 2), modmoe.TopKRouter(8, 2))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.backbone(x)
        return self.head(x + self.moe(x))


def classifier():
    return PoolClassifier(modmoe.MLPExpert(D, 8, 8), modmoe.GaussianRouter(D), 10)


def build(make, strategy_of, **options):
    torch.manual_seed(0)
    return strategy_of(make(), [ExpertPoolPlugin(**options)], epochs=2)


@pytest.mark.parametrize(
    ("make", "options"),
    [(classifier, {}), (Net, {}), (Net, {"freeze_after_first": ["backbone"]})],
    ids=["classifier", "any-model", "frozen-backbone"],
)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumed_equals_uninterrupted(make, options, stop, blobs, strategy_of, tmp_path):
    stream = list(to_benchmark(blobs(4)).train_stream)
    whole = build(make, strategy_of, **options)
    for number, experience in enumerate(stream):
        whole.train(experience)
        if number + 1 == stop:
            save_stream(tmp_path / "stream", whole)
    torch.manual_seed(99)
    resumed = build(make, strategy_of, **options)
    done = resume_stream(tmp_path / "stream", resumed)
    assert done == stop
    for experience in stream[done:]:
        resumed.train(experience)
    assert_equal(whole, resumed)


def assert_equal(whole, resumed):
    expected, got = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


class Noted:
    """The decisions of a rule, written down."""

    def decide(self, classifier, x, y):
        decision = super().decide(classifier, x, y)
        self.decisions.append(decision)
        return decision


class NotedNovelty(Noted, Novelty):
    def __init__(self, num_projections=4):
        super().__init__(num_projections=num_projections, warmup=30)
        self.decisions = []


class NotedNewClasses(Noted, NewClasses):
    def __init__(self):
        super().__init__(min_classes=2)
        self.decisions = []


@pytest.mark.parametrize(
    ("rule", "stop"),
    [(NotedNovelty, 10), (NotedNovelty, 23), (NotedNovelty, 40), (NotedNewClasses, 30)],
    ids=["warm-up", "before the task ends", "second task", "new classes"],
)
def test_a_task_free_stream_goes_on_with_the_same_decisions(rule, stop, blobs, strategy_of, tmp_path):
    parts = to_online(blobs(3, n=240), 10)  # 24 parts a task
    whole_rule, resumed_rule = rule(), rule()
    torch.manual_seed(0)
    whole = strategy_of(classifier(), [ExpertPoolPlugin(growth=whole_rule)], batch_size=10)
    whole.train(parts[:stop])
    save_stream(tmp_path / "stream", whole)
    whole.train(parts[stop:])
    resumed = strategy_of(classifier(), [ExpertPoolPlugin(growth=resumed_rule)], batch_size=10)
    assert resume_stream(tmp_path / "stream", resumed) == stop
    resumed.train(parts[stop:])
    assert "grow" in resumed_rule.decisions
    assert resumed_rule.decisions == whole_rule.decisions[stop:]
    assert_equal(whole, resumed)


def test_a_task_goes_on_in_its_middle(blobs, strategy_of, tmp_path):
    parts = to_online(blobs(2), 6, access_task_boundaries=True)  # four parts a task
    whole = build(classifier, strategy_of)
    whole.train(parts[:6])
    assert whole.optimizer.state
    save_stream(tmp_path / "stream", whole)
    whole.train(parts[6:])
    resumed = build(classifier, strategy_of)
    resume_stream(tmp_path / "stream", resumed)
    resumed.train(parts[6:])
    assert resumed.model.pool.frozen_ids == (0, 1)
    assert_equal(whole, resumed)


def test_parts_that_are_held_cannot_be_saved(blobs, strategy_of, tmp_path):
    parts = to_online(blobs(2, n=240), 10)
    strategy = strategy_of(classifier(), [ExpertPoolPlugin(growth=NotedNovelty())], batch_size=10)
    strategy.train(parts[:25])  # the last one is a breach
    with pytest.raises(ValueError, match="1 parts of the stream are held back and would be lost"):
        save_stream(tmp_path / "stream", strategy)
    assert not list(tmp_path.iterdir())
    strategy.train(parts[25])
    save_stream(tmp_path / "stream", strategy)


def test_another_rule_does_not_fit(blobs, strategy_of, tmp_path):
    def with_rule(rule):
        return strategy_of(classifier(), [ExpertPoolPlugin(growth=rule)])

    strategy = with_rule(Novelty(num_projections=4))
    strategy.train(to_online(blobs(1), 10))
    save_stream(tmp_path / "stream", strategy)
    with pytest.raises(CheckpointError, match="saved with the growth rule Novelty, this plugin has None"):
        resume_stream(tmp_path / "stream", with_rule(None))
    with pytest.raises(CheckpointError, match="saved with the growth rule Novelty, this plugin has NewClasses"):
        resume_stream(tmp_path / "stream", with_rule(NewClasses()))
    with pytest.raises(ValueError, match="the state is of 4 projections, this rule has 5"):
        resume_stream(tmp_path / "stream", with_rule(Novelty(num_projections=5)))


def test_plugins_whose_state_is_unknown_are_refused(blobs, strategy_of, tmp_path):
    strategy = strategy_of(classifier(), [ExpertPoolPlugin(), ReplayPlugin(mem_size=8)])
    with pytest.raises(ValueError, match="the state of \\['ReplayPlugin'\\] cannot be saved"):
        save_stream(tmp_path / "stream", strategy)
    with pytest.raises(ValueError, match="needs one ExpertPoolPlugin, it has 0"):
        save_stream(tmp_path / "stream", strategy_of(classifier(), []))
    assert not list(tmp_path.iterdir())
