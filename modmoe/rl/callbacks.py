"""Callbacks that grow a model and log its routing; they change experts at the start of a rollout only."""

from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor

from modmoe.analysis import usage_metrics
from modmoe.pool import Task
from modmoe.rl.growth import check_model, freeze, grow
from modmoe.rl.policy import MoEPolicy

Growth = Literal["fresh", "copy", "zero"] | ArrayLike
TaskSource = Literal["observation"] | str | Callable[[BaseAlgorithm], Task]


class GrowOnTask(BaseCallback):
    """Grow when a task appears that no expert belongs to, and freeze the experts that are there.

    Args:
        task: which task it is when a rollout starts: "observation" for what the policy's ``task_of`` reads in the
            observations of all environments, a key of the environments' infos, or a function of the model.
        n: experts for each new task.
        init: see :func:`modmoe.rl.grow`.
        freeze_old: whether older experts are frozen.
        freeze_shared: whether the parts outside the pools are frozen as well then.
    Raises:
        ValueError: when a rollout starts, if nothing says the task.
    """

    def __init__(
        self,
        task: TaskSource = "observation",
        n: int = 1,
        init: Growth = "fresh",
        freeze_old: bool = True,
        freeze_shared: bool = False,
    ):
        super().__init__()
        self.task, self.n, self.init = task, n, init
        self.freeze_old, self.freeze_shared = freeze_old, freeze_shared
        self._infos: list[dict[str, Any]] = []

    def _on_training_start(self) -> None:
        self._infos = list(self.training_env.reset_infos)

    def _on_step(self) -> bool:
        self._infos = self.locals["infos"]
        return True

    def _on_rollout_start(self) -> None:
        policy = check_model(self.model)
        pool = policy.parts()[0].network.pool
        for task in self._tasks(policy):
            if task in pool.tasks():
                continue
            if self.freeze_old:
                freeze(self.model, shared=self.freeze_shared)
            grow(self.model, self.n, self.init, task=task)

    def _tasks(self, policy: MoEPolicy) -> list[Task]:
        if callable(self.task):
            return [self.task(self.model)]
        if self.task == "observation":
            obs = obs_as_tensor(self.model._last_obs, policy.device)  # type: ignore[arg-type]
            return sorted(set(policy.parts()[0].network.tasks(obs).tolist()))
        missing = [index for index, info in enumerate(self._infos) if self.task not in info]
        if missing or not self._infos:
            raise ValueError(f"the infos of the environments {missing} have no '{self.task}': {self._infos[:1]}")
        return list(dict.fromkeys(as_task(info[self.task]) for info in self._infos))


class GrowOnPlateau(BaseCallback):
    """Grow when the mean return of recent episodes has not risen for some time.

    Args:
        every: timesteps between two looks.
        patience: looks without a rise that make a plateau.
        min_delta: the rise that counts, over the best so far.
        max_experts: no growth beyond.
        n: experts at a time.
        init: see :func:`modmoe.rl.grow`.
        freeze_old: whether older experts are frozen.
    Raises:
        ValueError: if every, patience, n or max_experts is below 1.
    """

    def __init__(
        self,
        every: int,
        patience: int = 3,
        min_delta: float = 0.0,
        max_experts: int = 8,
        n: int = 1,
        init: Growth = "fresh",
        freeze_old: bool = False,
    ):
        super().__init__()
        if min(every, patience, n, max_experts) < 1:
            raise ValueError(
                f"every, patience, n and max_experts are at least 1, got {every, patience, n, max_experts}"
            )
        self.every, self.patience, self.min_delta = every, patience, min_delta
        self.max_experts, self.n, self.init, self.freeze_old = max_experts, n, init, freeze_old
        self.best = -np.inf
        self.waited = 0
        self._next = 0

    def _on_step(self) -> bool:
        return True

    def _on_training_start(self) -> None:
        self._next = self.model.num_timesteps + self.every

    def _on_rollout_start(self) -> None:
        episodes = self.model.ep_info_buffer
        if self.model.num_timesteps < self._next or not episodes:
            return
        self._next = self.model.num_timesteps + self.every
        mean = float(np.mean([episode["r"] for episode in episodes]))
        if mean > self.best + self.min_delta:
            self.best, self.waited = mean, 0
            return
        self.waited += 1
        num_experts = check_model(self.model).parts()[0].network.pool.num_experts
        if self.waited >= self.patience and num_experts + self.n <= self.max_experts:
            if self.freeze_old:
                freeze(self.model)
            grow(self.model, self.n, self.init)
            self.waited = 0


