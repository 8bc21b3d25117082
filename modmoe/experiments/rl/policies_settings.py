"""The settings of a comparison of mixture policies with plain ones."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Method = Literal["moe", "moe_oracle", "mlp", "multi_head_mlp", "scaled_expert"]
NEEDS_CONTEXTS: tuple[Method, ...] = ("moe_oracle", "multi_head_mlp")
SET_BY_METHODS = ("env", "policy", "policy_kwargs", "seed", "verbose")


@dataclass
class PoliciesSettings:
    """What can be set; every method trains with the same of it.

    Args:
        env: the environment's name for ``gymnasium.make``, with its module before a colon if it has one.
        env_kwargs: its arguments.
        num_contexts: for an environment with contexts of its own: how many. They are the last so many numbers of its
            observation, as one of K; it draws one at a reset, or takes ``options={"task": k}``. 0 for none.
        contexts: the contexts of any other environment: for each its ``env_kwargs`` besides. Training environment i
            stays in context i mod K, which is appended to its observations as one of K.
        algorithm: of Stable-Baselines3.
        algorithm_kwargs: its arguments, the same for all methods.
        timesteps: of the training of each method.
        num_envs: environments side by side in training; a multiple of the number of ``contexts``.
        num_experts: of ``moe``; ``moe_oracle`` has one for each context.
        router: of ``moe``.
        router_kwargs: its other arguments.
        balance_coef: factor of the load-balancing loss of ``moe``.
        hidden_features: of each of an expert's two hidden layers in ``moe``, whose number of parameters the other
            methods' sizes are fitted to.
        evaluation_episodes: for each context, with the seeds from 1,000,000 on, which no training uses.
        methods: what is compared; the first one leads the report.
        film: whether the trained policies are filmed. MuJoCo draws by OpenGL: without a display, set MUJOCO_GL to
            egl or osmesa, or this to false.
    """

    env: str = "modmoe_envs:modmoe/SwitchingCartPole-v0"
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    num_contexts: int = 0
    contexts: list[dict[str, Any]] = field(default_factory=list)
    algorithm: Literal["ppo", "sac"] = "ppo"
    algorithm_kwargs: dict[str, Any] = field(default_factory=dict)
    timesteps: int = 60_000
    num_envs: int = 8
    num_experts: int = 4
    router: str = "top_k"
    router_kwargs: dict[str, Any] = field(default_factory=dict)
    balance_coef: float = 0.0
    hidden_features: int = 32
    evaluation_episodes: int = 20
    methods: list[Method] = field(default_factory=lambda: ["moe", "mlp", "scaled_expert"])
    film: bool = True

    def __post_init__(self) -> None:
        for name in ("timesteps", "num_envs", "num_experts", "hidden_features", "evaluation_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_contexts < 0:
            raise ValueError(f"num_contexts must be at least 0, got {self.num_contexts}")
        if self.contexts and self.num_contexts:
            raise ValueError("num_contexts is for environments with contexts of their own: 0 where contexts are listed")
        if self.contexts and self.num_envs % len(self.contexts):
            raise ValueError(
                f"num_envs must be a multiple of the {len(self.contexts)} contexts, so that each is trained alike, "
                f"got {self.num_envs}"
            )
        unknown = [name for name in self.methods if name not in get_args(Method)]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods are some of {get_args(Method)}, each once, got {self.methods}")
        blind = [name for name in NEEDS_CONTEXTS if name in self.methods]
        if blind and not self.context_width:
            raise ValueError(f"{blind} need contexts: take them out of methods, or set num_contexts or contexts")
        taken = [name for name in SET_BY_METHODS if name in self.algorithm_kwargs]
        if taken:
            raise ValueError(f"algorithm_kwargs may not say {taken}: the methods do")

    @property
    def context_width(self) -> int:
        """How many contexts there are, and numbers at the end of an observation that say which; 0 for none."""
        return len(self.contexts) or self.num_contexts
