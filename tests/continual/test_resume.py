"""A stream that was stopped and resumed gives the same parameters as one that was not."""

import pytest
import torch
from avalanche.training.plugins import ReplayPlugin
from torch import nn

import modmoe
from modmoe.continual import ExpertPoolPlugin, PoolClassifier, resume_stream, save_stream
from modmoe.continual.streams import to_benchmark

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
    expected, got = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_plugins_whose_state_is_unknown_are_refused(blobs, strategy_of, tmp_path):
    strategy = strategy_of(classifier(), [ExpertPoolPlugin(), ReplayPlugin(mem_size=8)])
    with pytest.raises(ValueError, match="the state of \\['ReplayPlugin'\\] cannot be saved"):
        save_stream(tmp_path / "stream", strategy)
    with pytest.raises(ValueError, match="needs one ExpertPoolPlugin, it has 0"):
        save_stream(tmp_path / "stream", strategy_of(classifier(), []))
    assert not list(tmp_path.iterdir())
