"""What a token gets depends on the token alone, whatever else is in its batch, on every backend."""

import pytest
import torch
from torch.testing import assert_close

from modmoe import DenseRouter, ExpertPool, GaussianRouter, MLPExpert, MoELayer, TopKRouter
from modmoe.kernels.select import CPU_BACKENDS


def routers() -> dict[str, MoELayer]:
    torch.manual_seed(3)
    layers = {
        "dense": MoELayer(ExpertPool(MLPExpert(8, 16), 5), DenseRouter(8)),
        "topk_softmax": MoELayer(ExpertPool(MLPExpert(8, 16), 5), TopKRouter(8, 2)),
        "top_1": MoELayer(ExpertPool(MLPExpert(8, 16), 5), TopKRouter(8, 1)),
        "gaussian": MoELayer(ExpertPool(MLPExpert(8, 16), 5), GaussianRouter(8, top_k=2)),
    }
    for expert_id in range(4):
        layers["gaussian"].observe(expert_id, torch.randn(30, 8) + expert_id, torch.arange(30) % 2)
    for layer in layers.values():
        layer.freeze([1])
    return layers


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("kind", ["dense", "topk_softmax", "top_1", "gaussian"])
def test_a_prediction_does_not_depend_on_the_rest_of_its_batch(kind, backend):
    layer = routers()[kind]
    layer.backend = backend
    x = torch.randn(33, 8)
    with torch.no_grad():
        together = layer(x)
        one_by_one = torch.cat([layer(row[None]) for row in x])
        shuffled = torch.randperm(33)
        mixed = layer(torch.cat([torch.randn(90, 8) * 3, x[shuffled]]))[90:]
        later_changed = torch.cat([x[:20], torch.randn(13, 8)])
    assert_close(one_by_one, together, atol=1e-6, rtol=0)
    assert_close(mixed, together[shuffled], atol=1e-6, rtol=0)
    with torch.no_grad():  # causal
        assert_close(layer(later_changed)[:20], together[:20], atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("kind", ["dense", "topk_softmax", "top_1", "gaussian"])
def test_padding_never_changes_a_real_token(kind, backend):
    layer = routers()[kind]
    layer.backend = backend
    x = torch.randn(12, 8)
    padded = torch.full((20, 8), torch.nan)
    place = torch.tensor([0, 2, 3, 4, 7, 8, 9, 10, 13, 14, 17, 19])
    padded[place] = x
    padded[5] = torch.inf
    padded[6] = 1e30
    mask = torch.zeros(20, dtype=torch.bool)
    mask[place] = True
    inputs, padded = x.requires_grad_(), padded.requires_grad_()
    y, y_padded = layer(inputs), layer(padded, mask=mask)
    assert_close(y_padded[place], y, atol=1e-6, rtol=0)
    assert (y_padded[~mask] == 0).all()
    loads = layer.routing.load
    assert loads.sum() == (layer.routing.expert_index >= 0).sum()
    assert (layer.routing.choices[~mask] == -1).all()
    y_padded.sum().backward()
    y.sum().backward()
    assert_close(padded.grad[place], inputs.grad, atol=1e-5, rtol=1e-5)
    assert (padded.grad[~mask] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
