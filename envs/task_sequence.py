"""Tasks in sequence: one environment whose task the user or the number of steps switches."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .context import check_task
from .leap_terrain import held_out_seeds
from .transfer import average_performance, backward_transfer, forgetting, forward_transfer

Policy = Callable[[Any], Any]


class TaskSequence(gym.Env[Any, Any]):
    """One environment that is one of T tasks at a time.

    ``info["task"]`` tells which. A task that was set holds from the next reset on. Where ``steps_per_task`` is given,
    task i has exactly so many steps: its last episode is truncated at the boundary, and the last task stays.

    A seeded reset seeds the current task with the same number, so a single task is the plain environment; the others
    are seeded from it when their turn comes.

    Args:
        tasks: T functions that each make an environment; the spaces and render modes must be equal.
        steps_per_task: steps before the next task begins; None leaves it to ``set_task``.
    Raises:
        ValueError: if there are no tasks, their spaces or render modes differ, or the steps are fewer than 1.
    """

    def __init__(self, tasks: Sequence[Callable[[], gym.Env[Any, Any]]], steps_per_task: int | None = None):
        if len(tasks) == 0:
            raise ValueError("tasks must name one task at least")
        if steps_per_task is not None and steps_per_task < 1:
            raise ValueError(f"steps_per_task must be 1 or more, or None, not {steps_per_task}")
        self.tasks = tuple(tasks)
        self.steps_per_task = steps_per_task
        self.envs = [make() for make in self.tasks]
        self.observation_space = self.envs[0].observation_space
        self.action_space = self.envs[0].action_space
        self.render_mode = self.envs[0].render_mode
        self.metadata = self.envs[0].metadata
        for index, env in enumerate(self.envs):
            for name in ("observation_space", "action_space", "render_mode"):
                if getattr(env, name) != getattr(self, name):
                    raise ValueError(
                        f"task {index} has {name} {getattr(env, name)}, task 0 has {getattr(self, name)}: "
                        "all must be equal"
                    )
        self.current_task = 0  # of the running episode
        self.next_task = 0  # of the episode that begins next
        self.steps = 0
        self._unseeded: set[int] = set()  # tasks that have not begun since reset(seed=...)

    @classmethod
    def of_contexts(
        cls, env_id: str, num_tasks: int, steps_per_task: int | None = None, **options: Any
    ) -> "TaskSequence":
        """A sequence of the contexts 0 to ``num_tasks`` - 1 of a registered environment that takes ``task``."""
        return cls([MakeTask(env_id, task, options) for task in range(num_tasks)], steps_per_task)

    @property
    def num_tasks(self) -> int:
        return len(self.envs)

    def set_task(self, task: int) -> None:
        """Make ``task`` the task of the next episode. Raises ValueError if there is no such task."""
        if task is None:
            raise ValueError(f"task must be one of 0 to {self.num_tasks - 1}, not None")
        check_task(task, self.num_tasks)
        self.next_task, self.steps = int(task), 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.current_task = self.next_task
        env_seed = seed
        if seed is not None:
            self._unseeded = set(range(self.num_tasks))
        elif self.current_task in self._unseeded:
            env_seed = int(self.np_random.integers(2**31))
        self._unseeded.discard(self.current_task)
        observation, info = self.envs[self.current_task].reset(seed=env_seed, options=options)
        return observation, {**info, "task": self.current_task}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.envs[self.current_task].step(action)
        self.steps += 1
        if self.steps == self.steps_per_task and self.next_task + 1 < self.num_tasks:
            self.next_task, self.steps, truncated = self.next_task + 1, 0, True
        return observation, float(reward), terminated, truncated, {**info, "task": self.current_task}

    def render(self) -> Any:
        return self.envs[self.current_task].render()

    def close(self) -> None:
        for env in self.envs:
            env.close()

    def episode_returns(
        self, policy: Policy, episodes: int = 20, seeds: Sequence[int] | None = None, at_once: bool = False
    ) -> NDArray[np.float64]:
        """The return of each of some fixed episodes of every task.

        Environments of their own are used, so that training goes on as if nothing had been evaluated.

        Args:
            policy: observation -> action; deterministic, if evaluations are to be equal.
            episodes: for each task.
            seeds: one for each episode, the same in every task; None for ``held_out_seeds(episodes)``.
            at_once: whether all episodes of a task go on together, which is much faster for networks. Observations
                have to be arrays; the policy is given (episodes, ...), always of this size, with the last observation
                of episodes that are over, and gives as many actions.
        Returns:
            (T, episodes) returns.
        Raises:
            ValueError: if the seeds are not as many as the episodes.
        """
        seeds = held_out_seeds(episodes) if seeds is None else list(seeds)
        if episodes < 1 or len(seeds) != episodes:
            raise ValueError(f"episodes must be 1 or more, with one seed for each; got {episodes} and {len(seeds)}")
        if at_once:
            return np.stack([returns_at_once(make, policy, seeds) for make in self.tasks])
        returns = np.zeros((self.num_tasks, episodes))
        for task, make in enumerate(self.tasks):
            env = make()
            for episode, seed in enumerate(seeds):
                returns[task, episode] = episode_return(env, policy, seed)
            env.close()
        return returns

    def evaluate(
        self, policy: Policy, episodes: int = 20, seeds: Sequence[int] | None = None, at_once: bool = False
    ) -> NDArray[np.float64]:
        """(T,) mean returns of ``episode_returns``: one row of the matrix that ``forgetting`` and its like read."""
        return self.episode_returns(policy, episodes, seeds, at_once).mean(1)

    def transfer_metrics(self, matrix: ArrayLike, baseline: ArrayLike) -> dict[str, float]:
        """What the sequence did to a learner; a user who has no import of ``modmoe_envs`` finds it here.

        Args:
            matrix: (T, T), row i is ``evaluate`` after the training on task i.
            baseline: (T,), ``evaluate`` of the untrained learner.
        Returns:
            "average_performance", "forgetting", "backward_transfer" and "forward_transfer": the functions of these
            names in ``modmoe_envs``.
        Raises:
            ValueError: if a shape does not fit T, or T is 1.
        """
        if np.shape(matrix) != (self.num_tasks, self.num_tasks):
            raise ValueError(f"matrix must be ({self.num_tasks}, {self.num_tasks}), not {np.shape(matrix)}")
        return {
            "average_performance": average_performance(matrix),
            "forgetting": forgetting(matrix),
            "backward_transfer": backward_transfer(matrix),
            "forward_transfer": forward_transfer(matrix, baseline),
        }


sequence_of_contexts = TaskSequence.of_contexts  # gymnasium.make finds a module's attributes only


class MakeTask:
    """Makes one context of a registered environment; unlike a lambda it can be pickled."""

    def __init__(self, env_id: str, task: int, options: dict[str, Any]):
        self.env_id, self.task, self.options = env_id, task, options

    def __call__(self) -> gym.Env[Any, Any]:
        return gym.make(self.env_id, task=self.task, **self.options)


def episode_return(env: gym.Env[Any, Any], policy: Policy, seed: int) -> float:
    observation, _ = env.reset(seed=seed)
    total, over = 0.0, False
    while not over:
        observation, reward, terminated, truncated, _ = env.step(policy(observation))
        total += float(reward)
        over = terminated or truncated
    return total


def returns_at_once(make: Callable[[], gym.Env[Any, Any]], policy: Policy, seeds: Sequence[int]) -> NDArray[np.float64]:
    """(n,) returns of n episodes of one task, each in an environment of its own."""
    envs = [make() for _ in seeds]
    observations = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)])
    totals, running = np.zeros(len(seeds)), list(range(len(seeds)))
    while running:
        actions = policy(observations)
        for index in tuple(running):
            observations[index], reward, terminated, truncated, _ = envs[index].step(actions[index])
            totals[index] += float(reward)
            if terminated or truncated:
                running.remove(index)
    for env in envs:
        env.close()
    return totals
