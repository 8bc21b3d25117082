"""What the tests of trained gates share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modmoe import ExpertPool, MLPExpert, MoELayer, Router


@pytest.fixture
def identity_layer() -> Callable[..., MoELayer]:
    """A layer whose logits are its input: the gate's weight is the identity."""

    def build(router: Router, num_experts: int = 3) -> MoELayer:
        torch.manual_seed(0)
        layer = MoELayer(ExpertPool(MLPExpert(router.in_features, 4), num_experts), router)
        set_rows(layer, "weight", torch.eye(num_experts, router.in_features))
        return layer

    return build


@pytest.fixture
def write_rows() -> Callable[[MoELayer, str, Tensor], None]:
    """Overwrite the gate's rows of one name, of a pool that has neither grown nor been frozen."""
    return set_rows


@pytest.fixture
def row_gradient() -> Callable[[MoELayer, str], Tensor]:
    """The gradient of the gate's rows of one name."""

    def read(layer: MoELayer, name: str = "weight") -> Tensor:
        gradient = layer.pool.growable(layer.namespace, name).banks()[0][0].grad
        assert gradient is not None
        return gradient

    return read


@torch.no_grad()
def set_rows(layer: MoELayer, name: str, values: Tensor) -> None:
    layer.pool.growable(layer.namespace, name).banks()[0][0].copy_(values)
