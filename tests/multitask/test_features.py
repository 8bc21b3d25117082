"""The front and the expert of one layer."""

import pytest
import torch

from modmoe import ExpertPool
from modmoe.multitask import FeatureFront, LayerExpert


def test_features_side_by_side_by_hand():
    front = FeatureFront(2, [2, 3], embedding_features=1)
    with torch.no_grad():
        front.table.weight.copy_(torch.tensor([[10.0], [11.0], [20.0], [21.0], [22.0]]))
    dense, categorical = torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 2]])
    assert front(dense, categorical).tolist() == [[1.0, 2.0, 11.0, 22.0]]
    assert front.out_features == 4
    assert FeatureFront(0, [2, 3], 1)(None, categorical).shape == (1, 2)
    assert FeatureFront(2)(dense) is not None
    assert torch.equal(FeatureFront(2)(dense), dense)


def test_gradcheck():
    front = FeatureFront(1, [3], 2).double()
    dense = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, _: front(x, torch.tensor([[0], [2], [2], [1]])), (dense, front.table.weight)
    )


def test_bad_features():
    front = FeatureFront(1, [2, 3])
    dense = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="categorical feature 1 must lie in \\[0, 3\\), got 3 to 3"):
        front(dense, torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match="categorical feature 0 must lie in \\[0, 2\\), got -1 to -1"):
        front(dense, torch.tensor([[-1, 0]]))
    with pytest.raises(ValueError, match="\\(B, 2\\) categorical features are needed, got none"):
        front(dense)
    with pytest.raises(ValueError, match="\\(B, 1\\) dense features are needed, got \\(1, 2\\)"):
        front(torch.zeros(1, 2), torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match="no categorical features are needed, got \\(1, 1\\)"):
        FeatureFront(1)(dense, torch.tensor([[0]]))
    with pytest.raises(ValueError, match=r"must be integers, got torch\.float32"):
        front(dense, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least one feature"):
        FeatureFront(0)
    with pytest.raises(ValueError, match="cardinalities and embedding_features at least 1"):
        FeatureFront(0, [0])


def test_an_expert_of_one_layer_by_hand_and_on_every_backend():
    from modmoe import MoELayer, TopKRouter

    layer = MoELayer(ExpertPool(LayerExpert(1, 2), 1), TopKRouter(1, 1, renormalize=True), backend="reference")
    with torch.no_grad():
        layer.pool.growable("expert", "weight").live()[0][0].copy_(torch.tensor([[[2.0, -1.0]]]))
        layer.pool.growable("expert", "bias").live()[0][0].copy_(torch.tensor([[1.0, 0.5]]))
    x = torch.tensor([[1.0], [-1.0]])
    expected = [[3.0, 0.0], [0.0, 1.5]]  # relu(2 + 1), relu(-1 + .5); relu(-2 + 1), relu(1 + .5)
    for backend in ("reference", "dense", "bmm", "grouped"):
        layer.backend = backend
        torch.testing.assert_close(layer(x), torch.tensor(expected))


def test_bad_expert():
    with pytest.raises(ValueError, match="at least 1, got 0 and 2"):
        LayerExpert(0, 2)
    with pytest.raises(ValueError, match="unknown activation 'sine'"):
        LayerExpert(1, 2, "sine")
