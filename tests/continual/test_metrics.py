"""The pool's Avalanche metrics against numbers counted by hand."""

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

import modmoe
from modmoe.continual import ExpertPoolPlugin, PoolClassifier
from modmoe.continual.metrics import RoutingAccuracy, pool_metrics
from modmoe.continual.streams import to_benchmark

pytestmark = [pytest.mark.filterwarnings("ignore:No loggers specified")]
D = 4


def train(blobs, strategy_of, num_train=3):
    torch.manual_seed(0)
    model = PoolClassifier(modmoe.MLPExpert(D, 8, 8), modmoe.GaussianRouter(D), 6)
    strategy = strategy_of(model, [ExpertPoolPlugin()], epochs=8)
    strategy.evaluator = EvaluationPlugin(*pool_metrics(), accuracy_metrics(stream=True))
    strategy.plugins = [strategy.evaluator if isinstance(p, EvaluationPlugin) else p for p in strategy.plugins]
    benchmark = to_benchmark(blobs(3))
    for experience in benchmark.train_stream[:num_train]:
        strategy.train(experience)
    results = strategy.eval(benchmark.test_stream)
    return strategy, {name.split("/")[0]: value for name, value in results.items()}


def test_a_perfect_pool(blobs, strategy_of):
    _, results = train(blobs, strategy_of)
    assert results["RoutingAccuracy"] == 1.0
    assert results["ExpertTaskInformation"] == pytest.approx(1.0)
    assert results["OracleGap"] == 0.0
    assert results["Top1_Acc_Stream"] == 1.0


def test_sizes_by_hand(blobs, strategy_of):
    _, results = train(blobs, strategy_of)
    # an expert: 4*8 + 8 + 8*8 + 8 = 112; a head row: 8 + 1; three experts with two classes each
    assert results["TotalParameters"] == 3 * 112 + 6 * 9
    assert results["TrainableParameters"] == 0.0
    # two of the three experts are idle for a sample
    assert results["ActiveParameters"] == 112 + 6 * 9
    # each class: head label (8 bytes), gate label (8), count, norm (4 each), mean (16), scatter and whitening (64 each)
    assert results["StatisticsBytes"] == 6 * (8 + 8 + 4 + 4 + 16 + 64 + 64)
    assert results["OptimizerBytes"] == 0.0


def test_experiences_not_trained_on_are_left_out(blobs, strategy_of):
    _, results = train(blobs, strategy_of, num_train=2)
    assert results["RoutingAccuracy"] == 1.0
    assert results["Top1_Acc_Stream"] == pytest.approx(2 / 3)


def test_oracle_gap_counts_what_wrong_routing_costs(blobs, strategy_of):
    strategy, _ = train(blobs, strategy_of)
    model = strategy.model
    model.pool.unfreeze([0])
    # expert 0's densities pushed far away: its 24 samples now go elsewhere, and are answered wrong
    mean = model.pool.growable("gate", "mean")
    mean.write(0, mean.stack([0]) + 1000)
    results = strategy.eval(to_benchmark(blobs(3)).test_stream)
    results = {name.split("/")[0]: value for name, value in results.items()}
    assert results["RoutingAccuracy"] == pytest.approx(2 / 3)
    assert results["OracleGap"] == pytest.approx(1 / 3)


def test_routing_metrics_need_a_classifier(blobs, strategy_of):
    strategy = strategy_of(nn.Linear(D, 6), [])
    strategy.plugins.append(EvaluationPlugin(RoutingAccuracy()))
    with pytest.raises(ValueError, match="need a PoolClassifier, the model is a Linear"):
        strategy.eval(to_benchmark(blobs(2)).test_stream)
