"""Language models on pools: presets beside the dense model, and genres one after the other."""

from modmoe.experiments.language.config import LanguageConfig

__all__ = ["LanguageConfig"]
