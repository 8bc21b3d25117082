"""What a feed-forward block is: read from any module as an expert, and written back as an ordinary module."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, nn

from modmoe.experts import MLPExpert, SwiGLUExpert
from modmoe.experts.base import ACTIVATIONS
from modmoe.kernels.reference import LoopOps

FFN = MLPExpert | SwiGLUExpert
TransformerLayer = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer
ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
SCALES = torch.tensor([[[0.1], [1.0], [1.0]], [[3.0], [30.0], [1000.0]]], dtype=torch.float64)  # ReLU6 is no ReLU
SUPPORTED = (
    "Supported are blocks that compute act(x W + b) W' + b' by two linear layers, with act one of "
    f"{sorted(ACTIVATIONS)}, or (silu(x W_gate) * (x W)) W' by three, each with or without biases and dropout; and "
    "nn.TransformerEncoderLayer and nn.TransformerDecoderLayer as a whole"
)


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)): one SwiGLUExpert as an ordinary module.

    Args:
        in_features: D.
        hidden_features: H.
        out_features: None for D.
        bias: of all three layers.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int | None = None, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(in_features, hidden_features, bias)
        self.up_proj = nn.Linear(in_features, hidden_features, bias)
        self.down_proj = nn.Linear(hidden_features, in_features if out_features is None else out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D_out)."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True)
class FeedForward:
    """A block as an expert.

    Args:
        expert: the kind.
        rows: name -> one expert's row; views of the block's weights, but for a bias that only other layers have: 0.
        dropouts: what follows the last linear layer.
    """

    expert: FFN
    rows: dict[str, Tensor]
    dropouts: tuple[nn.Module, ...]


@torch.no_grad()
def read_feed_forward(name: str, module: nn.Module, omit_inner_dropout: bool = False) -> FeedForward:
    """Recognise a feed-forward block by what it computes, whatever its class and the names in it.

    A copy with random weights is run beside each candidate in float64: what is taken for an expert equals it to 1e-9,
    the activation included.

    Args:
        name: for the errors.
        module: left as it is.
        omit_inner_dropout: take a block that has dropout before its last linear layer, which no expert has.
    Raises:
        ValueError: on any other module, and on inner dropout.
    """
    block = _as_sequential(module) if isinstance(module, TransformerLayer) else module
    linears = {path: m for path, m in block.named_modules() if _is_linear(m)}
    if len(linears) not in (2, 3):
        raise _unknown(name, module, f"it holds {len(linears)} linear layers")
    known = {id(parameter) for linear in linears.values() for parameter in linear.parameters()}
    others = [path for path, parameter in block.named_parameters() if id(parameter) not in known]
    if others:
        raise _unknown(name, module, f"it has parameters beyond those of its linear layers: {others}")
    try:
        probe = _randomised(block)
    except Exception as error:
        raise _unknown(name, module, f"it cannot be copied to float64: {error}") from error
    ran, problems = False, []
    for order in permutations(linears):
        in_features = _weight(linears[order[0]]).shape[0]
        x = torch.randn(2, 3, in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * SCALES
        for expert in _candidates([linears[path] for path in order]):
            rows = _rows(expert, [probe.get_submodule(path) for path in order])
            try:
                found = probe(x.clone())
            except Exception as error:  # another order may have the right size
                problems.append(str(error))
                break
            ran = True
            if _close(found, expert.compute(x, LoopOps(rows))):
                dropouts = _dropouts(name, module, block, probe, x, order[-1], omit_inner_dropout)
                return FeedForward(expert, _rows(expert, [linears[path] for path in order]), dropouts)
    if ran or not problems:
        raise _unknown(name, module, "no order of its linear layers and no activation gives what it computes")
    raise _unknown(name, module, f"trials failed: {'; '.join(dict.fromkeys(problems))}")


@torch.no_grad()
def dense_module(expert: FFN, rows: dict[str, Tensor]) -> nn.Module:
    """One expert as an ordinary module: Sequential(Linear, act, Linear), or :class:`SwiGLU`; what it reads, in reverse.

    Args:
        expert: the kind.
        rows: name -> one expert's row, without a leading axis; copied.
    """
    in_features, hidden_features = rows["w_in"].shape
    module: nn.Module
    if isinstance(expert, SwiGLUExpert):
        module = SwiGLU(in_features, hidden_features, expert.out_features, expert.bias)
        linears = {"gate": module.gate_proj, "in": module.up_proj, "out": module.down_proj}
    else:
        first = nn.Linear(in_features, hidden_features, expert.bias)
        last = nn.Linear(hidden_features, expert.out_features, expert.bias)
        module = nn.Sequential(first, ACTIVATION_MODULES[expert.activation](), last)
        linears = {"in": first, "out": last}
    module.to(device=rows["w_in"].device, dtype=rows["w_in"].dtype)
    for part, linear in linears.items():
        linear.weight.copy_(rows[f"w_{part}"].T)
        if expert.bias:
            linear.bias.copy_(rows[f"b_{part}"])
    return module


class _Function(nn.Module):
    """An activation that is given as a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def output_dropout(layer: TransformerLayer) -> nn.Module:
    """The dropout of a transformer layer that follows its second linear layer."""
    return layer.dropout3 if isinstance(layer, nn.TransformerDecoderLayer) else layer.dropout2


