"""ConvExpert: by hand, against a network of torch's own layers, and on a growing pool (backends: tests/kernels)."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from modmoe import ConvExpert, DenseRouter, ExpertPool, MoELayer, TopKRouter
from modmoe.kernels.reference import LoopOps


def test_by_hand():
    expert = ConvExpert((1, 2, 2), (1,), kernel_size=3)
    assert (expert.out_shape, expert.in_features, expert.out_features) == ((1, 2, 2), 4, 4)
    kernel = torch.tensor([[[[0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 0.0]]]])
    rows = {"kernel_0": kernel, "bias_0": torch.tensor([0.5])}
    # each pixel plus twice its right neighbour plus three times the one below, zeros outside, plus .5:
    # 1 2    1 + 4 + 9 + .5 = 14.5   2 + 0 + 12 + .5 = 14.5
    # 3 4    3 + 8 + 0 + .5 = 11.5   4 + 0 + 0 + .5 = 4.5
    y = expert.compute(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), LoopOps(rows))
    assert y.tolist() == [[14.5, 14.5, 11.5, 4.5]]


def test_one_expert_equals_a_network_of_torch_s_layers():
    torch.manual_seed(0)
    expert = ConvExpert((2, 9, 7), (3, 4), 5, kernel_size=5, stride=2, activation="relu")
    # (9 + 4 - 5) // 2 + 1 = 5 and (7 + 4 - 5) // 2 + 1 = 4; then 3 and 2
    assert expert.out_shape == (4, 3, 2)
    network = nn.Sequential(
        nn.Unflatten(1, (2, 9, 7)),
        nn.Conv2d(2, 3, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(3, 4, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    pool = ExpertPool(expert, 1)
    values = list(network.parameters())
    values[4] = nn.Parameter(values[4].T)  # rows are (in, out)
    for name, value in zip(expert.row_specs(), values, strict=True):
        with torch.no_grad():
            pool.growable("expert", name).banks()[0][0].copy_(value[None])
    x = torch.randn(6, 126)
    assert_close(MoELayer(pool, DenseRouter(126))(x), network(x), atol=1e-6, rtol=1e-5)


def test_columns_before_the_image_are_for_the_gate_only():
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(ConvExpert((1, 4, 4), (2,), 3, in_features=20), 2), TopKRouter(20, 1))
    x = torch.randn(5, 20)
    other = x.clone()
    other[:, :4] += 1
    for expert_id in (0, 1):
        assert torch.equal(layer.expert_output(expert_id, x), layer.expert_output(expert_id, other))
    assert not torch.equal(layer.expert_score(0, x), layer.expert_score(0, other))


def test_growth_and_freezing_leave_outputs_alone():
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(ConvExpert((1, 4, 4), (2, 3), 3), 2), DenseRouter(16))
    x = torch.randn(5, 16)
    before = [layer.expert_output(i, x) for i in (0, 1)]
    layer.freeze([0])
    (copied,) = layer.pool.add_experts(1, init="copy", source=1)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(x).square().mean().backward()
    optimizer.step()
    assert torch.equal(layer.expert_output(0, x), before[0])
    fresh = MoELayer(ExpertPool(ConvExpert((1, 4, 4), (2, 3), 3)), DenseRouter(16))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert copied in fresh.pool.ids


def test_it_learns_what_a_linear_map_cannot():
    # a bright pixel anywhere in the upper or in the lower half, on noise: 1 or 0
    torch.manual_seed(0)
    place, label = torch.randint(0, 18, (200,)), torch.randint(0, 2, (200,))
    x = 0.1 * torch.randn(200, 36)
    x[torch.arange(200), place + 18 * label] += 1.0 - 2.0 * torch.randint(0, 2, (200,))  # bright or dark
    layer = MoELayer(ExpertPool(ConvExpert((1, 6, 6), (8,), 2)), TopKRouter(36, 1))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(150):
        loss = nn.functional.cross_entropy(layer(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (layer(x).argmax(1) == label).double().mean() > 0.95


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"in_shape": (4, 4)}, "in_shape"),
        ({"channels": ()}, "at least one layer"),
        ({"channels": (0,)}, "at least 1"),
        ({"stride": 0}, "stride=0"),
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"out_features": 0}, "out_features at least 1"),
        ({"in_features": 15}, "has to hold the image's 16"),
        ({"activation": "sigmoid"}, "unknown activation 'sigmoid'"),
    ],
)
def test_refusals(options, match):
    with pytest.raises(ValueError, match=match):
        ConvExpert(**{"in_shape": (1, 4, 4), "channels": (2,), **options})
