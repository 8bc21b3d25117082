"""The policy of DQN: each expert owns its Q-values of every action."""

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import Tensor

from modmoe.rl.network import MoENetwork
from modmoe.rl.options import MoEOptions
from modmoe.rl.policy import MoEPolicy, Part, check_action_space, choose_extractor


class MoEQNetwork(QNetwork):
    """Q(s, .) from a mixture.

    Args:
        options: of the mixture; the others are SB3's.
    """

    def __init__(self, options: MoEOptions, **kwargs: Any):
        super().__init__(**kwargs, net_arch=[])
        del self.q_net
        self.moe = MoENetwork(self.observation_space, self.features_dim, {"pi": int(self.action_space.n)}, options)

    def forward(self, obs: PyTorchObs) -> Tensor:
        return self.moe(self.extract_features(obs, self.features_extractor), obs).outputs


class MoEDQNPolicy(MoEPolicy, DQNPolicy):
    """DQN's policy with a MoEQNetwork and its target.

    Args:
        observation_space: flat, image or dict; the extractor is chosen by it unless one is given.
        action_space: Discrete.
        lr_schedule: of SB3.
        kwargs: those of ``MoEOptions``, and of SB3's DQNPolicy but for ``net_arch`` and ``activation_fn``.
    Raises:
        ValueError: on other action spaces, and as MoEOptions.
    """

    q_net: MoEQNetwork
    q_net_target: MoEQNetwork

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Discrete, lr_schedule: Schedule, **kwargs: Any
    ):
        self.options, left = MoEOptions.split(kwargs)
        check_action_space(type(self).__name__, action_space, (spaces.Discrete,))
        super().__init__(observation_space, action_space, lr_schedule, **choose_extractor(observation_space, left))

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        if self.options.shared_frozen:
            self.freeze_shared()
        self.sync_optimizers()

    def make_q_net(self) -> MoEQNetwork:
        kwargs = self._update_features_extractor(self.net_args, features_extractor=None)
        for name in ("net_arch", "activation_fn"):
            kwargs.pop(name)
        return MoEQNetwork(options=self.options, **kwargs).to(self.device)

    def parts(self) -> list[Part]:
        return [Part("", self.q_net.moe, self.q_net_target.moe, self.q_net, self.optimizer)]

    def num_actions(self) -> int:
        return int(self.action_space.n)  # type: ignore[union-attr]
