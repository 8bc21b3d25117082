"""CosineRouter: the published number, lengths, the temperature, its shared parts, errors."""

import math

import pytest
import torch
from torch.testing import assert_close

from modmoe import CosineRouter, ExpertPool, MLPExpert, MoELayer


@pytest.fixture
def published(write_rows) -> MoELayer:
    """P is the identity, e = (1, 0), (0, 1), (1, 1)."""
    layer = MoELayer(ExpertPool(MLPExpert(2, 4), 3), CosineRouter(2, proj_features=2))
    assert isinstance(layer.router, CosineRouter)
    with torch.no_grad():
        layer.router.projection.copy_(torch.eye(2))
    write_rows(layer, "embedding", torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    return layer


def test_published_number(published):
    # x = (1, 2): cosines 1/sqrt 5 = .447214, 2/sqrt 5 = .894427, 3/sqrt 10 = .948683; times 2: .894427, 1.788854,
    # 1.897367; exponentials 2.445932, 5.982592, 6.668312 over their sum 15.096836
    routing = published.route(torch.tensor([[1.0, 2.0]]))
    assert_close(routing.probs, torch.tensor([[0.162016, 0.396281, 0.441703]]), atol=1e-5, rtol=0)
    assert routing.choices.tolist() == [[2]]
    assert_close(routing.weight, torch.tensor([0.441703]), atol=1e-5, rtol=0)


def test_lengths_do_not_matter(published, write_rows):
    x = torch.tensor([[1.0, 2.0], [-3.0, 1.0]])
    before = published.route(x).logits
    write_rows(published, "embedding", torch.tensor([[9.0, 0.0], [0.0, 0.1], [5.0, 5.0]]))
    assert_close(published.route(7 * x).logits, before)


def test_the_temperature_is_learned_and_clamped(published):
    x = torch.tensor([[1.0, 2.0]])
    published.route(x).weight.sum().backward()
    assert published.router.log_scale.grad.abs() > 0
    assert published.router.log_scale.exp().item() == pytest.approx(2)
    with torch.no_grad():
        published.router.log_scale.fill_(50.0)
    assert_close(published.route(x).logits[0, 1].item(), 100 * 2 / math.sqrt(5))  # tau = .01


@pytest.mark.parametrize("k", [1, 2])
def test_every_row_and_shared_part_learns(k, row_gradient):
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(6, 4), 3), CosineRouter(6, top_k=k))
    layer(torch.randn(60, 6)).square().sum().backward()
    assert (row_gradient(layer, "embedding").abs().sum(1) > 0).all()
    assert all(layer.router.get_parameter(name).grad.abs().max() > 0 for name in layer.router.shared_parts)


def test_a_zero_token_has_no_direction():
    layer = MoELayer(ExpertPool(MLPExpert(4, 4), 2), CosineRouter(4))
    x = torch.zeros(1, 4, requires_grad=True)
    routing = layer.route(x)
    assert (routing.logits == 0).all()
    routing.weight.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_freezing_all_freezes_the_shared_parts():
    torch.manual_seed(0)
    layer = MoELayer(ExpertPool(MLPExpert(4, 4), 2), CosineRouter(4))
    layer.freeze()
    assert not [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    x = torch.randn(5, 4)
    own = layer.expert_score(0, x)
    new = layer.add_experts(1)
    assert torch.equal(layer.expert_score(0, x), own)
    layer.route(x).weight.sum().backward()
    assert layer.router.projection.grad is None
    assert new == [2]


def test_size_of_the_projection():
    assert [CosineRouter(d).proj_features for d in (1, 8, 1024)] == [1, 4, 256]
    with pytest.raises(ValueError, match="proj_features must be at least 1, got 0"):
        CosineRouter(4, proj_features=0)
