"""ExpertPoolPlugin on models that are not PoolClassifiers, on wrapped ones, and beside Avalanche's own plugins."""

import copy

import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import (
    AGEMPlugin,
    EWCPlugin,
    GDumbPlugin,
    LwFPlugin,
    MASPlugin,
    ReplayPlugin,
    RWalkPlugin,
    SynapticIntelligencePlugin,
)
from torch import nn
from torch.utils.data import TensorDataset

import modmoe
from modmoe.continual import ExpertPoolPlugin, NewClasses, PoolClassifier
from modmoe.continual.streams import to_benchmark

pytestmark = [
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
D = 4


class Net(nn.Module):
    """Backbone with BatchNorm, two MoE layers on one pool and one on another, and a shared head."""

    def __init__(self, num_classes=10, head=None):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU())
        shared = modmoe.ExpertPool(modmoe.MLPExpert(8, 6))
        self.first = modmoe.MoELayer(shared, modmoe.DenseRouter(8))
        self.second = modmoe.MoELayer(shared, modmoe.TopKRouter(8, 1))
        self.third = modmoe.MoELayer(modmoe.ExpertPool(modmoe.MLPExpert(8, 5), 2), modmoe.TopKRouter(8, 2))
        self.head = head or nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.backbone(x)
        for layer in (self.first, self.second, self.third):
            x = x + layer(x)
        return self.head(x)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def pool_classifier(num_classes=10):
    torch.manual_seed(0)
    return PoolClassifier(modmoe.MLPExpert(D, 8, 8), modmoe.GaussianRouter(D), num_classes)


def listed(strategy):
    return {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}


def live(model):
    return {id(p) for p in model.parameters() if p.requires_grad}


def test_every_pool_grows_once_per_experience_and_the_optimizer_follows(blobs, strategy_of):
    model = Net()
    strategy = strategy_of(model, [ExpertPoolPlugin(num_experts=2)])
    for number, experience in enumerate(to_benchmark(blobs(4)).train_stream):
        strategy.train(experience)
        # 1 and 2 experts to begin with, two more in each pool before each later experience
        assert (model.first.pool.num_experts, model.third.pool.num_experts) == (1 + 2 * number, 2 + 2 * number)
        assert model.first.pool.frozen_ids == model.first.pool.ids
        assert listed(strategy) == live(model)
        assert len(strategy.optimizer.param_groups) == 1


def test_frozen_experts_of_any_model_are_bit_identical_and_new_ones_move(blobs, strategy_of):
    model = Net()
    strategy = strategy_of(model, [ExpertPoolPlugin()])
    stream = list(to_benchmark(blobs(5)).train_stream)
    strategy.train(stream[0])
    before = [copy.deepcopy(layer.pool.expert_state(0)) for layer in (model.first, model.third)]
    for experience in stream[1:]:
        strategy.train(experience)
    for old, layer in zip(before, (model.first, model.third), strict=True):
        now = layer.pool.expert_state(0)
        assert all(torch.equal(old[name], now[name]) for name in old)
    states = [model.third.pool.expert_state(i)["expert.w_in"] for i in model.third.pool.ids]
    assert len({tuple(state.flatten().tolist()) for state in states}) == len(states)


def test_named_parts_are_frozen_after_the_first_task_with_their_normalisation(blobs, strategy_of):
    model = Net()
    strategy = strategy_of(model, [ExpertPoolPlugin(freeze_after_first=["backbone"])])
    stream = list(to_benchmark(blobs(3)).train_stream)
    before = copy.deepcopy(model.backbone.state_dict())
    strategy.train(stream[0])
    first = copy.deepcopy(model.backbone.state_dict())
    assert not torch.equal(before["1.running_mean"], first["1.running_mean"])
    for experience in stream[1:]:
        strategy.train(experience)
    assert all(torch.equal(first[name], tensor) for name, tensor in model.backbone.state_dict().items())
    assert listed(strategy) == live(model)


@pytest.mark.parametrize("wrap", [Wrapper, lambda m: Wrapper(Wrapper(m)), nn.Sequential], ids=["once", "twice", "seq"])
def test_wrapped_classifier_grows_once_per_experience(wrap, blobs, strategy_of):
    inner = pool_classifier()
    model = wrap(inner)
    strategy = strategy_of(model, [ExpertPoolPlugin()], epochs=8)
    tasks = blobs(3)
    for experience in to_benchmark(tasks).train_stream:
        strategy.train(experience)
    assert inner.pool.num_experts == 3
    assert listed(strategy) == live(model) == set()
    x, y = torch.cat([t.test_x for t in tasks]), torch.cat([t.test_y for t in tasks])
    assert (model.eval()(x).argmax(1) == y).double().mean() == 1.0


