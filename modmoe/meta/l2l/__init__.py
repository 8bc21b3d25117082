"""learn2learn, made safe for pools, and MAML over a pool of small networks."""

from modmoe.hosts import import_host

import_host("learn2learn")

from modmoe.meta.l2l.adapt import active_experts, select_parameters  # noqa: E402
from modmoe.meta.l2l.choice import (  # noqa: E402
    ExpertChoice,
    LearnedGate,
    NearestCentroid,
    SupportPosterior,
    balance_loss,
)
from modmoe.meta.l2l.clone import clone_with_places, safe_clone  # noqa: E402
from modmoe.meta.l2l.errors import AdaptationError, StaleWrapperError  # noqa: E402
from modmoe.meta.l2l.networks import RegressionNetwork  # noqa: E402
from modmoe.meta.l2l.preflight import AdaptationReport, check_for_adaptation  # noqa: E402
from modmoe.meta.l2l.routed import RoutedMAML, StepCost, balanced  # noqa: E402
from modmoe.meta.l2l.wrappers import ANIL, GBML, MAML, FeaturesAndHead, MetaSGD  # noqa: E402

__all__ = [
    "ANIL",
    "GBML",
    "MAML",
    "AdaptationError",
    "AdaptationReport",
    "ExpertChoice",
    "FeaturesAndHead",
    "LearnedGate",
    "MetaSGD",
    "NearestCentroid",
    "RegressionNetwork",
    "RoutedMAML",
    "StaleWrapperError",
    "StepCost",
    "SupportPosterior",
    "active_experts",
    "balance_loss",
    "balanced",
    "check_for_adaptation",
    "clone_with_places",
    "safe_clone",
    "select_parameters",
]
