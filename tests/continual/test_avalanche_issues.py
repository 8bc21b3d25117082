"""Avalanche's issues about growing models, each with a test that ours is right.

Without a file name the test stands here; ``what_breaks``, ``any_model``, ... stand for test_what_breaks.py and so on.

| issue        | what it was                                          | test                                           |
|--------------|------------------------------------------------------|------------------------------------------------|
| #725         | reset_optimizer drops Adam's moments at every        | what_breaks: shared_tensors_keep_their_moments_|
|              | experience                                           | when_pools_grow; moments_count_every_step      |
| #1145, #1609 | several parameter groups: an assert; later, support  | what_breaks: several_parameter_groups_...,     |
|              | that guesses a new parameter's group by its name     | several_groups_beside_frozen_parts             |
| #1362        | every parameter is put into the optimizer, whatever  | chosen_parameters_stay_chosen,                 |
|              | the user chose                                       | a_chosen_part_in_several_groups                |
| #1591        | a module nested in another is adapted to every       | nested_modules_grow_once, any_model: wrapped_  |
|              | experience, its own or not                           | classifier_..., every_pool_grows_once_...      |
| #838         | eval before the first train, and in its midst        | periodic_eval_from_before_the_first_step       |
| #1197        | online parts do not know their classes, which come   | online: classes_that_appear_late_get_their_...,|
|              | late; adaptation at each part                        | with_boundaries_it_grows_once_per_task_...     |
| #1542        | a wrapped model is not seen to need task labels      | a_wrapped_model_needs_no_task_labels           |
| #1622, #1608 | benchmarks without task labels or                    | benchmarks_of_every_make                       |
|              | classes_in_this_experience                           |                                                |
| #1549, #1680,| save_checkpoint cannot pickle                        | avalanche_s_checkpoint_fails_and_ours_goes_on  |
| #1384        |                                                      |                                                |
| #1016        | going on with a saved model loses what plugins know  | resume: resumed_equals_uninterrupted           |
| #1023        | ExpertGate is bound to AlexNet                       | any_backbone_feeds_the_pool                    |
"""

import warnings

import pytest
import torch
from avalanche.benchmarks import (
    benchmark_from_datasets,
    class_incremental_benchmark,
    nc_benchmark,
    new_instances_benchmark,
    task_incremental_benchmark,
)
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.checkpointing import save_checkpoint
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from torch import nn
from torch.utils.data import TensorDataset

import modmoe
from modmoe.continual import ExpertPoolPlugin, PoolClassifier, resume_stream, save_stream
from modmoe.continual.features import RandomFeatures
from modmoe.continual.streams import to_benchmark

