"""The settings of a language run."""

from dataclasses import dataclass, field
from typing import Literal, get_args

Study = Literal["presets", "genres"]
PresetMethod = Literal["dense", "switch", "gshard", "glam", "mixtral", "deepseek", "moa", "smear", "lory", "upcycled"]
GenreMethod = Literal["pool", "oracle", "naive", "joint"]
Method = PresetMethod | GenreMethod


@dataclass
class LanguageSettings:
    """What can be set; all models of a run share the sizes named here.

    Args:
        study: presets trained on the whole corpus, each on equally many tokens; or genres learned one after the other.
        methods: what runs; for genres ``pool`` first, with whose numbers ``naive`` and ``joint`` are as large.
        corpus: brown, which `scripts/fetch_data.py brown` gets; or zen, some 4 kB in five writings, to try things out.
        root: folder of the corpus.
        genres: which, in the order of learning; empty for all of the corpus.
        validation_tokens: of each genre's held-out documents, at most so many bytes; null for all.
        context: tokens that a model reads at most.
        features: D.
        num_blocks: blocks of attention and feed-forward.
        num_heads: of ordinary attention.
        hidden_features: hidden size of a dense feed-forward part, and of a genre's expert.
        num_experts: see modmoe.language.language_model.
        steps: of training, for each method, or for each genre.
        batch_size: pieces of ``context`` tokens in a step.
        learning_rate: of AdamW, at its highest.
    """

    study: Study = "presets"
    methods: list[Method] = field(default_factory=lambda: ["dense", "mixtral"])
    corpus: Literal["brown", "zen"] = "brown"
    root: str = "data"
    genres: list[str] = field(default_factory=list)
    validation_tokens: int | None = 10_000
    context: int = 128
    features: int = 32
    num_blocks: int = 2
    num_heads: int = 2
    hidden_features: int = 128
    num_experts: int = 8
    steps: int = 800
    batch_size: int = 16
    learning_rate: float = 0.006

    def __post_init__(self) -> None:
        known = get_args(PresetMethod if self.study == "presets" else GenreMethod)
        if unknown := [method for method in self.methods if method not in known]:
            raise ValueError(f"the study '{self.study}' has the methods {list(known)}, not {unknown}")
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise ValueError(f"methods are named each once, got {self.methods}")
        if self.study == "genres" and self.methods[0] != "pool":
            raise ValueError(f"the study 'genres' starts with 'pool', got {self.methods}")
