"""Image backbones in Avalanche streams: class-incremental digits, with growth for each experience."""

import copy

import pytest
import torch
from torch import nn

import modmoe
from modmoe.continual import ExpertPoolPlugin, PoolClassifier
from modmoe.continual.strategies import make_strategy
from modmoe.continual.streams import StreamSettings, load_stream, to_benchmark
from modmoe.vision import ViT, VMoE, dense_parts, moe_layers, to_moe

pytestmark = [
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SHAPE = {"image_size": 8, "patch_size": 2, "features": 16, "depth": 2, "num_heads": 2, "hidden_features": 32}


@pytest.fixture(scope="module")
def tasks():
    return load_stream("split_digits", 0, StreamSettings(limit=40))[:3]  # 2 classes each, 40 images a class


def vmoe(num_classes):
    torch.manual_seed(0)
    return VMoE(**SHAPE, num_classes=num_classes, in_channels=1, blocks="last-1", num_experts=3)


def converted(num_classes):
    torch.manual_seed(0)
    model = ViT(**SHAPE, num_classes=num_classes, in_channels=1)
    to_moe(model, "last-1", num_experts=3)
    return model


def of_pixels(model):
    """The stream's images are flat."""
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), model)


@pytest.mark.parametrize("make", [vmoe, converted])
def test_a_backbone_grows_with_each_experience_and_what_is_frozen_stays_bit_identical(make, tasks):
    model = of_pixels(make(10))
    shared = dense_parts(model)
    plugin = ExpertPoolPlugin(num_experts=2, freeze_after_first=shared)
    strategy = make_strategy(model, [plugin], 0.003, 20, epochs=2)
    pool = next(iter(modmoe.pools(model).values()))
    experts, parts = {}, {}
    for number, experience in enumerate(to_benchmark(tasks).train_stream):
        strategy.train(experience)
        assert pool.num_experts == 3 + 2 * number
        assert pool.frozen_ids == pool.ids
        now = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(tuple(shared))}
        assert all(torch.equal(parts[name], now[name]) for name in parts)
        for expert_id, old in experts.items():
            state = pool.expert_state(expert_id)
            assert all(torch.equal(old[row], state[row]) for row in old)
        parts = copy.deepcopy(now)
        experts = {i: pool.expert_state(i) for i in pool.ids}
        listed = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
        assert listed == {id(p) for p in model.parameters() if p.requires_grad}
    ((_, layer),) = moe_layers(model).items()
    strategy.eval(to_benchmark(tasks).test_stream)
    assert layer.routing.num_experts == 7
    assert layer.routing.load.sum() > 0


def test_under_a_pool_of_classifiers_a_frozen_backbone_s_answers_stay_bit_identical(tasks):
    backbone = of_pixels(vmoe(0))
    modmoe.freeze(backbone)
    model = PoolClassifier(modmoe.MLPExpert(16, 16), modmoe.GaussianRouter(16), 10, backbone=backbone)
    strategy = make_strategy(model, [ExpertPoolPlugin()], 0.01, 20, epochs=1)
    answers, first = [], tasks[0].test_x
    for experience in to_benchmark(tasks).train_stream:
        strategy.train(experience)
        answers.append(model.eval().layer.expert_output(0, model.features(first)))
    assert model.pool.num_experts == 3
    assert model.classes_of() == {0: [0, 1], 1: [2, 3], 2: [4, 5]}
    assert all(torch.equal(answer, answers[0]) for answer in answers)