pytestmark = [
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
D = 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(D, 6)
        self.moe = modmoe.MoELayer(modmoe.ExpertPool(modmoe.MLPExpert(6, 5)), modmoe.DenseRouter(6))
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        return self.head(self.moe(self.backbone(x).relu()))


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def classifier(in_features=D, **options):
    torch.manual_seed(0)
    router = modmoe.GaussianRouter(in_features, regularization=0.1)
    return PoolClassifier(modmoe.MLPExpert(in_features, 6, 6), router, 10, **options)


def listed(strategy):
    return [id(p) for group in strategy.optimizer.param_groups for p in group["params"]]


def live(model):
    return [id(p) for p in model.parameters() if p.requires_grad]


def accuracy(model, tasks):
    x, y = torch.cat([t.test_x for t in tasks]), torch.cat([t.test_y for t in tasks])
    return float((model.eval()(x).argmax(1) == y).double().mean())


# -- the optimizer: #725, #1145, #1609, #1362 ------------------------------------------------------------------


def test_moments_count_every_step(blobs, strategy_of):
    model = Net()
    strategy = strategy_of(model, [ExpertPoolPlugin()], epochs=2)
    strategy.train(to_benchmark(blobs(3)).train_stream)
    # 24 samples in batches of 8, two epochs, three experiences
    assert strategy.optimizer.state[model.head.weight]["step"] == 3 * 2 * 3


def test_chosen_parameters_stay_chosen(blobs, strategy_of):
    model = Net()
    model.backbone.requires_grad_(False)
    before = model.backbone.weight.clone()
    chosen = lambda _: torch.optim.Adam([*model.moe.parameters(), *model.head.parameters()], lr=0.01)  # noqa: E731
    strategy = strategy_of(model, [ExpertPoolPlugin()], optimizer=chosen)
    for experience in to_benchmark(blobs(3)).train_stream:
        strategy.train(experience)
        assert listed(strategy) == live(model)
    assert torch.equal(before, model.backbone.weight)


def test_a_chosen_part_in_several_groups(blobs, strategy_of):
    # Avalanche by itself finds no group for the backbone, which is in none: AttributeError
    model = Net()
    model.backbone.requires_grad_(False)
    chosen = lambda _: torch.optim.Adam(  # noqa: E731
        [{"params": list(model.moe.parameters())}, {"params": list(model.head.parameters()), "lr": 0.1}]
    )
    strategy = strategy_of(model, [ExpertPoolPlugin()], optimizer=chosen)
    for experience in to_benchmark(blobs(3)).train_stream:
        strategy.train(experience)
        assert listed(strategy) == live(model)
        assert [len(group["params"]) for group in strategy.optimizer.param_groups] == [0, 2]


# -- modules in modules: #1591, #1542 ----------------------------------------------------------------------------


class MultiHead(MultiTaskModule):
    """Avalanche's growing heads, one for a task, over a pool that two paths lead to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = Wrapper(Wrapper(Net()))
        self.again = self.body.inner
        self.heads = MultiHeadClassifier(10, initial_out_features=2)

    def forward(self, x, task_labels):
        return self.heads(self.body(x), task_labels)


def test_nested_modules_grow_once(blobs, strategy_of):
    model = MultiHead()
    strategy = strategy_of(model, [ExpertPoolPlugin(mask_logits=False)], epochs=8)
    tasks = blobs(3, same_classes=True)
    benchmark = to_benchmark(tasks, task_labels=True)
    pool = model.again.inner.moe.pool
    for number, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        assert pool.num_experts == number + 1
        assert listed(strategy) == live(model)
    assert pool.tasks() == (None, 1, 2)
    assert list(model.heads.classifiers) == ["0", "1", "2"]
    strategy.eval(benchmark.test_stream)
    assert pool.num_experts == 3


@pytest.mark.parametrize("task_labels", [True, False])
def test_a_wrapped_model_needs_no_task_labels(task_labels, blobs, strategy_of):
    tasks, inner = blobs(3, same_classes=True), classifier()
    model = Wrapper(inner)
    strategy = strategy_of(model, [ExpertPoolPlugin()], epochs=8)
    benchmark = to_benchmark(tasks, task_labels=task_labels)
    strategy.train(benchmark.train_stream)
    strategy.eval(benchmark.test_stream)
    assert inner.pool.tasks() == (0, 1, 2)
    assert accuracy(model, tasks) == 1.0


# -- eval: #838 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [classifier, Net])
def test_periodic_eval_from_before_the_first_step(make, blobs, strategy_of):
    tasks, model = blobs(3), make()
    sizes, modes = [], []

    class Watch(ExpertPoolPlugin):
        def before_eval(self, strategy, *args, **kwargs):
            super().before_eval(strategy)
            sizes.append(next(iter(modmoe.pools(model).values())).num_experts)

        def before_forward(self, strategy, *args, **kwargs):
            super().before_forward(strategy)
            modes.append(model.training)

    benchmark = to_benchmark(tasks)
    strategy = strategy_of(model, [Watch()], epochs=2, eval_every=1)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
    # one eval before each call and one after each of two epochs
    assert sizes == [1, 1, 1, 1, 2, 2, 2, 3, 3]
    assert modes == [True] * (3 * 2 * 3)  # back in training mode after each eval


# -- benchmarks: #1622, #1608 ------------------------------------------------------------------------------------


def dataset(tasks):
    x, y = torch.cat([task.train_x for task in tasks]), torch.cat([task.train_y for task in tasks])
    data = TensorDataset(x, y)
    data.targets = y.tolist()
    return as_classification_dataset(data)


def by_class(tasks):
    data = dataset(tasks)
    return class_incremental_benchmark({"train": data, "test": data}, num_experiences=3, class_order=list(range(6)))


def by_dataset(tasks):
    sets = [dataset([task]) for task in tasks]
    return benchmark_from_datasets(train=sets, test=sets)


def by_instance(tasks):
    return new_instances_benchmark(dataset(tasks), dataset(tasks), num_experiences=3)


def by_nc(tasks):
    data = dataset(tasks)
    return nc_benchmark(data, data, 3, task_labels=True, fixed_class_order=list(range(6)))


BENCHMARKS = {
    "class_incremental": (by_class, True, False),
    "from_datasets": (by_dataset, False, False),
    "new_instances": (by_instance, False, False),
    "task_incremental": (lambda tasks: task_incremental_benchmark(by_class(tasks)), False, True),
    "nc": (by_nc, True, True),
}


@pytest.mark.parametrize("make_model", [classifier, Net])
@pytest.mark.parametrize(("make", "classes", "labels"), BENCHMARKS.values(), ids=BENCHMARKS)
def test_benchmarks_of_every_make(make, classes, labels, make_model, blobs, strategy_of):
    model = make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        benchmark = make(blobs(3))
    train, test = list(benchmark.train_stream), list(benchmark.test_stream)  # some streams can be read once only
    assert hasattr(train[1], "classes_in_this_experience") == classes
    assert hasattr(train[1], "task_labels") == labels
    strategy = strategy_of(model, [ExpertPoolPlugin()])
    strategy.eval(test)
    for number, experience in enumerate(train):
        strategy.train(experience)
        assert next(iter(modmoe.pools(model).values())).num_experts == number + 1
        assert listed(strategy) == live(model)
    strategy.eval(test)
    if make_model is classifier and make is not by_instance:
        assert list(model.classes_of().values()) == [[0, 1], [2, 3], [4, 5]]


# -- saving: #1549, #1680, #1384 ---------------------------------------------------------------------------------


def test_avalanche_s_checkpoint_fails_and_ours_goes_on(blobs, strategy_of, tmp_path):
    stream = list(to_benchmark(blobs(3)).train_stream)
    whole = strategy_of(Net(), [ExpertPoolPlugin()])
    whole.train(stream[:2])
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(whole, str(tmp_path / "theirs"))
    save_stream(tmp_path / "ours", whole)
    whole.train(stream[2])
    resumed = strategy_of(Net(), [ExpertPoolPlugin()])
    assert resume_stream(tmp_path / "ours", resumed) == 2
    assert listed(resumed) == live(resumed.model)
    resumed.train(stream[2])
    expected, got = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


# -- backbones: #1023 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        (lambda: RandomFeatures(D, 12), 12),
        (lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3)), 3),
        (lambda: nn.Sequential(nn.Linear(D, 8), nn.Tanh()), 8),
    ],
    ids=["random", "convolution", "layers"],
)
def test_any_backbone_feeds_the_pool(backbone, size, blobs, strategy_of):
    torch.manual_seed(0)
    tasks, model = blobs(3), classifier(size, backbone=backbone())
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    strategy = strategy_of(model, [ExpertPoolPlugin()], epochs=8)
    strategy.train(to_benchmark(tasks).train_stream)
    assert model.pool.num_experts == 3
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.state_dict().items())
    assert accuracy(model, tasks) > 0.8  # chance is 1/6
