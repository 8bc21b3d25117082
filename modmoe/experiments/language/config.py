"""A language run: every method of a study, with one seed."""

from collections.abc import Callable
from dataclasses import dataclass

from modmoe.analysis import MethodRecord
from modmoe.errors import did_you_mean
from modmoe.experiments.language.genres import run_genres
from modmoe.experiments.language.presets import run_preset
from modmoe.experiments.language.settings import LanguageSettings
from modmoe.language import Genre, ModelSize, load_brown, zen_genres


@dataclass
class LanguageConfig(LanguageSettings):
    """Language models of bytes: mixtures beside a dense model, or genre after genre without being told which."""

    def run(self, seed: int, progress: Callable[[str], None]) -> dict[str, MethodRecord]:
        """Run every method with one seed; see `modmoe.experiments.registry.ExperimentConfig`."""
        progress("corpus")
        corpus = self.load()
        if self.study == "genres":
            return run_genres(self, self.size(), corpus, seed, progress)
        records = {}
        for method in self.methods:
            progress(method)
            records[method] = run_preset(self, self.size(), method, corpus, seed)
        return records

    def load(self) -> dict[str, Genre]:
        """The genres that are asked for, in that order.

        Raises:
            ValueError: on one that the corpus does not have.
        """
        corpus = zen_genres() if self.corpus == "zen" else load_brown(self.root)
        for genre in self.genres:
            if genre not in corpus:
                known = ", ".join(corpus)
                raise ValueError(
                    f"'{self.corpus}' has no genre '{genre}'{did_you_mean(genre, corpus)} (known: {known})"
                )
        return {genre: corpus[genre] for genre in self.genres or corpus}

    def size(self) -> ModelSize:
        """The models' size."""
        return ModelSize(
            context=self.context,
            features=self.features,
            num_blocks=self.num_blocks,
            num_heads=self.num_heads,
            hidden_features=self.hidden_features,
        )
