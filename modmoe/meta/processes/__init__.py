"""Neural processes, with and without a mixture."""

from modmoe.meta.processes.base import NeuralProcess
from modmoe.meta.processes.conditional import CNP, MDNCNP
from modmoe.meta.processes.latent import NP, AttentiveNP, LatentProcess
from modmoe.meta.processes.likelihood import ClassMixture
from modmoe.meta.processes.mixture import MoENeuralProcess

__all__ = ["CNP", "MDNCNP", "NP", "AttentiveNP", "ClassMixture", "LatentProcess", "MoENeuralProcess", "NeuralProcess"]