def test_avalanche_s_own_growing_head_works_beside_the_pools(blobs, strategy_of):
    model = Net(head=IncrementalClassifier(8, initial_out_features=1))
    strategy = strategy_of(model, [ExpertPoolPlugin(mask_logits=False)])
    tasks = blobs(3)
    x, y = torch.cat([task.train_x for task in tasks]), torch.cat([task.train_y for task in tasks])
    data = TensorDataset(x, y)
    data.targets = y.tolist()
    data = as_classification_dataset(data)
    benchmark = class_incremental_benchmark(
        {"train": data, "test": data}, num_experiences=3, class_order=list(range(6))
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    strategy.eval(benchmark.test_stream)
    assert model.head.classifier.out_features == 6
    assert listed(strategy) == live(model)


def test_eval_never_changes_any_model(blobs, strategy_of):
    benchmark = to_benchmark(blobs(3))
    model = Net()
    strategy = strategy_of(model, [ExpertPoolPlugin()])
    for _ in range(2):
        before = copy.deepcopy(model.state_dict())
        strategy.eval(benchmark.test_stream)
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        strategy.train(benchmark.train_stream[0])


def test_domain_incremental_stream(blobs, strategy_of):
    tasks = blobs(3, same_classes=True)
    model = pool_classifier(num_classes=2)
    strategy = strategy_of(model, [ExpertPoolPlugin()], epochs=8)
    for experience in to_benchmark(tasks).train_stream:
        strategy.train(experience)
    assert model.classes_of() == {0: [0, 1], 1: [0, 1], 2: [0, 1]}
    x, y = torch.cat([t.test_x for t in tasks]), torch.cat([t.test_y for t in tasks])
    assert (model.eval()(x).argmax(1) == y).double().mean() == 1.0


@pytest.mark.parametrize(
    "plugin",
    [
        lambda: EWCPlugin(ewc_lambda=10.0, mode="separate"),
        lambda: EWCPlugin(ewc_lambda=10.0, mode="online", decay_factor=0.5),
        lambda: MASPlugin(),
        lambda: AGEMPlugin(patterns_per_experience=8, sample_size=8),
        lambda: ReplayPlugin(mem_size=16),
        lambda: LwFPlugin(),
    ],
    ids=["ewc", "ewc-online", "mas", "agem", "replay", "lwf"],
)
@pytest.mark.parametrize("make", [Net, pool_classifier], ids=["any-model", "classifier"])
def test_avalanche_s_plugins_run_over_five_growths(make, plugin, blobs, strategy_of):
    model = make()
    strategy = strategy_of(model, [ExpertPoolPlugin(), plugin()])
    for experience in to_benchmark(blobs(5), task_labels=True).train_stream:
        strategy.train(experience)
        assert listed(strategy) == live(model)
    assert all(pool.num_experts == 5 + (pool.expert.hidden_features == 5) for pool in modmoe.pools(model).values())
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (lambda: SynapticIntelligencePlugin(si_lambda=1.0), r"its importance is exactly 0 .* EWCPlugin or MASPlugin"),
        (lambda: RWalkPlugin(), r"a fixed list of parameters .* EWCPlugin or MASPlugin"),
        (lambda: GDumbPlugin(), r"puts the untrained first model back .* ReplayPlugin"),
    ],
    ids=["si", "rwalk", "gdumb"],
)
def test_plugins_that_break_on_growth_are_refused_with_the_reason(plugin, reason, blobs, strategy_of):
    model = Net()
    before = copy.deepcopy(model.state_dict())
    strategy = strategy_of(model, [ExpertPoolPlugin(), plugin()])
    with pytest.raises(ValueError, match=rf"Plugin cannot be used beside ExpertPoolPlugin: .*{reason}"):
        strategy.train(to_benchmark(blobs()).train_stream[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_bad_input_is_refused_before_anything_grows(blobs, strategy_of):
    with pytest.raises(ValueError, match="num_experts must be at least 1"):
        ExpertPoolPlugin(num_experts=0)
    with pytest.raises(AttributeError, match="nowhere"):
        strategy_of(Net(), [ExpertPoolPlugin(freeze_after_first=["nowhere"])]).train(
            to_benchmark(blobs()).train_stream[0]
        )
    with pytest.raises(ValueError, match="a growth rule needs a PoolClassifier"):
        strategy_of(Net(), [ExpertPoolPlugin(growth=NewClasses())]).train(to_benchmark(blobs()).train_stream[0])


def test_a_stream_whose_feature_size_changes_is_refused_with_the_pool_unchanged(blobs, strategy_of):
    model = pool_classifier()
    strategy = strategy_of(model, [ExpertPoolPlugin()])
    tasks = blobs(2)
    wide = copy.copy(tasks[1])
    object.__setattr__(wide, "train_x", torch.cat([wide.train_x, wide.train_x], 1))
    stream = to_benchmark([tasks[0], wide]).train_stream
    strategy.train(stream[0])
    with pytest.raises(ValueError, match=r"need 4 features, inputs of shape \(8,\) give 8"):
        strategy.train(stream[1])
    assert model.pool.num_experts == 1


def test_one_sample_is_enough_for_an_experience(blobs, strategy_of):
    tasks = blobs(2)
    one = copy.copy(tasks[1])
    for name in ("train_x", "train_y"):
        object.__setattr__(one, name, getattr(one, name)[:1])
    model = pool_classifier()
    strategy = strategy_of(model, [ExpertPoolPlugin()], epochs=4)
    for experience in to_benchmark([tasks[0], one]).train_stream:
        strategy.train(experience)
    assert model.eval()(one.train_x).argmax(1).tolist() == one.train_y.tolist()
