"""Genres learned one after the other, by a pool that grows and by one dense model."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from modmoe.analysis import Matrix, MethodRecord
from modmoe.experiments.language.settings import LanguageSettings
from modmoe.growth import count_parameters
from modmoe.language import (
    Genre,
    GenreLearner,
    ModelSize,
    fit,
    language_model,
    log_probabilities,
    mean_loss,
    relative_rise,
)

ABOUT = {
    "pool": "an expert for each genre; at test time no genre is told, the experts are mixed by their evidence so far",
    "oracle": "the experts of 'pool', told the genre: what perfect routing would give",
    "naive": "one dense model with as many numbers as 'pool', trained on the genres in sequence",
    "joint": "the same dense model trained on all genres at once, on as many tokens in all",
}
Predict = Callable[[str, list[Tensor]], list[Tensor]]  # genre and documents -> log-probabilities


class Course:
    """What a method predicts of every genre learned so far, after each genre.

    Args:
        corpus: genres in the order of learning.
        limit: validation tokens of each.
    """

    def __init__(self, corpus: dict[str, Genre], limit: int | None):
        self.documents = {name: genre.held_out(limit) for name, genre in corpus.items()}
        self.losses = np.full((len(corpus), len(corpus)), np.nan)

    def measure(self, after: int, predict: Predict) -> None:
        """Test all genres up to number ``after``."""
        for column, (name, documents) in enumerate(list(self.documents.items())[: after + 1]):
            self.losses[after, column] = mean_loss(predict(name, documents))

    def record(self, method: str, parameters: int, seconds: float) -> MethodRecord:
        """The numbers of a method that has been tested after each genre, or after the last one only."""
        names, last = list(self.documents), self.losses[-1]
        metrics = {"perplexity": math.exp(float(last.mean()))}
        if not np.isnan(self.losses.diagonal()).any():
            first = self.losses.diagonal()[:-1]
            rises = [relative_rise(*pair) for pair in zip(first, last, strict=False)]
            words = [bytes_per_word(self.documents[name]) for name in names]
            word_rises = [relative_rise(a * n, b * n) for a, b, n in zip(first, last, words, strict=False)]
            metrics |= {
                "rise": max(rises),
                "mean_rise": sum(rises) / len(rises),
                "word_rise": max(word_rises),
            }
        metrics |= {f"perplexity/{name}": math.exp(loss) for name, loss in zip(names, last, strict=True)}
        metrics |= {"parameters": float(parameters), "seconds": seconds}
        table = Matrix(np.exp(self.losses), "after genre", "genre", names, names)
        return MethodRecord(metrics, matrices={"perplexity": table}, about=ABOUT[method])


def run_genres(
    settings: LanguageSettings,
    size: ModelSize,
    corpus: dict[str, Genre],
    seed: int,
    progress: Callable[[str], None],
) -> dict[str, MethodRecord]:
    """Run every method with one seed.

    Raises:
        ValueError: on fewer than two genres.
    """
    if len(corpus) < 2:
        raise ValueError(f"genres that come one after the other are at least two, got {list(corpus)}")
    records = run_pool(settings, size, corpus, seed, progress)
    # as many numbers as the pool's experts have together
    wide = dataclasses.replace(size, hidden_features=size.hidden_features * len(corpus))
    for method in settings.methods:
        if method in ("naive", "joint"):
            progress(method)
            records[method] = run_dense(settings, wide, corpus, seed, method)
    return {method: records[method] for method in settings.methods}


def run_pool(
    settings: LanguageSettings, size: ModelSize, corpus: dict[str, Genre], seed: int, progress: Callable[[str], None]
) -> dict[str, MethodRecord]:
    """``pool``, and what its experts give when they are told the genre."""
    torch.manual_seed(seed)
    learner = GenreLearner(language_model("demix", size, num_experts=1))
    pool, oracle = (Course(corpus, settings.validation_tokens) for _ in range(2))
    seconds = 0.0
    for number, (name, genre) in enumerate(corpus.items()):
        progress(f"pool: {name}")
        start = time.perf_counter()
        learner.learn(name, genre.text, settings.steps, settings.batch_size, settings.learning_rate, seed + number)
        seconds += time.perf_counter() - start
        pool.measure(number, lambda _, documents: learner.log_probabilities(documents))
        oracle.measure(number, lambda name, documents: learner.log_probabilities(documents, name))
    size_in_all = learner.num_parameters
    return {
        "pool": pool.record("pool", size_in_all, seconds),
        "oracle": oracle.record("oracle", size_in_all, seconds),
    }


def run_dense(
    settings: LanguageSettings, size: ModelSize, corpus: dict[str, Genre], seed: int, method: str
) -> MethodRecord:
    """``naive`` or ``joint``."""
    torch.manual_seed(seed)
    model = language_model("dense", size)
    course = Course(corpus, settings.validation_tokens)
    texts = [genre.text for genre in corpus.values()]
    parts = texts if method == "naive" else [torch.cat(texts)]
    steps = settings.steps * len(texts) // len(parts)
    seconds = 0.0
    for number, text in enumerate(parts):
        start = time.perf_counter()
        fit(model, text, steps, settings.batch_size, settings.learning_rate, seed=seed + number)
        seconds += time.perf_counter() - start
        after = number if method == "naive" else len(texts) - 1
        course.measure(after, lambda _, documents: log_probabilities(model, documents))
    return course.record(method, count_parameters(model).total, seconds)


def bytes_per_word(documents: Sequence[Tensor]) -> float:
    """The mean length of a word with the space or the end of the line after it."""
    text = torch.cat(list(documents))
    return len(text) / max(1, int(((text == ord(" ")) | (text == ord("\n"))).sum()))
