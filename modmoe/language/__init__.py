"""Causal language models on pools of experts: presets, training, generation, genres, conversions."""

from modmoe.language.attention import Cache, CausalAttention, HeadMixture
from modmoe.language.blocks import UNLIMITED, Block
from modmoe.language.convert import FEED_FORWARD, from_mixtral, mixed_branches, to_mixtral, upcycled
from modmoe.language.corpus import Genre, load_brown, sample_windows, split_genres, zen_genres, zen_of_python
from modmoe.language.generate import generate
from modmoe.language.genres import GenreLearner, mix_by_evidence, relative_rise
from modmoe.language.merging import PrefixSmearRouter
from modmoe.language.presets import PRESETS, PresetName, block_numbers, language_model
from modmoe.language.tokenizer import ByteTokenizer
from modmoe.language.training import fit, log_probabilities, mean_loss, perplexity, perplexity_by_genre
from modmoe.language.transformer import Balance, ModelSize, MoELanguageModel

__all__ = [
    "FEED_FORWARD",
    "PRESETS",
    "UNLIMITED",
    "Balance",
    "Block",
    "ByteTokenizer",
    "Cache",
    "CausalAttention",
    "Genre",
    "GenreLearner",
    "HeadMixture",
    "MoELanguageModel",
    "ModelSize",
    "PrefixSmearRouter",
    "PresetName",
    "block_numbers",
    "fit",
    "from_mixtral",
    "generate",
    "language_model",
    "load_brown",
    "log_probabilities",
    "mean_loss",
    "mix_by_evidence",
    "mixed_branches",
    "perplexity",
    "perplexity_by_genre",
    "relative_rise",
    "sample_windows",
    "split_genres",
    "to_mixtral",
    "upcycled",
    "zen_genres",
    "zen_of_python",
]
