"""Neural processes of equal size, for functions of any number of inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modmoe.experiments.sizes import nearest_size
from modmoe.growth import count_parameters
from modmoe.meta import Predictive, TaskBatch
from modmoe.meta.processes import CNP, NP, AttentiveNP, MoENeuralProcess, NeuralProcess

ProcessName = Literal["cnp", "np", "anp", "moe_np"]
PROCESS_NAMES: list[ProcessName] = ["cnp", "np", "anp", "moe_np"]

ABOUT: dict[ProcessName, str] = {
    "cnp": "conditional neural process",
    "np": "neural process, trained by NPML with 4 draws",
    "anp": "attentive neural process, trained by NPML with 4 draws",
    "moe_np": "MoE-NP style: three experts with a slot, a latent and a decoder each; NPML with 2 draws, exact mixture",
}
DRAWS: dict[ProcessName, int] = {"cnp": 1, "np": 4, "anp": 4, "moe_np": 2}


@dataclass(frozen=True)
class Process:
    """A neural process with its numbers of draws.

    Args:
        model: the network.
        num_draws: of the latent in training.
        num_samples: in evaluation, always the same.
    """

    model: NeuralProcess
    num_draws: int
    num_samples: int

    def loss(self, batch: TaskBatch) -> Tensor:
        """() float, in nats for a target."""
        return self.model.loss(batch, num_samples=self.num_draws)

    def answer(self, batch: TaskBatch) -> Predictive:
        """The prediction."""
        return self.model(batch, self.num_samples, torch.Generator().manual_seed(0))


def make_process(name: ProcessName, in_features: int, num_samples: int, seed: int) -> Process:
    """A process with one output whose decoder gives it as many parameters as the CNP has.

    Args:
        name: which.
        in_features: D.
        num_samples: draws of the latent in evaluation.
        seed: of its weights and draws in training.
    """
    makers: dict[ProcessName, Callable[[int], NeuralProcess]] = {
        "cnp": lambda size: CNP(in_features, decoder_features=size),
        "np": lambda size: NP(in_features, decoder_features=size),
        "anp": lambda size: AttentiveNP(in_features, hidden_features=80, decoder_features=size),
        "moe_np": lambda size: MoENeuralProcess(in_features, num_experts=3, decoder_features=size),
    }
    size = 128 if name == "cnp" else nearest_size(makers[name], count_parameters(makers["cnp"](128)).total)
    torch.manual_seed(seed)
    return Process(makers[name](size), DRAWS[name], num_samples)
