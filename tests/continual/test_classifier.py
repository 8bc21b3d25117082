"""PoolClassifier: the mixture of the experts' class probabilities, growth, the shared backbone."""

import copy
import math

import pytest
import torch
from torch import nn

from modmoe.continual import UNKNOWN, ExpertPoolPlugin, PoolClassifier, task_positions
from modmoe.continual.features import PatchFeatures
from modmoe.continual.streams import split_digits, to_benchmark
from modmoe.experts import MLPExpert
from modmoe.gating import GaussianRouter, PrototypeRouter, TopKRouter
from modmoe.routing import Routing


def make(num_classes=4, top_k=1, **kwargs):
    torch.manual_seed(0)
    return PoolClassifier(MLPExpert(3, 5, 2), GaussianRouter(3, top_k=top_k), num_classes, **kwargs)


def fill_head(model, weight, bias):
    """Make head rows known: expert 0 owns classes 0 and 1, expert 1 owns classes 1 and 2."""
    for tensor, rows in model.pool.growable("head", "weight").live():
        for row in rows:
            tensor.data[rows.index(row)] = weight
    biases = iter(bias)
    for tensor, rows in model.pool.growable("head", "bias").live():
        for index in range(len(rows)):
            tensor.data[index] = next(biases)


def test_mixture_by_hand():
    model = make(top_k=2)
    model.begin_task([0, 1])
    model.begin_task([1, 2])
    # zero weights: expert 0 says softmax(log 1, log 3) = (1/4, 3/4) for classes 0, 1;
    # expert 1 says softmax(log 2, log 2) = (1/2, 1/2) for classes 1, 2
    fill_head(model, 0.0, [0.0, math.log(3), math.log(2), math.log(2)])
    routing = Routing(
        token_index=torch.tensor([0, 0]),
        expert_index=torch.tensor([0, 1]),
        weight=torch.tensor([0.8, 0.2]),
        num_tokens=1,
        num_experts=2,
        logits=torch.zeros(1, 2),
        probs=torch.tensor([[0.8, 0.2]]),
        top_k=2,
    )
    # p(0) = .8/4 = .2; p(1) = .8*3/4 + .2/2 = .7; p(2) = .2/2 = .1; class 3 is nobody's
    got = model.classify(torch.randn(1, 3), routing)
    expected = torch.tensor([[math.log(0.2), math.log(0.7), math.log(0.1), UNKNOWN]])
    torch.testing.assert_close(got, expected)


def test_before_any_task_everything_is_unknown_in_both_modes():
    model = make()
    for mode in (True, False):
        assert torch.equal(model.train(mode)(torch.randn(2, 3)), torch.full((2, 4), UNKNOWN))


def test_confident_scores_stay_finite_with_finite_gradients():
    model = make()
    model.begin_task([0, 1])
    fill_head(model, 0.0, [0.0, 1e4])
    out = model.train()(torch.randn(2, 3))
    nn.functional.cross_entropy(out, torch.tensor([1, 1])).backward()
    assert torch.isfinite(out).all()
    assert out[0, 1] == 0.0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_first_task_uses_the_first_expert_and_later_ones_grow():
    model = make()
    assert [model.begin_task([0, 1], task="a"), model.begin_task([2], task="b")] == [0, 1]
    assert model.classes_of() == {0: [0, 1], 1: [2]}
    assert model.pool.tasks() == ("a", "b")
    assert torch.equal(task_positions(model.pool, ["b", "a", "b"]), torch.tensor([1, 0, 1]))


def test_training_moves_the_current_expert_only():
    model = make()
    model.begin_task([0, 1])
    model.begin_task([2, 3])
    before = [model.pool.expert_state(i) for i in (0, 1)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model.train()(torch.randn(8, 3)), torch.randint(2, 4, (8,))).backward()
    optimizer.step()
    after = [model.pool.expert_state(i) for i in (0, 1)]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert not torch.equal(before[1]["expert.w_in"], after[1]["expert.w_in"])
    assert not torch.equal(before[1]["head.weight"], after[1]["head.weight"])


def test_eval_routes_each_sample_on_its_own():
    model = make()
    far = {0: torch.tensor([5.0, 0.0, 0.0]), 1: torch.tensor([-5.0, 0.0, 0.0])}
    for expert_id, classes in ((0, [0, 1]), (1, [2, 3])):
        assert model.begin_task(classes) == expert_id
        x = far[expert_id] + torch.randn(20, 3)
        model.observe(expert_id, x, torch.tensor(classes).repeat(10))
    model.eval()
    x = torch.stack([far[0], far[1], far[0]])
    together, alone = model(x), torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert torch.equal((together > UNKNOWN).int(), torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]]).int())


