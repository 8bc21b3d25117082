"""What the tests of language models share."""

import pytest
import torch

from modmoe.language import ModelSize, MoELanguageModel, language_model


@pytest.fixture
def size():
    """A size whose models run in milliseconds."""
    return ModelSize(vocab_size=19, context=24, features=16, num_blocks=2, num_heads=2, hidden_features=16)


@pytest.fixture
def build(size):
    """A seeded model of a preset, in evaluation."""

    def model_of(preset: str, num_experts: int = 4, seed: int = 0, **options) -> MoELanguageModel:
        torch.manual_seed(seed)
        return language_model(preset, size, num_experts, **options).eval()

    return model_of


@pytest.fixture
def domains_of():
    """(B,) domains where a preset needs them, or None."""

    def domains(preset: str, num_sequences: int) -> torch.Tensor | None:
        return torch.arange(num_sequences) % 3 if preset == "demix" else None

    return domains
