"""The settings of a study on the five families, and the learner that each method is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from modmoe.experiments.meta.training import Schedule
from modmoe.meta import Predictive
from modmoe.meta.evidence import BayesianExpertMixture, prediction_loss
from modmoe.meta.families import FamilyTasks
from modmoe.meta.processes import CNP, MDNCNP, NP, MoENeuralProcess, NeuralProcess
from modmoe.pool import ExpertPool

Method = Literal[
    "cnp",
    "np",
    "mdn_cnp",
    "moe_np",
    "bem_k1",
    "bem_k3",
    "bem_k3_switch",
    "maml",
    "maml_wide",
    "maml_routed",
    "maml_oracle",
]
METHODS: list[Method] = list(Method.__args__)  # type: ignore[attr-defined]

ABOUT: dict[Method, str] = {
    "cnp": "conditional neural process",
    "np": "neural process with a latent of 64 numbers, trained by NPML with 4 draws",
    "mdn_cnp": "conditional neural process whose outputs are mixtures of three Gaussians",
    "moe_np": "MoE-NP style: three experts with a slot, a latent and a decoder each; NPML with 2 draws, exact mixture",
    "bem_k1": "one Bayesian expert of the size of three",
    "bem_k3": "three Bayesian experts, weighed by their evidence on the context",
    "bem_k3_switch": "the same with a gate over breakpoints, summed exactly under a learned prior that starts wide",
    "maml": "MAML: 5 inner steps, learned rates, second order",
    "maml_wide": "MAML with a network of the size of three",
    "maml_routed": "three networks that all adapt, weighed by the posterior of their losses on the context",
    "maml_oracle": "five networks, told the family of every point; it has more parameters than the others",
}

# Sizes with which a group's parameters are equal within 1%.
PROCESSES: dict[Method, Callable[[], NeuralProcess]] = {
    "cnp": lambda: CNP(1),
    "np": lambda: NP(1, code_features=64, decoder_features=99),
    "mdn_cnp": lambda: MDNCNP(1, num_components=3, decoder_features=125),
    "moe_np": lambda: MoENeuralProcess(1, num_experts=3, hidden_features=128, code_features=24, decoder_features=33),
}
DRAWS: dict[Method, int] = {"np": 4, "moe_np": 2}  # of the latent in training: calibrated for each
MIXTURES: dict[Method, Callable[[], BayesianExpertMixture]] = {
    "bem_k1": lambda: BayesianExpertMixture(1, num_experts=1, hidden_features=84),
    "bem_k3": lambda: BayesianExpertMixture(1, num_experts=3, hidden_features=40),
    "bem_k3_switch": lambda: BayesianExpertMixture(1, num_experts=3, hidden_features=40, switch=True),
}
NETWORKS: dict[Method, tuple[int, int]] = {  # hidden units, experts
    "maml": (40, 1),
    "maml_wide": (71, 1),
    "maml_routed": (40, 3),
    "maml_oracle": (40, 5),
}
BALANCE = 0.05  # of maml_routed, against a collapse to one expert
INNER_STEPS = 5


@dataclass
class FamiliesSettings:
    """What can be set. All methods of a group have the same schedule but for their numbers of draws.

    Args:
        methods: which run.
        process_iterations: of neural processes, each on 64 tasks.
        evidence_iterations: of Bayesian experts, each on 32 tasks.
        maml_iterations: of MAML in all its forms, each on 32 tasks.
        evaluation_tasks: of each variant, (a) and (b), the same for all methods of a seed.
        contexts: their sizes, in training in turn and in evaluation.
        targets: points of an evaluation task; 20 in training.
        num_samples: draws of a latent in evaluation.
    """

    methods: list[Method] = field(default_factory=lambda: list(METHODS))
    process_iterations: int = 2500
    evidence_iterations: int = 2000
    maml_iterations: int = 600
    evaluation_tasks: int = 500
    contexts: list[int] = field(default_factory=lambda: [3, 5, 10])
    targets: int = 30
    num_samples: int = 32

    def __post_init__(self) -> None:
        iterations = (self.process_iterations, self.evidence_iterations, self.maml_iterations)
        if min(*iterations, self.evaluation_tasks, self.targets, self.num_samples) < 1:
            raise ValueError("every number of iterations, tasks, targets and samples must be at least 1")
        check_distinct("methods", self.methods)
        check_distinct("contexts", self.contexts)
        if min(self.contexts) < 1:
            raise ValueError(f"contexts have at least one point, got {self.contexts}")


def check_distinct(name: str, values: Sequence[Any]) -> None:
    """Raise ValueError if a list of settings is empty or has something twice."""
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{name} must name at least one and none twice, got {values}")


class Learner(NamedTuple):
    """An untrained model, and how it is trained and asked.

    Args:
        model: with random weights.
        schedule: of its training.
        loss: tasks -> ().
        answer: (tasks, rows) -> the prediction for these of them.
    """

    model: nn.Module
    schedule: Schedule
    loss: Callable[[FamilyTasks], Tensor]
    answer: Callable[[FamilyTasks, slice], Predictive]


def make_learner(settings: FamiliesSettings, method: Method, seed: int) -> Learner:
    """The learner of a method.

    Args:
        settings: of the study.
        method: which one.
        seed: of its weights and of its draws in training; draws in evaluation are always the same.
    """
    torch.manual_seed(seed)
    if method in PROCESSES:
        return _process(settings, method)
    if method in MIXTURES:
        return _mixture(settings, method)
    return _maml(settings, method)


def _process(settings: FamiliesSettings, method: Method) -> Learner:
    model, num_draws = PROCESSES[method](), DRAWS.get(method, 1)

    def answer(tasks: FamilyTasks, rows: slice) -> Predictive:
        return model(tasks.batch[rows], settings.num_samples, torch.Generator().manual_seed(0))

    schedule = Schedule(settings.process_iterations, 64, 2e-3, clip=5.0)
    return Learner(model, schedule, lambda tasks: model.loss(tasks.batch, num_samples=num_draws), answer)


def _mixture(settings: FamiliesSettings, method: Method) -> Learner:
    model = MIXTURES[method]()
    schedule = Schedule(settings.evidence_iterations, 32, 3e-3, clip=1.0)
    return Learner(
        model,
        schedule,
        lambda tasks: prediction_loss(model(tasks.batch), tasks.batch),
        lambda tasks, rows: model(tasks.batch[rows]),
    )


def _maml(settings: FamiliesSettings, method: Method) -> Learner:
    from modmoe.meta.l2l import RegressionNetwork, RoutedMAML, SupportPosterior  # needs learn2learn, the others do not

    hidden, num_experts = NETWORKS[method]
    balance = BALANCE if method == "maml_routed" else 0.0
    pool = ExpertPool(RegressionNetwork(1, (hidden, hidden)), num_experts)
    model = RoutedMAML(pool, SupportPosterior(), INNER_STEPS, 0.05, second_order=True, balance=balance)

    def told(tasks: FamilyTasks, rows: slice) -> tuple[Tensor, Tensor] | None:
        # families are numbered as they stand in FAMILIES, experts of the oracle likewise
        return (tasks.context_family[rows], tasks.target_family[rows]) if method == "maml_oracle" else None

    everything = slice(None)
    schedule = Schedule(settings.maml_iterations, 32, 3e-3, clip=1.0)
    return Learner(
        model,
        schedule,
        lambda tasks: model.loss(tasks.batch, told(tasks, everything)),
        lambda tasks, rows: model(tasks.batch[rows], told(tasks, rows)),
    )