def test_frozen_backbone_keeps_its_normalisation_statistics():
    backbone = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model = make(backbone=backbone)
    model.begin_task([0])
    before = copy.deepcopy(backbone.state_dict())
    model.train()(torch.randn(16, 3))
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    assert not any(p.requires_grad for p in backbone.parameters())


def test_trainable_backbone_learns_until_it_is_frozen():
    model = make(backbone=nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), freeze_backbone=False)
    model.begin_task([0, 1])
    nn.functional.cross_entropy(model.train()(torch.randn(16, 3)), torch.randint(0, 2, (16,))).backward()
    assert model.backbone[0].weight.grad.abs().sum() > 0
    model.freeze_backbone()
    assert not model.backbone.training
    assert not model.train().backbone.training


def test_observe_leaves_modes_and_statistics_of_the_backbone_alone():
    model = make(backbone=nn.BatchNorm1d(3), freeze_backbone=False).train()
    model.begin_task([0])
    before = model.backbone.running_mean.clone()
    model.observe(0, torch.randn(8, 3) + 4, torch.zeros(8, dtype=torch.int64))
    assert model.backbone.training
    assert torch.equal(before, model.backbone.running_mean)


def test_load_into_a_fresh_model_reproduces_outputs_exactly():
    model = make(backbone=nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    for classes in ([0, 1], [2], [3]):
        expert_id = model.begin_task(classes)
        model.observe(
            expert_id, torch.randn(9, 3) + 3 * expert_id, torch.tensor(classes)[torch.arange(9) % len(classes)]
        )
        model.pool.freeze([expert_id])
    fresh = make(backbone=nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), freeze_backbone=False)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(11, 3)
    assert torch.equal(model.eval()(x), fresh.eval()(x))
    assert fresh.classes_of() == model.classes_of()
    assert fresh.pool.frozen_ids == (0, 1, 2)
    assert not any(p.requires_grad for p in fresh.backbone.parameters())
    assert fresh.begin_task([0]) == 3


@pytest.mark.parametrize("classes", [[], [4], [-1, 0]])
def test_classes_outside_the_range_change_nothing(classes):
    model = make()
    with pytest.raises(ValueError, match=r"class ids in \[0, 4\)"):
        model.begin_task(classes)
    assert model.classes_of() == {}
    assert model.pool.num_experts == 1


def test_bad_construction():
    with pytest.raises(ValueError, match="trained by gradient"):
        PoolClassifier(MLPExpert(3, 5, 2), TopKRouter(3, 1), 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        PoolClassifier(MLPExpert(3, 5, 2), PrototypeRouter(3), 0)
    with pytest.raises(ValueError, match="no expert belongs to task"):
        task_positions(make().pool, ["nowhere"])


def test_a_backbone_is_fitted_to_the_first_task_only(strategy_of):
    tasks = split_digits(0)[:2]
    torch.manual_seed(0)
    backbone = PatchFeatures(image_size=8, num_filters=6, patch_size=3, pool=2)
    size = backbone.out_features
    model = PoolClassifier(MLPExpert(size, 16, 8), GaussianRouter(size, regularization=0.1), 4, backbone=backbone)
    strategy = strategy_of(model, [ExpertPoolPlugin()], epochs=3, batch_size=32)
    stream = to_benchmark(tasks).train_stream
    strategy.train(stream[0])
    kernel = backbone.kernel.clone()
    alone = PatchFeatures(image_size=8, num_filters=6, patch_size=3, pool=2)
    alone.fit(tasks[0].train_x)
    assert torch.equal(kernel, alone.kernel)
    strategy.train(stream[1])
    assert torch.equal(kernel, backbone.kernel)
    x, y = (torch.cat([getattr(task, name) for task in tasks]) for name in ("test_x", "test_y"))
    assert (model.eval()(x).argmax(1) == y).double().mean() > 0.9


def test_before_any_class_nothing_is_known_whatever_the_backbone_lacks():
    model = PoolClassifier(MLPExpert(2 * 4 * 16, 4), GaussianRouter(2 * 4 * 16), 3, PatchFeatures(8, num_filters=4))
    for mode in (True, False):
        assert torch.equal(model.train(mode)(torch.rand(5, 64)), torch.full((5, 3), UNKNOWN))
