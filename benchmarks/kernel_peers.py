"""The arms that are other libraries' layers, each beside ours on the same kind of experts with the same weights.

How each peer was made to take the precomputed routing:

- ``transformers_eager``, ``transformers_grouped``: its Mixtral experts module with either ``experts_implementation``.
  It takes a routing as it is; nothing was changed. Its experts are SwiGLU without biases: ours beside it is
  ``auto_swiglu``, the dense layer ``dense_swiglu``.
- ``st_moe``: the whole module, with its gate exchanged for one that returns the one-hot dispatch and combine tensors of
  the precomputed routing, made beforehand: that its own gate builds them each time is not charged. Sequences of 128
  tokens, in each of which the loads are equal, and a capacity of exactly that load: its best case. Balanced cases
  only, as its one-hot tensors grow with the largest load. Its experts are GEGLU with biases (the factor after the
  gate is off, so that the functions are equal): ours is ``auto_geglu``, the dense layer ``dense_geglu``.
- ``soft_moe``: its gate stands in the middle of its forward pass, so the arm is its experts module between the two
  einsums of its forward pass, written here again, with precomputed slot weights. Its moving of experts to the CPU is
  off. As many slots as assignments, in sequences of 128 tokens. Ours beside it is ``auto_soft``: a ``SoftRouter``'s
  routing with the same slot weights, on MLP experts.
- ``transformers_eager``, ``st_moe`` and ``soft_moe`` are left out in the largest cases: minutes, for what the others
  show as well.
- ``scattermoe``: its MLP module, on a GPU only. Without biases, as ours beside it, ``auto_no_bias``.
"""

import inspect
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from kernel_arms import Arm, GatedDense, GEGLUExpert, Problem, arm_of, expert_rows, freeze_share, make_layer
from torch import Tensor, nn

from modmoe import MLPExpert, MoELayer, SwiGLUExpert
from modmoe.gating.soft import SoftRouter
from modmoe.routing import SlotRouting

# arms -> module, install command
PEERS = {
    ("transformers_eager", "transformers_grouped"): ("transformers", "pip install 'transformers>=5.0'"),
    ("st_moe",): ("st_moe_pytorch", "pip install st-moe-pytorch"),
    ("soft_moe",): ("soft_moe_pytorch", "pip install soft-moe-pytorch"),
}
GPU_PEERS = {("scattermoe",): ("scattermoe", "pip install git+https://github.com/shawntan/scattermoe")}


def wanted_peers(on_gpu: bool) -> dict[tuple[str, ...], tuple[str, str]]:
    """Arms -> (module, install command), of the peers that compute on the devices at hand."""
    return {**PEERS, **GPU_PEERS} if on_gpu else PEERS


def missing_peers(on_gpu: bool) -> dict[str, str]:
    """Arm -> install command, of the peers that are not installed."""
    wanted = wanted_peers(on_gpu).items()
    return {arm: command for arms, (module, command) in wanted if find_spec(module) is None for arm in arms}


def peer_versions(on_gpu: bool) -> dict[str, str]:
    """Distribution -> version, of the peers that are installed."""
    modules = [module for module, _ in wanted_peers(on_gpu).values() if find_spec(module) is not None]
    return {module.replace("_", "-"): version(module.replace("_", "-")) for module in modules}


def peer_arms(problem: Problem) -> list[Arm]:
    """The arms of all installed peers that the case is for, with ours and the dense layer beside them."""
    case, missing = problem.case, missing_peers(problem.x.device.type == "cuda")
    _, _, _, experts, k = case.sizes
    length = case.sequence[1]
    arms: list[Arm] = []
    if case.kind == "cohorts":  # they have no cohorts
        return arms
    if "transformers_eager" not in missing:
        arms += transformers_arms(problem)
    if case.kind == "" and case.device.type == "cpu" and length * k % experts == 0 and not case.is_large:
        if "st_moe" not in missing:
            arms += st_moe_arms(problem)
        if "soft_moe" not in missing:
            arms += soft_moe_arms(problem)
    if case.device.type == "cuda" and "scattermoe" not in missing:
        arms += scattermoe_arms(problem)
    return arms


