"""The arms that are ours, the dense layer of the same FLOPs, and the plain ways to compute experts in PyTorch."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from kernel_cases import Case, routing_of
from torch import Tensor, nn

from modmoe import Expert, ExpertPool, MLPExpert, MoELayer, Routing, SwiGLUExpert, TopKRouter
from modmoe.experts.base import TwoLayers
from modmoe.kernels.select import BACKENDS

GPU_BACKENDS = ("triton",)
DENSE_BACKEND_MAX_EXPERTS = 64  # it computes E/K times the work


@dataclass(frozen=True)
class Problem:
    """What every arm of a case computes on.

    Args:
        case: the case.
        x: (T, D) leaf that needs a gradient: the layer stands inside a network.
        routing: the same for every arm; its weights are a leaf that needs a gradient.
        grad: (T, D) the gradient of the output, fixed.
    """

    case: Case
    x: Tensor
    routing: Routing
    grad: Tensor

    @classmethod
    def of(cls, case: Case) -> "Problem":
        tokens, d, _, experts, k = case.sizes
        torch.manual_seed(0)
        x, grad = (torch.randn(tokens, d).to(case.device, case.dtype) for _ in range(2))
        weight = torch.randn(tokens, k).softmax(1).flatten().to(case.device, case.dtype).requires_grad_()
        routing = routing_of(case.choices().to(case.device), weight, experts)
        return cls(case, x.requires_grad_(), routing, grad)

    def on_balanced_loads(self) -> "Problem":
        """The same with loads equal to within one."""
        choices = self.case.balanced().to(self.x.device)
        return replace(self, routing=routing_of(choices, self.routing.weight, self.routing.num_experts))


@dataclass(frozen=True)
class Arm:
    """One way to compute the layer.

    Args:
        name: in the rows.
        forward: dispatch, experts and combine: () -> (T, D).
        problem: what it computes on.
        parameters: what its optimizer steps.
        ours: the arm that it is compared with: ours on the same kind of experts.
        dense: the dense layer of the same FLOPs and kind.
        same: whether it computes the same function as ``ours``, which is then checked.
        steps: whether a whole step of it is timed.
        leaves: inputs, other than x and the routing's weights, whose gradients it computes.
    """

    name: str
    forward: Callable[[], Tensor]
    problem: Problem
    parameters: Sequence[nn.Parameter]
    ours: str = "auto"
    dense: str = "dense"
    same: bool = True
    steps: bool = True
    leaves: Sequence[Tensor] = ()

    def clear(self) -> None:
        """Let go of all gradients."""
        for tensor in (self.problem.x, self.problem.routing.weight, *self.leaves, *self.parameters):
            tensor.grad = None

    def forward_backward(self) -> None:
        """One forward and backward pass, with the gradient of x and of the combine weights."""
        y = self.forward()
        y.backward(self.problem.grad if y.shape == self.problem.grad.shape else torch.ones_like(y))


class GEGLUExpert(SwiGLUExpert):
    """(gelu(x W_gate + b_gate) * (x W_in + b_in)) W_out + b_out: the experts of st-moe-pytorch."""

    def two_layers(self) -> TwoLayers:
        return (
            super()
            .two_layers()
            ._replace(
                activate=lambda gate, x: F.gelu(gate) * x,
                gradient=lambda grad, gate, x: (torch.ops.aten.gelu_backward(grad * x, gate), grad * F.gelu(gate)),
            )
        )


class GatedDense(nn.Module):
    """(act(x W_gate) * (x W_in)) W_out, the two inner products as one.

    Args:
        d: D.
        hidden: H.
        activation: the elementwise map.
        bias: whether each product has a bias.
    """

    def __init__(self, d: int, hidden: int, activation: Callable[[Tensor], Tensor], bias: bool):
        super().__init__()
        self.inner = nn.Linear(d, 2 * hidden, bias=bias)
        self.outer = nn.Linear(hidden, d, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, inner = self.inner(x).chunk(2, -1)
        return self.outer(self.activation(gate) * inner)


def make_layer(case: Case, expert: Expert) -> MoELayer:
    """A pool of these experts with the case's cohorts, nothing frozen, and a top-k gate."""
    _, d, _, experts, k = case.sizes
    cohorts = case.amount if case.kind == "cohorts" else 1
    if experts % cohorts:
        raise ValueError(f"{experts} experts cannot be cut into {cohorts} equal cohorts")
    torch.manual_seed(1)
    pool = ExpertPool(expert, experts // cohorts)
    for _ in range(cohorts - 1):
        pool.add_experts(experts // cohorts)
    return MoELayer(pool, TopKRouter(d, k)).to(case.device, case.dtype)


def freeze_share(layer: MoELayer, case: Case) -> None:
    """Freeze the case's share of the experts: balanced loads make it their share of the tokens as well."""
    if case.kind == "frozen":
        layer.pool.freeze(layer.pool.ids[: case.sizes[3] * case.amount // 100])


def expert_parameters(layer: MoELayer) -> list[nn.Parameter]:
    """The trainable tensors of the experts, without the gate's."""
    return [p for name, p in layer.pool.named_parameters() if name.startswith("rows.expert.") and p.requires_grad]


def expert_rows(layer: MoELayer) -> dict[str, Tensor]:
    """Row name -> (E, ...), as copies in pool order."""
    rows = layer.pool.namespace("expert")
    return {name: rows[name].detach().clone() for name in rows}


def arm_of(name: str, layer: MoELayer, problem: Problem, backend: str = "auto", **options) -> Arm:
    """A layer of ours on one backend; the arms of one layer share its weights."""
    view = copy.copy(layer)
    view.backend = backend
    return Arm(name, lambda: view.mix(problem.x, problem.routing), problem, expert_parameters(layer), **options)


def our_arms(problem: Problem, layer: MoELayer) -> list[Arm]:
    """``auto`` and every backend that computes on the case's device; in some cases ``auto_all_trainable`` and others.

    Args:
        problem: what they compute on.
        layer: of MLP experts, nothing frozen; frozen here as the case says.
    """
    arms = []
    kind, experts = problem.case.kind, problem.case.sizes[3]
    if kind == "frozen":
        arms.append(arm_of("auto_all_trainable", copy.deepcopy(layer), problem))
    if kind == "cohorts":
        arms.append(arm_of("auto_one_cohort", in_one_cohort(layer), problem))
    freeze_share(layer, problem.case)
    arms.insert(0, arm_of("auto", layer, problem))
    for backend in BACKENDS:
        fits = backend != "dense" or (experts <= DENSE_BACKEND_MAX_EXPERTS and not problem.case.is_large)
        fits = fits and (backend not in GPU_BACKENDS or problem.x.device.type == "cuda")
        if backend != "auto" and fits:
            name = "dense_backend" if backend == "dense" else backend
            arms.append(arm_of(name, layer, problem, backend, steps=not problem.case.is_large))
    return arms


def in_one_cohort(layer: MoELayer) -> MoELayer:
    """The same experts as one cohort."""
    pool = ExpertPool(layer.pool.expert, layer.pool.num_experts)
    with torch.no_grad():
        for name, rows in expert_rows(layer).items():
            pool.growable("expert", name).banks()[0][0].copy_(rows)
    return MoELayer(pool, layer.router)


def gate_arm(problem: Problem, layer: MoELayer) -> Arm:
    """The router alone, forward from x and backward from the combine weights."""
    rows = [p for name, p in layer.pool.named_parameters() if name.startswith(f"rows.{layer.namespace}.")]
    return Arm("gate", lambda: layer.route(problem.x).weight, problem, rows, same=False, steps=False)


def plain_arms(problem: Problem, layer: MoELayer) -> list[Arm]:
    """``dense``, ``raw_grouped_mm`` and ``balanced_bmm``, all weights trainable.

    The last one computes balanced loads in every case: a floor, as ``dense`` is. It is left out where E does not divide
    the assignments.

    Args:
        problem: what they compute on.
        layer: whose MLP experts they compute.
    """
    tokens, d, h, experts, k = problem.case.sizes
    mlp = nn.Sequential(nn.Linear(d, h * k), nn.GELU(), nn.Linear(h * k, d)).to(problem.x.device, problem.x.dtype)
    weights = {name: nn.Parameter(rows) for name, rows in expert_rows(layer).items()}
    stacked, balanced = list(weights.values()), problem.on_balanced_loads()
    arms = [
        Arm("dense", lambda: mlp(problem.x), problem, list(mlp.parameters()), same=False),
        Arm("raw_grouped_mm", lambda: raw_grouped_mm(problem.x, problem.routing, weights), problem, stacked),
    ]
    if tokens * k % experts == 0:
        same = problem.case.kind in ("", "frozen", "cohorts")
        arms.append(
            Arm(
                "balanced_bmm", lambda: balanced_bmm(problem.x, balanced.routing, weights), balanced, stacked, same=same
            )
        )
    return arms


def raw_grouped_mm(x: Tensor, routing: Routing, weights: dict[str, Tensor]) -> Tensor:
    """Sort, two grouped products with GELU between, and index_add: the plainest layer around F.grouped_mm."""
    expert, order = torch.sort(routing.expert_index)
    token = routing.token_index.index_select(0, order)
    counts = torch.zeros(routing.num_experts, dtype=torch.int64, device=x.device)
    ends = counts.scatter_add_(0, expert, torch.ones_like(expert)).cumsum(0, dtype=torch.int32)
    inner = F.grouped_mm(x.index_select(0, token), weights["w_in"], offs=ends)
    hidden = F.gelu(inner + weights["b_in"].index_select(0, expert))
    y = F.grouped_mm(hidden, weights["w_out"], offs=ends) + weights["b_out"].index_select(0, expert)
    return torch.zeros_like(x).index_add(0, token, y * routing.weight.index_select(0, order).unsqueeze(1))


def balanced_bmm(x: Tensor, routing: Routing, weights: dict[str, Tensor]) -> Tensor:
    """Sort, two batched products over equal loads, and index_add: no padding, no sizes to look at."""
    order = torch.sort(routing.expert_index).indices
    token = routing.token_index.index_select(0, order)
    slots = x.index_select(0, token).view(routing.num_experts, -1, x.shape[1])
    hidden = F.gelu(torch.baddbmm(weights["b_in"].unsqueeze(1), slots, weights["w_in"]))
    y = torch.baddbmm(weights["b_out"].unsqueeze(1), hidden, weights["w_out"]).flatten(0, 1)
    return torch.zeros_like(x).index_add(0, token, y * routing.weight.index_select(0, order).unsqueeze(1))


def mlp_arms(problem: Problem) -> list[Arm]:
    """All arms on experts of two layers with GELU and biases."""
    _, d, h, _, _ = problem.case.sizes
    layer = make_layer(problem.case, MLPExpert(d, h))
    plain = plain_arms(problem, layer)  # before anything is frozen: they share no tensor with the layer
    return [*our_arms(problem, layer), *plain, gate_arm(problem, layer)]


def check_equal(arms: Sequence[Arm]) -> None:
    """Compare each arm that computes the same function as ours with it: output, and gradients of x and the weights.

    Raises:
        ValueError: where they differ by more than 1e-4 of the largest number (bf16: 5e-2).
    """
    results = {arm.name: _results(arm) for arm in arms if arm.same}
    for arm in arms:
        if not arm.same:
            continue
        tolerance = 1e-4 if arm.problem.case.dtype == torch.float32 else 5e-2
        for what, expected in results[arm.ours].items():
            own = results[arm.name].get(what)
            if own is None:
                continue
            error = float((own - expected).abs().max() / expected.abs().max())
            if not error <= tolerance:
                raise ValueError(
                    f"{arm.problem.case.name}: {what} of {arm.name} differs from that of {arm.ours} by {error:.1e} "
                    "of its largest number: their times say nothing"
                )


def _results(arm: Arm) -> dict[str, Tensor]:
    arm.clear()
    y = arm.forward()
    y.backward(arm.problem.grad)
    gradients = {
        "the gradient of x": arm.problem.x.grad,
        "the gradient of the weights": arm.problem.routing.weight.grad,
    }
    arm.clear()
    found = {name: gradient.float() for name, gradient in gradients.items() if gradient is not None}
    return {"the output": y.detach().float(), **found}
