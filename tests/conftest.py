"""What all tests share."""

import pytest
import torch

from modmoe import ExpertPool, MLPExpert, MoELayer, TopKRouter

# Small tensors: more threads only wait for each other, most of all where several test runs share a machine.
torch.set_num_threads(1)


@pytest.fixture
def layer_of():
    """A top-k layer of small experts with four features."""

    def build(num_experts: int = 3, top_k: int = 2, seed: int = 0, **options) -> MoELayer:
        torch.manual_seed(seed)
        return MoELayer(ExpertPool(MLPExpert(4, 8), num_experts), TopKRouter(4, top_k), **options)

    return build


@pytest.fixture
def with_tasks():
    """A layer with one expert for each task that is named."""

    def build(*tasks: str | int | None, top_k: int = 1) -> MoELayer:
        torch.manual_seed(0)
        layer = MoELayer(ExpertPool(MLPExpert(4, 8), 1, task=tasks[0]), TopKRouter(4, top_k=1))
        for task in tasks[1:]:
            layer.add_experts(1, task=task)
        layer.router.top_k = top_k
        return layer

    return build
