"""The settings of an experiment on tasks in sequence."""

from dataclasses import dataclass, field

AT_LEAST_ONE = ("steps", "num_envs", "rollout", "batch_size", "epochs", "gate_samples", "episodes")


@dataclass
class SequenceSettings:
    """What can be set; all methods learn with PPO under the same settings.

    Args:
        num_tasks: contexts of RotatedReach, learned one after the other; at least 2.
        steps: of each task, over all environments; whole rollouts.
        num_envs: environments side by side.
        rollout: steps of each environment between two updates.
        batch_size: of an update; divides the steps of a rollout over all environments.
        epochs: passes over a rollout in an update.
        learning_rate: of Adam when a task begins; it falls linearly to a twentieth when the task ends.
        discount: of future rewards.
        hidden_features: hidden layers of an expert's actor, and of its critic. The MLPs have as many layers, and the
            one width that makes them as large as ``pool_oracle`` is in the end.
        gate_samples: starts of episodes to which a new expert's density is fitted when its task begins.
        episodes: of an evaluation, for each task: held-out seeds, always the same ones, deterministic actions.
    Raises:
        ValueError: on a number that is out of range or does not go with the others.
    """

    num_tasks: int = 3
    steps: int = 20_000
    num_envs: int = 8
    rollout: int = 125
    batch_size: int = 250
    epochs: int = 10
    learning_rate: float = 0.001
    discount: float = 0.9
    hidden_features: list[int] = field(default_factory=lambda: [64, 64])
    gate_samples: int = 128
    episodes: int = 50

    def __post_init__(self) -> None:
        if self.num_tasks < 2:
            raise ValueError(f"a sequence has two tasks at least: num_tasks={self.num_tasks}")
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.hidden_features or min(self.hidden_features) < 1:
            raise ValueError(f"hidden_features needs one layer at least, of positive sizes, got {self.hidden_features}")
        if not (self.learning_rate > 0 and 0 <= self.discount <= 1):
            raise ValueError(
                f"learning_rate must be positive and discount in [0, 1], got {self.learning_rate} and {self.discount}"
            )
        collected = self.num_envs * self.rollout
        # Otherwise PPO would train longer than it was told, and on batches of unequal sizes.
        if self.steps % collected:
            raise ValueError(
                f"steps={self.steps} must be whole rollouts of num_envs * rollout = {collected} steps: "
                f"{max(1, round(self.steps / collected)) * collected} would be"
            )
        if collected % self.batch_size:
            raise ValueError(f"batch_size={self.batch_size} must divide num_envs * rollout = {collected}")

    def learning_rate_at(self, remaining: float) -> float:
        """The learning rate while this share of a task's steps remains, from 1 to 0."""
        return self.learning_rate * max(remaining, 0.05)
