"""The policy of PPO and A2C: each expert is an actor with its critic."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor

from modmoe.rl.network import LOG_STD, Mixed, MoENetwork
from modmoe.rl.options import MoEOptions
from modmoe.rl.policy import MoEPolicy, Part, check_action_space, choose_extractor

SERVED = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class MoEActorCriticPolicy(MoEPolicy, ActorCriticPolicy):
    """A mixture of actor-critic pairs: pi(a|s) and V(s) from sum_e w_e(s) f_e(s).

    With ``own_heads`` an expert owns everything from the features to its action outputs, its value and its log
    standard deviations; nothing that is trained is shared but by choice (``trunk``, an extractor with weights).

    Args:
        observation_space: flat, image or dict; the extractor is chosen by it unless one is given.
        action_space: Box, Discrete, MultiDiscrete or MultiBinary.
        lr_schedule: of SB3.
        kwargs: those of ``MoEOptions``, and of SB3's ActorCriticPolicy but for ``net_arch`` and ``activation_fn``.
    Raises:
        ValueError: on other action spaces, ``use_sde`` (its noise needs one latent for all experts),
            ``share_features_extractor=False`` (an expert's actor and critic share its input), and as MoEOptions.
    """

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, lr_schedule: Schedule, **kwargs: Any
    ):
        self.options, left = MoEOptions.split(kwargs)
        check_action_space(type(self).__name__, action_space, SERVED)
        if left.pop("use_sde", False) or left.get("squash_output"):
            raise ValueError(f"{type(self).__name__} has no state-dependent exploration: use_sde=False")
        if not left.get("share_features_extractor", True):
            raise ValueError("an expert's actor and critic share its input: share_features_extractor=True")
        for name in ("full_std", "use_expln", "squash_output"):  # of state-dependent exploration
            left.pop(name, None)
        super().__init__(observation_space, action_space, lr_schedule, **choose_extractor(observation_space, left))

    def _build(self, lr_schedule: Schedule) -> None:
        gaussian = isinstance(self.action_dist, DiagGaussianDistribution)
        self.moe = MoENetwork(
            self.observation_space,
            self.features_dim,
            {"pi": num_outputs(self.action_space), "vf": 1},
            self.options,
            log_std=get_action_dim(self.action_space) if gaussian else 0,
            log_std_init=self.log_std_init,
            gains={"pi": 0.01, "vf": 1.0},
            activation="tanh",
        )
        if self.ortho_init:
            self.features_extractor.apply(lambda module: self.init_weights(module, np.sqrt(2)))
        if self.options.shared_frozen:
            self.features_extractor.requires_grad_(False)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]
        self.sync_optimizers()

    def parts(self) -> list[Part]:
        return [Part("", self.moe, None, self, self.optimizer)]

    def num_actions(self) -> int:
        return num_outputs(self.action_space)

    def __getattr__(self, name: str) -> Any:
        # SB3 logs exp(policy.log_std) where there is one: each expert has its own
        if name == "log_std" and "moe" in self._modules:
            moe = self.moe
            if moe.log_std is not None:
                return moe.log_std
            if LOG_STD in moe.pool.namespaces:
                return moe.pool.namespace(LOG_STD)["value"]
        return super().__getattr__(name)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        values, distribution = self._evaluate(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        log_prob = distribution.log_prob(actions)
        return actions.reshape((-1, *self.action_space.shape)), values, log_prob  # type: ignore[misc]

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        values, distribution = self._evaluate(obs)
        return values, distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        return self._evaluate(obs)[1]

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        return self._mixed(obs).outputs[:, -1:]

    def _mixed(self, obs: PyTorchObs) -> Mixed:
        features = self.extract_features(obs, self.features_extractor)
        assert isinstance(features, Tensor)
        return self.moe(features, obs)

    def _evaluate(self, obs: PyTorchObs) -> tuple[Tensor, Distribution]:
        """Values (B, 1), and the distribution of actions."""
        mixed = self._mixed(obs)
        outputs, values = mixed.outputs[:, :-1], mixed.outputs[:, -1:]
        if isinstance(self.action_dist, DiagGaussianDistribution):
            return values, self.action_dist.proba_distribution(outputs, self.moe.log_stds(mixed.weights))
        return values, self.action_dist.proba_distribution(action_logits=outputs)  # type: ignore[call-arg]


def num_outputs(space: spaces.Space) -> int:
    """Numbers that SB3's distribution over a space is made from."""
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(sum(space.nvec))
    return get_action_dim(space)
