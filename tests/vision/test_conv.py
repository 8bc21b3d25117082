"""Convolutional experts in a residual network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from modmoe import ConvExpert, DenseRouter, ExpertPool, MLPExpert, SmearRouter, SoftRouter, TopKRouter, count_parameters
from modmoe.vision import ConvMoELayer
from modmoe.vision.conv import ResidualBlock


def make_layer(num_experts=2, top_k=1, **options) -> ConvMoELayer:
    torch.manual_seed(0)
    pool = ExpertPool(ConvExpert((2, 4, 4), [3, 2], activation="relu"), num_experts)
    return ConvMoELayer(pool, TopKRouter(2, top_k, renormalize=True), **options)


def test_an_image_goes_to_the_expert_of_its_mean_by_hand():
    layer = make_layer()
    ((gate, _, _),) = layer.pool.growable("gate", "weight").banks()
    with torch.no_grad():
        gate.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    x = torch.zeros(2, 2, 4, 4)
    x[0, 1, 0, 0] = 1.0  # mean 1/16 in channel 1: expert 1
    x[1, 0, 3, 3] = 1.0  # in channel 0: expert 0
    y = layer(x)
    assert layer.routing.expert_index.tolist() == [1, 0]
    for image, expert_id in ((0, 1), (1, 0)):
        rows = {name: value[0] for name, value in layer.pool.expert_state(expert_id).items()}
        hidden = F.conv2d(x[image], rows["expert.kernel_0"], rows["expert.bias_0"], padding=1).relu()
        assert_close(y[image], F.conv2d(hidden, rows["expert.kernel_1"], rows["expert.bias_1"], padding=1))


def test_parameters_of_a_network_by_hand(build):
    # two stages of 8 and 16 channels, two blocks each, of which the second holds 3 experts; k = 2
    def convolution(c_in, c_out):
        return 9 * c_in * c_out + c_out

    bodies = {size: 2 * convolution(size, size) for size in (8, 16)}
    expected = convolution(1, 8) + convolution(8, 16) + 2 * 16 + 16 * 3 + 3  # stem, stride, norm, head
    for size, body in bodies.items():
        expected += body + 3 * (body + size) + 2 * 2 * size  # dense, experts with their gate rows, two norms
    count = count_parameters(build("conv"))
    assert count.total == expected
    assert count.total - count.active == sum(bodies.values())


def residual_blocks(model):
    return [part for stage in model.stages for part in stage if isinstance(part, ResidualBlock)]


def test_one_expert_equals_the_dense_block(build, images):
    dense, sparse = build("conv", blocks=[0]), build("conv", blocks="all", num_experts=1)
    dense.load_state_dict({k: v for k, v in sparse.state_dict().items() if ".body." not in k}, strict=False)
    residual_blocks(dense)[0].body = residual_blocks(sparse)[0].body
    with torch.no_grad():
        for twin, block in zip(residual_blocks(dense)[1:], residual_blocks(sparse)[1:], strict=True):
            state = block.body.pool.expert_state(0)
            for number, place in enumerate((0, 2)):
                twin.body[place].weight.copy_(state[f"expert.kernel_{number}"][0])
                twin.body[place].bias.copy_(state[f"expert.bias_{number}"][0])
    assert_close(sparse.eval()(images), dense.eval()(images), atol=1e-6, rtol=1e-5)


def test_a_shared_convolution_is_added():
    shared = nn.Conv2d(2, 2, 3, padding=1)
    x = torch.randn(3, 2, 4, 4)
    assert_close(make_layer(shared_expert=shared)(x), make_layer()(x) + shared(x))


@pytest.mark.parametrize("size", [7, 8, 9])
def test_odd_sizes(size, build):
    model = build("conv", image_size=size)
    assert model.forward_features(torch.randn(2, 1, size, size)).shape[2] == (size + 1) // 2


def test_it_learns(build):
    torch.manual_seed(0)
    y = torch.arange(48) % 3
    x = 0.3 * torch.randn(48, 1, 8, 8)
    x[range(48), 0, 2 * y] += 1.0  # a bright row whose height is the class
    model = build("conv")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (model.eval()(x).argmax(1) == y).double().mean() > 0.95


def test_bad_input(build):
    pool = ExpertPool(ConvExpert((2, 4, 4), [3, 2]), 2)
    with pytest.raises(ValueError, match="SoftRouter gives slots: it would mix the images of a batch"):
        ConvMoELayer(pool, SoftRouter(2))
    with pytest.raises(ValueError, match="SmearRouter gives merges"):
        ConvMoELayer(pool, SmearRouter(2))
    with pytest.raises(ValueError, match="takes 3 features, the maps have 2 channels"):
        ConvMoELayer(pool, DenseRouter(3))
    with pytest.raises(ValueError, match="ConvExpert without a linear map is needed, got MLPExpert"):
        ConvMoELayer(ExpertPool(MLPExpert(2, 4), 2), DenseRouter(2))
    with pytest.raises(ValueError, match=r"images of shape \(B, 2, 4, 4\) are needed, got \(1, 2, 5, 4\)"):
        make_layer()(torch.zeros(1, 2, 5, 4))
    with pytest.raises(ValueError, match=r"channels are multiples of 8, at least one, got \[8, 12\]"):
        build("conv", channels=(8, 12))
    with pytest.raises(ValueError, match=r"sizes must be at least 1, .* blocks_per_stage=0"):
        build("conv", blocks_per_stage=0)
