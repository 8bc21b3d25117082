"""Growth of a MACE while it trains: pairs are added, frozen and removed with what they own, at safe points only."""

from collections.abc import Sequence

import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from modmoe.rl.mace_buffers import PairReplayBuffer
from modmoe.rl.mace_policy import MACEPolicy, PairInit


class GrowingPairs(OffPolicyAlgorithm):
    """The part of :class:`modmoe.rl.mace.MACE` that changes its pairs; not an algorithm by itself."""

    policy: MACEPolicy
    replay_buffer: PairReplayBuffer
    _choice: tuple[np.ndarray, np.ndarray] | None = None  # pairs and noisiness of the step under way

    def add_pair(
        self,
        init: PairInit = "fresh",
        bias: Sequence[float] | None = None,
        value: float | None = None,
        source: int | None = None,
    ) -> int:
        """Add one actor-critic pair; what the other pairs do and their optimizer state stay as they are.

        Call it between calls of ``learn`` or in a callback's ``_on_rollout_start``.

        Args:
            init: "fresh" draws new weights, "copy" repeats a pair.
            bias: of a fresh actor, an action in units of the action space; None for the middle of it.
            value: what a fresh critic starts at, None for the policy's ``initial_value``. Late in a run the choice is
                almost greedy: below the others' values a new pair is hardly ever tried, above them it is at once.
            source: the pair to copy, None for the newest; a frozen one may be copied too, and the copy learns.
        Returns:
            The new pair's stable id.
        Raises:
            ValueError: on arguments that do not go together.
            RuntimeError: in the middle of a rollout.
        """
        self._check_safe("add_pair")
        return self.policy.add_pair(init, bias, value, source)

    def freeze_pairs(self, pairs: Sequence[int] | None = None) -> None:
        """Freeze pairs with all that they own, bit for bit; None for all pairs and the layers that they share.

        The shared layers learn on while they are not frozen, and change what a frozen pair does.
        """
        self._check_safe("freeze_pairs")
        self.policy.freeze(pairs)

    def unfreeze_pairs(self, pairs: Sequence[int] | None = None) -> None:
        """Make pairs trainable again; None for all pairs and the layers that they share."""
        self._check_safe("unfreeze_pairs")
        self.policy.unfreeze(pairs)

    def remove_pairs(self, pairs: Sequence[int]) -> None:
        """Remove pairs, and leave out their transitions from now on."""
        self._check_safe("remove_pairs")
        self.policy.remove(pairs)
        self.replay_buffer.forget(list(pairs))

    def _check_safe(self, what: str) -> None:
        if self._choice is not None:
            raise RuntimeError(
                f"{what} in the middle of a rollout: a step is under way that the old pairs chose; call it in a "
                "callback's _on_rollout_start, or between calls of learn"
            )