def _as_sequential(layer: TransformerLayer) -> nn.Module:
    """The feed-forward block that such a layer computes in its own forward; anything where a subclass changes it."""
    plain = nn.TransformerDecoderLayer if isinstance(layer, nn.TransformerDecoderLayer) else nn.TransformerEncoderLayer
    if type(layer)._ff_block is not plain._ff_block or not isinstance(layer.linear1, nn.Linear):
        return layer
    activation = layer.activation if isinstance(layer.activation, nn.Module) else _Function(layer.activation)
    return nn.Sequential(layer.linear1, activation, layer.dropout, layer.linear2, output_dropout(layer))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """The Conv1D of GPT-2 in transformers: a linear layer whose weight is (D_in, D_out)."""
    shape = getattr(getattr(module, "weight", None), "shape", None)
    return type(module).__name__ == "Conv1D" and shape == (getattr(module, "nx", 0), getattr(module, "nf", 0))


def _weight(linear: nn.Module) -> Tensor:
    """(D_in, D_out)."""
    weight = linear.get_parameter("weight").detach()
    return weight if _is_transposed(linear) else weight.T


def _bias(linear: nn.Module) -> Tensor | None:
    bias = getattr(linear, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def _randomised(block: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU in evaluation, with weights that hide nothing: a last layer may start at zero."""
    probe = copy.deepcopy(block).to("cpu", torch.float64).eval()
    generator = torch.Generator().manual_seed(0)
    for linear in probe.modules():
        if _is_linear(linear):
            linear.get_parameter("weight").normal_(0.0, _weight(linear).shape[0] ** -0.5, generator=generator)
            bias = _bias(linear)
            if bias is not None:
                bias.normal_(generator=generator)
    return probe


def _candidates(linears: list[nn.Module]) -> list[FFN]:
    """The expert kinds that linear layers in this order (gate, in, out, or in, out) may be."""
    shapes = [tuple(_weight(linear).shape) for linear in linears]
    (in_features, hidden), (hidden_out, out_features) = shapes[0], shapes[-1]
    if hidden != hidden_out or any(shape != shapes[0] for shape in shapes[:-1]):
        return []
    bias = any(_bias(linear) is not None for linear in linears)
    if len(linears) == 3:
        return [SwiGLUExpert(in_features, hidden, out_features, bias)]
    return [MLPExpert(in_features, hidden, out_features, activation, bias) for activation in ACTIVATIONS]


def _rows(expert: FFN, linears: list[nn.Module]) -> dict[str, Tensor]:
    rows = {}
    for part, linear in zip(("gate", "in", "out")[3 - len(linears) :], linears, strict=True):
        rows[f"w_{part}"] = weight = _weight(linear)
        if expert.bias:
            bias = _bias(linear)
            rows[f"b_{part}"] = weight.new_zeros(weight.shape[1]) if bias is None else bias
    return rows


def _close(found: object, expected: Tensor) -> bool:
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    )


def _dropouts(
    name: str, module: nn.Module, block: nn.Module, probe: nn.Module, x: Tensor, last: str, omit_inner: bool
) -> tuple[nn.Module, ...]:
    """The dropout modules that run after the layer ``last``; those before it are refused unless they are omitted."""
    trace: list[str] = []
    for path, part in probe.named_modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) or path == last:
            part.register_forward_hook(lambda *_, path=path: trace.append(path))
    evaluated = probe(x.clone())
    if last not in trace:
        raise _unknown(name, module, f"it reads the weight of '{last}' without calling it, so dropout has no place")
    inner, outer = trace[: trace.index(last)], trace[trace.index(last) + 1 :]
    rates = [getattr(block.get_submodule(path), "p", 0.0) for path in inner]
    if max(rates, default=0.0) > 0 and not omit_inner:
        raise ValueError(
            f"'{name}' has dropout of {max(rates)} before its last linear layer, and experts have none: set it to 0, "
            "or say omit_inner_dropout=True to train without it"
        )
    probe.train()
    for part in probe.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.eval()
    if not _close(probe(x.clone()), evaluated):
        raise _unknown(name, module, "in training it computes something else, and not by a dropout module")
    return tuple(part for part in map(block.get_submodule, outer) if getattr(part, "p", 1.0) > 0)


def _unknown(name: str, module: nn.Module, reason: str) -> ValueError:
    children = ", ".join(f"{child}: {type(part).__name__}" for child, part in module.named_children())
    return ValueError(
        f"'{name}' is no feed-forward block that an expert can copy: {reason}. "
        f"It is {type(module).__name__}({children}). {SUPPORTED}"
    )