def transformers_arms(problem: Problem) -> list[Arm]:
    """Ours, dense and theirs on SwiGLU experts."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    _, d, h, experts, k = problem.case.sizes
    x, routing = problem.x, problem.routing
    layer = make_layer(problem.case, SwiGLUExpert(d, h))
    rows = expert_rows(layer)
    parameters = [
        nn.Parameter(torch.cat([rows["w_gate"], rows["w_in"]], 2).transpose(1, 2).contiguous()),
        nn.Parameter(rows["w_out"].transpose(1, 2).contiguous()),
    ]
    freeze_share(layer, problem.case)
    dense = GatedDense(d, h * k, F.silu, bias=False).to(x.device, x.dtype)
    beside = {"ours": "auto_swiglu", "dense": "dense_swiglu"}
    arms = [
        arm_of("auto_swiglu", layer, problem, **beside),
        Arm("dense_swiglu", lambda: dense(x), problem, list(dense.parameters()), same=False, **beside),
    ]
    for name, implementation in (("transformers_eager", "eager"), ("transformers_grouped", "grouped_mm")):
        if implementation == "eager" and problem.case.is_large:
            continue
        config = MixtralConfig(
            hidden_size=d,
            intermediate_size=h,
            num_local_experts=experts,
            num_experts_per_tok=k,
            hidden_act="silu",
            experts_implementation=implementation,
        )
        with torch.device("meta"):
            module = MixtralExperts(config)
        module.gate_up_proj, module.down_proj = parameters

        def forward(module: nn.Module = module) -> Tensor:
            return module(x, routing.choices, routing.weight.view(-1, k))

        arms.append(Arm(name, forward, problem, parameters, **beside))
    return arms


class GivenGate(nn.Module):
    """Stands for st-moe-pytorch's gate: returns what that returns, made beforehand.

    Args:
        dispatch: (B, S, E, C) one-hot.
        combine: (B, S, E, C) the same times the combine weights.
    """

    def __init__(self, dispatch: Tensor, combine: Tensor):
        super().__init__()
        self.given = dispatch, combine

    def forward(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self.given, x.new_zeros(()), x.new_zeros(())


def st_moe_arms(problem: Problem) -> list[Arm]:
    """Ours, dense and theirs on GEGLU experts."""
    from st_moe_pytorch import MoE
    from st_moe_pytorch.st_moe_pytorch import Expert

    _, d, h, experts, k = problem.case.sizes
    num_sequences, length = problem.case.sequence
    x, routing = problem.x, problem.routing
    layer = make_layer(problem.case, GEGLUExpert(d, h, bias=True))
    rows = expert_rows(layer)
    multiple = 1.5 * (h + 0.25) / d  # it takes the integer part of two thirds of this, times d
    theirs = [Expert(d, hidden_mult=multiple, mult_bias=False) for _ in range(experts)]
    with torch.no_grad():
        for e, expert in enumerate(theirs):
            inner, _, outer = expert.net
            inner.weight.copy_(torch.cat([rows["w_in"][e], rows["w_gate"][e]], 1).t())
            inner.bias.copy_(torch.cat([rows["b_in"][e], rows["b_gate"][e]]))
            outer.weight.copy_(rows["w_out"][e].t())
            outer.bias.copy_(rows["b_out"][e])
    capacity = length * k // experts
    chosen = F.one_hot(routing.expert_index, experts).view(num_sequences, length * k, experts)
    place = ((chosen.cumsum(1) - 1) * chosen).sum(2)
    slots = (chosen.unsqueeze(3) * F.one_hot(place, capacity).unsqueeze(2)).to(x.dtype)
    by_token = (num_sequences, length, k, experts, capacity)
    dispatch = slots.view(by_token).sum(2)
    combine = (slots * routing.weight.detach().view(num_sequences, -1, 1, 1)).view(by_token).sum(2).requires_grad_()
    moe = MoE(d, num_experts=experts, experts=nn.ModuleList(theirs))
    moe.gate = GivenGate(dispatch, combine)
    dense = GatedDense(d, h * k, F.gelu, bias=True)
    beside = {"ours": "auto_geglu", "dense": "dense_geglu"}

    def forward() -> Tensor:
        return moe(x.view(num_sequences, length, d)).outputs.reshape(x.shape)

    return [
        arm_of("auto_geglu", layer, problem, **beside),
        Arm("dense_geglu", lambda: dense(x), problem, list(dense.parameters()), same=False, **beside),
        Arm("st_moe", forward, problem, list(moe.experts.parameters()), leaves=(combine,), **beside),
    ]


def soft_moe_arms(problem: Problem) -> list[Arm]:
    """Ours and theirs on slots; the dense MLP has the FLOPs of the experts, not those of mixing."""
    from soft_moe_pytorch import SoftMoE

    _, d, h, experts, k = problem.case.sizes
    num_sequences, length = problem.case.sequence
    slots = length * k // experts
    top_k_layer = make_layer(problem.case, MLPExpert(d, h))
    layer = MoELayer(top_k_layer.pool, SoftRouter(d, slots))
    routing = layer.route(problem.x.detach().view(num_sequences, length, d)).detach()
    assert isinstance(routing, SlotRouting)
    dispatch, combine = routing.dispatch.requires_grad_(), routing.combine.requires_grad_()
    rows = expert_rows(layer)
    theirs = SoftMoE(
        d, num_experts=experts, num_slots=slots, expert_mult=(h + 0.25) / d, offload_unused_experts_to_cpu=False
    ).experts
    with torch.no_grad():
        for e, expert in enumerate(theirs.experts):
            inner, outer = expert[0], expert[-1]
            inner.weight.copy_(rows["w_in"][e].t())
            inner.bias.copy_(rows["b_in"][e])
            outer.weight.copy_(rows["w_out"][e].t())
            outer.bias.copy_(rows["b_out"][e])

    def forward() -> Tensor:
        own = torch.einsum("bnd,bnes->besd", problem.x.view(num_sequences, length, d), dispatch)
        out = theirs(own).flatten(1, 2)
        return torch.einsum("bsd,bns->bnd", out, combine.flatten(2)).reshape(problem.x.shape)

    def ours() -> Tensor:
        return layer.mix(problem.x.view(num_sequences, length, d), routing).reshape(problem.x.shape)

    own_rows = [p for name, p in layer.pool.named_parameters() if name.startswith("rows.expert.")]
    leaves = (dispatch, combine)
    return [
        Arm("auto_soft", ours, problem, own_rows, ours="auto_soft", leaves=leaves),
        Arm("soft_moe", forward, problem, list(theirs.parameters()), ours="auto_soft", leaves=leaves),
    ]


def scattermoe_arms(problem: Problem) -> list[Arm]:
    """Ours and theirs on MLP experts without biases."""
    from scattermoe.mlp import MLP

    _, d, h, experts, k = problem.case.sizes
    x, routing = problem.x, problem.routing
    layer = make_layer(problem.case, MLPExpert(d, h, bias=False))
    rows = expert_rows(layer)
    options = {"bias": False} if "bias" in inspect.signature(MLP).parameters else {}  # older ones have none at all
    mlp = MLP(d, h, experts, k, activation=nn.GELU(), **options).to(x.device, x.dtype)
    with torch.no_grad():
        mlp.experts.weight.copy_(rows["w_in"].transpose(1, 2))
        mlp.output_experts.weight.copy_(rows["w_out"].transpose(1, 2))

    def forward() -> Tensor:
        return mlp(x, routing.weight.view(-1, k), routing.choices)

    return [
        arm_of("auto_no_bias", layer, problem, ours="auto_no_bias"),
        Arm("scattermoe", forward, problem, list(mlp.parameters()), ours="auto_no_bias"),
    ]
