"""What ``policy_kwargs`` may say of the mixture, and what is refused."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modmoe import Router, make_router
from modmoe.rl.context import ContextReader, TaskReader
from modmoe.rl.experts import ExpertFactory
from modmoe.rows import Task

GATE_INPUTS = ("features", "context", "hidden")
UNSEEN = ("raise", "newest")


@dataclass(frozen=True)
class MoEOptions:
    """The part of ``policy_kwargs`` that every mixture policy takes.

    Args:
        num_experts: how many to start with.
        router: a name for ``modmoe.make_router``, a function of in_features, or a Router, which is copied.
        router_kwargs: the other arguments of a router that is named.
        expert: "mlp", "swiglu", or a function of (in_features, out_features) that gives an expert kind.
        expert_kwargs: the other arguments of an expert that is named, for instance ``{"activation": "relu"}``.
        hidden_features: H, or one for each hidden layer of an "mlp"; two of 64 as in SB3 by default.
        own_heads: True where each expert ends in its own outputs (action, value, log_std); False where the experts
            give ``latent_features`` and one linear head is shared by all.
        latent_features: see above.
        trunk: sizes of shared layers before the experts; none by default.
        gate_input: what the router scores: "features" (of the extractor), "hidden" (what the trunk gives) or "context".
        context: where the observation says its context: (start, stop) of a flat one, the key of a dict, or a function
            of the observations.
        task_of: "one_hot" or "index": how the context names a task; or a function of the context (of the observation
            where there is none) to (B,) int64. Then each input uses its task's experts only (oracle routing).
        task: the task of the experts to start with.
        unseen_task: "raise", or "newest": the newest expert acts in a task that has none (for evaluation).
        balance_coef: factor of the load-balancing loss.
        z_coef: factor of the router's z-loss.
        shared_frozen: whether the parts outside the pools are frozen; :func:`modmoe.rl.freeze` sets it.
    Raises:
        ValueError: on an unknown choice, or options that need another one.
    """

    num_experts: int = 4
    router: str | Callable[[int], Router] | Router = "top_k"
    router_kwargs: Mapping[str, Any] | None = None
    expert: str | ExpertFactory = "mlp"
    expert_kwargs: Mapping[str, Any] | None = None
    hidden_features: int | Sequence[int] = (64, 64)
    own_heads: bool = True
    latent_features: int = 64
    trunk: Sequence[int] = ()
    gate_input: str = "features"
    context: ContextReader | None = None
    task_of: TaskReader | None = None
    task: Task | None = None
    unseen_task: str = "raise"
    balance_coef: float = 0.0
    z_coef: float = 0.0
    shared_frozen: bool = False

    def __post_init__(self) -> None:
        if self.gate_input not in GATE_INPUTS:
            raise ValueError(f"gate_input is one of {GATE_INPUTS}, got '{self.gate_input}'")
        if self.unseen_task not in UNSEEN:
            raise ValueError(f"unseen_task is one of {UNSEEN}, got '{self.unseen_task}'")
        if self.gate_input == "context" and self.context is None:
            raise ValueError("gate_input='context' needs context=...: where the observation says it")
        if self.gate_input == "hidden" and not self.trunk:
            raise ValueError("gate_input='hidden' needs trunk=[...]: the layers whose output is routed on")
        if isinstance(self.task_of, str) and self.context is None:
            raise ValueError(f"task_of='{self.task_of}' reads the context: say context=...")
        if self.balance_coef < 0 or self.z_coef < 0:
            raise ValueError(f"coefficients are at least 0, got {self.balance_coef} and {self.z_coef}")

    @classmethod
    def split(cls, kwargs: Mapping[str, Any]) -> tuple["MoEOptions", dict[str, Any]]:
        """These options out of a policy's keyword arguments, and the arguments that are left for SB3's class.

        Raises:
            ValueError: on SB3's ``net_arch`` and ``activation_fn``, which say nothing of experts.
        """
        for name, instead in (("net_arch", "hidden_features=... and trunk=..."), ("activation_fn", "expert_kwargs")):
            if kwargs.get(name) is not None:
                raise ValueError(f"a mixture policy has no {name}: say {instead}")
        names = {field.name for field in dataclasses.fields(cls)}
        own = {name: value for name, value in kwargs.items() if name in names}
        left = {name: v for name, v in kwargs.items() if name not in names | {"net_arch", "activation_fn"}}
        return cls(**own), left

    def as_kwargs(self) -> dict[str, Any]:
        """The arguments that make these options again."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def make_router(self, in_features: int) -> Router:
        """The router, checked.

        Raises:
            ValueError: on an unknown name or option, or a router that a policy cannot have.
        """
        if isinstance(self.router, Router):
            router = copy.deepcopy(self.router)
        elif isinstance(self.router, str):
            router = make_router(self.router, in_features, **(self.router_kwargs or {}))
        else:
            router = self.router(in_features)
        check_router(router)
        if router.in_features != in_features:
            raise ValueError(f"the router takes {router.in_features} features, the gate's input has {in_features}")
        return router


def check_router(router: Router) -> None:
    """Raise ValueError unless the router decides for each input alone and always alike.

    An update sees other batches than the rollout did: otherwise the same action would have another log-probability
    there, and PPO's ratio would not start at 1.
    """
    name = type(router).__name__
    if router.needs_ids is not None:
        raise ValueError(f"{name} routes by {router.needs_ids} ids, which an observation does not have")
    why = None
    if router.scope != "token":
        why = f"decides for a whole {router.scope}"
    elif router.stochastic:
        why = "draws random numbers in training"
    if why is not None:
        raise ValueError(
            f"{name} {why}: the same observation would be routed otherwise in the update than in the rollout, and the "
            "log-probabilities would differ; choose a router that decides for each token and draws nothing, for "
            "instance 'top_k' or 'dense'"
        )
