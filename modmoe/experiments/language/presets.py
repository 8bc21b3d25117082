"""Presets beside the dense model: equal active parameters, equal tokens."""

import math
import time

import numpy as np
import torch

from modmoe.analysis import Matrix, MethodRecord
from modmoe.experiments.language.settings import LanguageSettings
from modmoe.growth import count_parameters
from modmoe.language import (
    Genre,
    ModelSize,
    MoELanguageModel,
    fit,
    language_model,
    log_probabilities,
    mean_loss,
    upcycled,
)

ABOUT = {
    "dense": "a dense transformer",
    "switch": "one expert of many in every second block, with a capacity (Switch)",
    "gshard": "two experts of half the size in every second block, the second at random, with a capacity (GShard)",
    "glam": "two experts of half the size in every second block, with a capacity (GLaM)",
    "mixtral": "two experts of half the size in every block (Mixtral)",
    "deepseek": "three of many small experts and a shared one in every block, balanced by a bias (DeepSeekMoE)",
    "moa": "three of many attention heads, with shared keys and values (MoA)",
    "smear": "all experts merged into one, by the text so far (SMEAR, made causal)",
    "lory": "all experts merged into one, by the segment before (Lory)",
    "upcycled": "the dense model for half of the steps, then one of several copies of its feed-forward parts",
}


def run_preset(
    settings: LanguageSettings, size: ModelSize, method: str, corpus: dict[str, Genre], seed: int
) -> MethodRecord:
    """Train one model on all genres together, and test it on each."""
    text = torch.cat([genre.text for genre in corpus.values()])
    torch.manual_seed(seed)
    start = time.perf_counter()
    model = train(settings, size, method, text, seed)
    seconds = time.perf_counter() - start
    found = {
        name: log_probabilities(model, genre.held_out(settings.validation_tokens)) for name, genre in corpus.items()
    }
    loss = mean_loss([document for documents in found.values() for document in documents])
    each = np.array([[math.exp(mean_loss(documents)) for documents in found.values()]])
    return MethodRecord(
        {
            "validation_loss": loss,
            "perplexity": math.exp(loss),
            "parameters": float(count_parameters(model).total),
            "active_parameters": float(model.active_parameters()),
            "seconds": seconds,
        },
        matrices={"perplexity": Matrix(each, "model", "genre", [method], list(found))},
        about=ABOUT[method],
    )


def train(settings: LanguageSettings, size: ModelSize, method: str, text: torch.Tensor, seed: int) -> MoELanguageModel:
    """A model trained for ``settings.steps`` steps."""

    def train_for(model: MoELanguageModel, steps: int, seed: int) -> None:
        fit(model, text, steps, settings.batch_size, settings.learning_rate, seed=seed)

    if method != "upcycled":
        model = language_model(method, size, settings.num_experts)
        train_for(model, settings.steps, seed)
        return model
    half = settings.steps // 2
    dense = language_model("dense", size)
    train_for(dense, half, seed)
    model = upcycled(dense, settings.num_experts)
    train_for(model, settings.steps - half, seed + 1_000_000)  # other pieces than in the first half
    return model
