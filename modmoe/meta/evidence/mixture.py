"""The mixture of Bayesian experts whose gate is their evidence."""

from collections.abc import Sequence

from torch import cat

from modmoe.meta.evidence.breakpoints import BreakpointPrior, SwitchMixture
from modmoe.meta.evidence.experts import EvidenceExperts
from modmoe.meta.evidence.predictives import LinearMixture
from modmoe.meta.task_batch import TaskBatch


class BayesianExpertMixture(EvidenceExperts):
    """Regression from a few points: p(y* | context) = sum_k w_k p_k(y* | context), w_k ~ pi_k p_k(context).

    Each expert is a feature map with a Bayesian linear last layer, so its posterior and its evidence are exact and
    nothing is adapted by gradient. Outputs should be of about unit size. An empty context gives the prior mixture;
    masked points, equal inputs and contexts of any size have the answers that the formula says.

    Args:
        in_features: D.
        out_features: M; independent given an expert's features.
        num_experts: K at the start.
        hidden_features: H of the feature maps.
        num_features: F.
        switch: whether the expert may change at a breakpoint along x, see :class:`SwitchMixture`; needs D = 1.
    Raises:
        ValueError: on a size below 1, or a switch with more than one input.
    Source:
        Bayesian last layers as experts of a mixture whose gate is Bayes' rule; ours. The regression is Bishop, chapter
        3; meta-learned priors of it are ALPaCA (Harrison, Sharma and Pavone 2018), which has one expert.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        num_experts: int = 1,
        hidden_features: int = 40,
        num_features: int = 24,
        switch: bool = False,
    ):
        if switch and in_features != 1:
            raise ValueError(f"a breakpoint lies on a line: switch=True needs in_features=1, got {in_features}")
        super().__init__(in_features, out_features, num_experts, hidden_features, num_features)
        self.out_features = out_features
        self.breakpoints = BreakpointPrior() if switch else None

    def forward(self, tasks: TaskBatch, experts: Sequence[int] | None = None) -> LinearMixture | SwitchMixture:
        """Condition on the context and predict the targets.

        Args:
            tasks: context_y (B, C, M); no targets (N = 0) where only the evidence is wanted.
            experts: ids that may answer; None for all. The others are as if they did not exist, so that frozen
                experts answer the same to the last bit whatever was added.
        Returns:
            B predictions at N points.
        Raises:
            ValueError: on shapes or a dtype that do not fit, no experts or unknown ids.
            NonFiniteError: if a feature or a noise is not finite.
        """
        if tasks.context_y.shape[2] != self.out_features:
            raise ValueError(f"the experts have {self.out_features} outputs, context_y has {tasks.context_y.shape[2]}")
        view = self.view(cat([tasks.clean_context()[0], tasks.target_x], 1), experts)
        if self.breakpoints is not None:
            return SwitchMixture(view, tasks, self.breakpoints())
        return LinearMixture(view, tasks)
