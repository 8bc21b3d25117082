"""Tasks and models that the tests of neural processes share."""

import pytest
import torch

from modmoe.meta.processes import CNP, MDNCNP, NP, AttentiveNP, MoENeuralProcess
from modmoe.meta.task_batch import TaskBatch

SIZES = {"hidden_features": 12, "decoder_features": 10}
KINDS = {
    "cnp": lambda **sizes: CNP(**SIZES, **sizes),
    "mdn_cnp": lambda **sizes: MDNCNP(num_components=3, **SIZES, **sizes),
    "np": lambda **sizes: NP(code_features=5, **SIZES, **sizes),
    "attentive_np": lambda **sizes: AttentiveNP(code_features=5, **SIZES, **sizes),
    "moe_np": lambda **sizes: MoENeuralProcess(num_experts=3, code_features=5, **SIZES, **sizes),
}


@pytest.fixture
def tasks_of():
    """Random tasks: B, C context points, N targets, D inputs, M outputs (or classes)."""

    def build(
        num_tasks: int = 4,
        num_context: int = 6,
        num_targets: int = 5,
        inputs: int = 1,
        outputs: int = 1,
        num_classes: int | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> TaskBatch:
        generator = torch.Generator().manual_seed(seed)

        def draw(points: int, features: int) -> torch.Tensor:
            return torch.randn(num_tasks, points, features, generator=generator, dtype=dtype)

        def labels(points: int) -> torch.Tensor:
            assert num_classes is not None
            index = torch.randint(num_classes, (num_tasks, points), generator=generator)
            return torch.nn.functional.one_hot(index, num_classes).to(dtype)

        x, target_x = draw(num_context, inputs), draw(num_targets, inputs)
        if num_classes is not None:
            return TaskBatch(x, labels(num_context), target_x, labels(num_targets))
        return TaskBatch(x, draw(num_context, outputs), target_x, draw(num_targets, outputs))

    return build


@pytest.fixture
def model_of():
    """A small model of a kind with a fixed seed."""

    def build(kind: str, in_features: int = 1, seed: int = 0, **sizes):
        torch.manual_seed(seed)
        return KINDS[kind](in_features=in_features, **sizes)

    return build


@pytest.fixture
def seeded():
    """A new generator with a seed."""
    return lambda seed=0: torch.Generator().manual_seed(seed)
