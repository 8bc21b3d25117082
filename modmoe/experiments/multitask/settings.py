"""The settings of a multi-task run."""

from dataclasses import dataclass, field
from typing import Literal

Method = Literal["mmoe", "ple", "one_gate", "shared_bottom", "single_task"]
METHODS: list[Method] = ["mmoe", "ple", "one_gate", "shared_bottom", "single_task"]


@dataclass
class MultitaskSettings:
    """What can be set; mmoe has the sizes named here, the other methods those that give them as many parameters.

    Args:
        data: the paper's two synthetic tasks; KDD Census-Income (income above 50K, never married); or MovieLens 100k
            (like: a rating of at least 4, love: a rating of 5).
        methods: what runs, mmoe first.
        rho: cosine of the synthetic tasks' weights.
        num_train: training samples; null for all (synthetic: 20,000).
        num_test: test samples; null for all (synthetic: 4,000).
        root: folder of the tables that scripts/fetch_data.py gets.
        num_experts: of mmoe and one_gate, and in all at each level of ple: half of them shared.
        expert_features: output size of an expert of one layer.
        tower_features: hidden units of each tower.
        embedding_features: size of the embedding of each categorical feature.
        ple_levels: levels of ple.
        single_task_size: whether the single-task models are together as large as mmoe, or each.
        epochs: passes over the training data.
        batch_size: samples in a training step.
        learning_rate: of Adam; constant for the first half of the steps, then falling linearly to 0.
        balance: sum of the tasks' losses, or uncertainty weighting (Kendall et al. 2018).
    """

    data: Literal["synthetic", "census", "movielens"] = "synthetic"
    methods: list[Method] = field(default_factory=lambda: list(METHODS))
    rho: float = 0.0
    num_train: int | None = None
    num_test: int | None = None
    root: str = "data"
    num_experts: int = 8
    expert_features: int = 16
    tower_features: int = 8
    embedding_features: int = 8
    ple_levels: int = 2
    single_task_size: Literal["together", "each"] = "together"
    epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 0.01
    balance: Literal["sum", "uncertainty"] = "sum"

    def __post_init__(self) -> None:
        if not self.methods or self.methods[0] != "mmoe" or len(set(self.methods)) != len(self.methods):
            raise ValueError(f"methods start with 'mmoe', whose size the others take, each once; got {self.methods}")
        if "ple" in self.methods and self.num_experts < 4:
            raise ValueError(f"ple divides its experts: num_experts must be at least 4, got {self.num_experts}")
