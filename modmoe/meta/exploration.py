"""Meta-RL by inference: the transitions of a task are its context, and a planner acts on the rewards that a model
predicts from them.

The policy is the simplest that works where rewards are dense: of some candidate actions, the one whose next reward the
model expects to be highest. It looks one step ahead, so a task whose reward must first fall is beyond it.

Axes: B tasks (rows of a vector environment), T steps, S numbers of a state, A of an action, J candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modmoe.meta.predictive import Predictive
from modmoe.meta.task_batch import TaskBatch

OUTCOMES = ("reward", "change")


@dataclass(frozen=True)
class Transitions:
    """What happened in B tasks, step by step.

    Args:
        states: (B, T, S) float32.
        actions: (B, T, A) float32.
        rewards: (B, T) float32.
        next_states: (B, T, S) float32.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    next_states: Tensor

    @property
    def num_steps(self) -> int:
        """T."""
        return self.rewards.shape[1]

    def points(self, outcome: str = "reward") -> tuple[Tensor, Tensor]:
        """x (B, T, S + A), state and action; y the reward (B, T, 1) or the "change" of the state (B, T, S).

        Raises:
            ValueError: if the outcome is another.
        """
        if outcome not in OUTCOMES:
            raise ValueError(f"unknown outcome {outcome!r}, choose from {', '.join(OUTCOMES)}")
        y = self.rewards.unsqueeze(2) if outcome == "reward" else self.next_states - self.states
        return torch.cat([self.states, self.actions], 2), y

    def task_batch(
        self, num_context: int, outcome: str = "reward", generator: torch.Generator | None = None
    ) -> TaskBatch:
        """Some transitions as the context, the others as targets: what a neural process is trained on.

        Args:
            num_context: 0 to T - 1.
            outcome: "reward" or "change".
            generator: None takes the first steps as the context; else every task's are drawn by it.
        Raises:
            ValueError: if num_context leaves no target, or the outcome is unknown.
        """
        if not 0 <= num_context < self.num_steps:
            raise ValueError(f"num_context is one of 0 to {self.num_steps - 1}, got {num_context}")
        x, y = self.points(outcome)
        if generator is not None:
            order = torch.rand(x.shape[:2], generator=generator).argsort(1).unsqueeze(2)
            x, y = x.take_along_dim(order, 1), y.take_along_dim(order, 1)
        return TaskBatch(x[:, :num_context], y[:, :num_context], x[:, num_context:], y[:, num_context:])

    def then(self, later: "Transitions") -> "Transitions":
        """These and those of the same tasks that came after."""
        pairs = [(getattr(self, name), getattr(later, name)) for name in self.__dataclass_fields__]
        return Transitions(*(torch.cat(pair, 1) for pair in pairs))


Act = Callable[[Transitions, Tensor], Tensor]
"""(what has happened so far, the states (B, S)) -> actions (B, A)."""


def collect(
    env: Any,
    num_steps: int,
    act: Act,
    seed: int | None = None,
    options: dict[str, Any] | None = None,
    history: Transitions | None = None,
    state_size: int | None = None,
) -> Transitions:
    """One episode in every row of a vector environment.

    Args:
        env: a ``gymnasium.vector.VectorEnv`` with boxes as spaces; each row is a task.
        num_steps: T, no more than an episode has.
        act: the policy; it is shown ``history`` and what happened since.
        seed, options: for ``env.reset``; the tasks of a history are set again by its option (in PointGoals "goal").
        history: of earlier episodes in the same tasks.
        state_size: S, how many entries of an observation are the state; None means all. The rest, such as a context
            that is hidden, is left out.
    Returns:
        The transitions of this episode alone.
    Raises:
        ValueError: if an episode ends before its last step.
    """
    observations, _ = env.reset(seed=seed, options=options)
    states = torch.as_tensor(np.asarray(observations), dtype=torch.float32)[:, :state_size]
    num_tasks, action_size = len(states), int(np.prod(env.single_action_space.shape))
    empty = states.new_zeros(num_tasks, 0, states.shape[1])
    done = Transitions(empty, states.new_zeros(num_tasks, 0, action_size), states.new_zeros(num_tasks, 0), empty)
    for step in range(num_steps):
        actions = act(done if history is None else history.then(done), states).float()
        observations, rewards, terminated, truncated, _ = env.step(actions.numpy())
        if step < num_steps - 1 and (terminated | truncated).any():
            raise ValueError(f"an episode ended after {step + 1} steps, {num_steps} were asked for")
        # copied: an environment may write its next observation into the same array
        new = torch.tensor(np.asarray(observations), dtype=torch.float32)[:, :state_size]
        reward = torch.tensor(np.asarray(rewards), dtype=torch.float32)
        done = done.then(Transitions(states[:, None], actions[:, None], reward[:, None], new[:, None]))
        states = new
    return done


class RandomHeadings:
    """Uniform actions in [-1, 1], each kept for some steps: a walk that gets further than one that turns every step.

    Args:
        action_size: A.
        hold: steps, 1 or more.
        generator: where the randomness comes from; None is torch's own.
    """

    def __init__(self, action_size: int, hold: int = 5, generator: torch.Generator | None = None):
        if hold < 1:
            raise ValueError(f"hold is 1 or more steps, got {hold}")
        self.action_size, self.hold, self.generator = action_size, hold, generator

    def __call__(self, history: Transitions, states: Tensor) -> Tensor:
        if history.num_steps % self.hold:
            return history.actions[:, -1]
        return 2 * torch.rand(len(states), self.action_size, generator=self.generator) - 1


class RewardPlanner:
    """Of the candidate actions, the one whose reward the model expects to be highest, given all that has happened.

    Args:
        model: answers a TaskBatch whose x is (state, action) and y the reward; any neural process of modmoe.meta.
        candidates: (J, A) actions.
        num_random: steps of a task that are drawn from the candidates, to have seen something before planning.
        generator: where the randomness comes from; None is torch's own.
    Raises:
        ValueError: if there are no candidates.
    """

    def __init__(
        self,
        model: Callable[[TaskBatch], Predictive],
        candidates: Tensor,
        num_random: int = 1,
        generator: torch.Generator | None = None,
    ):
        if candidates.dim() != 2 or len(candidates) == 0:
            raise ValueError(f"candidates are (J, A) with an action at least, got {tuple(candidates.shape)}")
        self.model, self.candidates = model, candidates
        self.num_random, self.generator = num_random, generator

    @torch.no_grad()
    def __call__(self, history: Transitions, states: Tensor) -> Tensor:
        count, num_tasks = len(self.candidates), len(states)
        if history.num_steps < self.num_random:
            return self.candidates[torch.randint(count, (num_tasks,), generator=self.generator)]
        pairs = states.unsqueeze(1).expand(-1, count, -1), self.candidates.expand(num_tasks, -1, -1)
        predicted = self.model(TaskBatch(*history.points(), torch.cat(pairs, 2))).mean.squeeze(2)
        return self.candidates[predicted.argmax(1)]


def headings(count: int, length: float = 1.0) -> Tensor:
    """(count + 1, 2): candidates in the plane, evenly around a circle of that radius, and standing still."""
    angles = torch.arange(count) * (2 * torch.pi / count)
    around = length * torch.stack([angles.cos(), angles.sin()], 1)
    return torch.cat([around, torch.zeros(1, 2)])