class RoutingLogger(BaseCallback):
    """Log auxiliary losses and routing, so that TensorBoard shows them with SB3's own numbers.

    When a rollout starts: ``train/moe_balance`` and ``train/moe_z``, means over the update before (they reach the
    optimizer beside SB3's loss, and are no part of ``train/loss``). When one ends, of its last steps: ``moe/load_<id>``
    (share of the assignments), ``moe/entropy`` (mean entropy of a decision, in nats), ``moe/dead_experts``, and where
    there are contexts ``moe/context_<c>/expert_<id>`` (share of the context's assignments). With several networks the
    names have the network's before them: ``moe/actor_entropy``.

    Args:
        context: key of the infos that names an environment's context; where no info has it, contexts are not logged.
        steps: how many of the last steps.
        every: timesteps between two logs of the routing; off-policy rollouts are short.
    """

    def __init__(self, context: str = "context", steps: int = 128, every: int = 1):
        super().__init__()
        self.context, self.every = context, every
        self._kept: deque[tuple[Any, list[Any]]] = deque(maxlen=steps)
        self._next = 0

    def _on_training_start(self) -> None:
        self._next = 0

    def _on_rollout_start(self) -> None:
        for part in check_model(self.model).parts():
            for name, value in part.network.read_losses().items():
                self.logger.record(f"train/moe_{prefix(part.name)}{name}", value)

    def _on_step(self) -> bool:
        obs = self.model._last_obs
        copied = {k: v.copy() for k, v in obs.items()} if isinstance(obs, dict) else np.array(obs)
        self._kept.append((copied, [info.get(self.context) for info in self.locals["infos"]]))
        return True

    def _on_rollout_end(self) -> None:
        if self.model.num_timesteps < self._next or not self._kept:
            return
        self._next = self.model.num_timesteps + self.every
        policy = self.model.policy
        assert isinstance(policy, MoEPolicy)  # _on_rollout_start
        seen = [obs for obs, _ in self._kept]
        joined = {k: np.concatenate([o[k] for o in seen]) for k in seen[0]} if isinstance(seen[0], dict) else seen
        obs = obs_as_tensor(joined if isinstance(joined, dict) else np.concatenate(joined), policy.device)
        contexts = [context for _, row in self._kept for context in row]
        for part in policy.parts():
            self._log(part.name, policy, obs, contexts)
        self._kept.clear()

    def _log(self, name: str, policy: MoEPolicy, obs: Any, contexts: list[Any]) -> None:
        part = next(part for part in policy.parts() if part.name == name)
        with torch.no_grad():
            features = policy.features_of(part, obs)
        routing = part.network.route(features, obs)
        ids, start = part.network.pool.ids, f"moe/{prefix(name)}"
        metrics = usage_metrics(routing)
        self.logger.record(f"{start}entropy", metrics["token_entropy"])
        self.logger.record(f"{start}dead_experts", metrics["dead_experts"])
        for expert_id, share in zip(ids, shares(routing.load), strict=True):
            self.logger.record(f"{start}load_{expert_id}", share)
        labels = [None if context is None else str(as_task(context)) for context in contexts]
        valid = routing.expert_index >= 0
        for label in sorted({label for label in labels if label is not None}):
            of_label = torch.tensor([other == label for other in labels], device=valid.device)[routing.token_index]
            load = torch.bincount(routing.expert_index[of_label & valid], minlength=len(ids))
            for expert_id, share in zip(ids, shares(load), strict=True):
                self.logger.record(f"{start}context_{label}/expert_{expert_id}", share)


def shares(load: Tensor) -> list[float]:
    """Each expert's share of the assignments."""
    return (load / load.sum().clamp(min=1)).tolist()


def prefix(name: str) -> str:
    return f"{name}_" if name else ""


def as_task(context: Any) -> Task:
    """A context as a task's label: a number or a string as it is, an array of one number as that number."""
    if isinstance(context, str):
        return context
    values = np.asarray(context).reshape(-1)
    if len(values) == 1 and float(values[0]).is_integer():
        return int(values[0])
    return ",".join(f"{value:.3g}" for value in values.tolist())
