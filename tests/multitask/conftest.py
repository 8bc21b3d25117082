"""What the multi-task tests share."""

import pytest
import torch

from modmoe.multitask import PLE, FeatureFront, LayerExpert, MMoE

REGRESSIONS = {"a": "regression", "b": "regression"}


@pytest.fixture
def mmoe_of():
    """An MMoE of small experts with four dense features."""

    def build(num_experts: int = 3, tasks=REGRESSIONS, seed: int = 0) -> MMoE:
        torch.manual_seed(seed)
        return MMoE(FeatureFront(4), tasks, LayerExpert(4, 5), num_experts, tower_features=3)

    return build


@pytest.fixture
def ple_of():
    """A PLE of small experts with four dense features."""

    def build(num_shared: int = 2, num_own: int = 1, num_levels: int = 2, tasks=REGRESSIONS, seed: int = 0) -> PLE:
        torch.manual_seed(seed)
        front = FeatureFront(4)
        return PLE(front, tasks, lambda d: LayerExpert(d, 5), num_shared, num_own, num_levels, tower_features=3)

    return build


@pytest.fixture
def set_rows():
    """Write the trainable rows of one name, whatever cohorts they stand in, in the order of the pool."""

    def write(pool, namespace: str, name: str, values) -> None:
        values = torch.as_tensor(values)
        with torch.no_grad():
            for tensor, rows in pool.growable(namespace, name).live():
                tensor.copy_(values[[pool.ids.index(row.owner) for row in rows]])

    return write
