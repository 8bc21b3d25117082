"""Evidence-gated experts: mixtures of Bayesian linear last layers."""

from modmoe.meta.evidence.breakpoints import BreakpointPrior, SwitchMixture
from modmoe.meta.evidence.classification import BayesianExpertClassifier, ClassMixture
from modmoe.meta.evidence.experts import EvidenceExperts, ExpertView
from modmoe.meta.evidence.features import FeatureMapExpert
from modmoe.meta.evidence.linear import LinearPosterior, infer
from modmoe.meta.evidence.mixture import BayesianExpertMixture
from modmoe.meta.evidence.novelty import NoveltyTest, calibrate_novelty
from modmoe.meta.evidence.predictives import EvidencePredictive, LinearMixture
from modmoe.meta.evidence.training import prediction_loss

__all__ = [
    "BayesianExpertClassifier",
    "BayesianExpertMixture",
    "BreakpointPrior",
    "ClassMixture",
    "EvidenceExperts",
    "EvidencePredictive",
    "ExpertView",
    "FeatureMapExpert",
    "LinearMixture",
    "LinearPosterior",
    "NoveltyTest",
    "SwitchMixture",
    "calibrate_novelty",
    "infer",
    "prediction_loss",
]
