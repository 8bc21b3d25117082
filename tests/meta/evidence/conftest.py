"""What the tests of evidence-gated experts share."""

import pytest
import torch

from modmoe.meta import TaskBatch
from modmoe.meta.evidence import BayesianExpertMixture


@pytest.fixture
def mixture_of():
    """A small mixture with rows that are not at their initial values, so that no term of a formula vanishes."""

    def build(num_experts: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0, **options):
        torch.manual_seed(seed)
        options = {"in_features": 1, "hidden_features": 6, "num_features": 4, **options}
        model = BayesianExpertMixture(num_experts=num_experts, **options).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    return build


@pytest.fixture
def tasks_of():
    """Random tasks; a fifth of the context is masked if ``masked``."""

    def build(
        num_tasks=3, num_context=5, num_targets=4, inputs=1, outputs=1, dtype=torch.float64, masked=False, seed=0
    ) -> TaskBatch:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        mask = torch.rand(num_tasks, num_context, generator=generator) > 0.2 if masked else None
        return TaskBatch(
            draw(num_tasks, num_context, inputs),
            draw(num_tasks, num_context, outputs),
            draw(num_tasks, num_targets, inputs),
            draw(num_tasks, num_targets, outputs),
            mask,
        )

    return build
