"""The convolutional expert."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from modmoe.experts.base import ACTIVATIONS, Expert, ExpertOps, check_activation
from modmoe.growable import Init, RowSpec


class ConvExpert(Expert):
    """Convolutions with an activation between them; then, if wanted, an activation and a linear map.

    Layer l maps (C, height, width) to (C', height', width') with
    height' = floor((height + 2 p - kernel_size) / stride) + 1, p = kernel_size // 2. Images come and go flattened,
    channels first, as any expert's input and output.

    Args:
        in_shape: channels, height and width of an input image.
        channels: of each layer's output, at least one layer.
        out_features: size of the linear map's output; None for none: the last feature map is the output, of shape
            ``out_shape``.
        kernel_size: height and width of the kernels.
        stride: of every layer.
        activation: one of "gelu", "relu", "silu", "tanh".
        in_features: D, where the input has other columns before the image's (which a gate reads); None for the
            image's alone.
    Raises:
        ValueError: on a size below 1, no layer, in_features too small for the image, or an unknown activation.
    """

    one_by_one_on_cpu = True

    def __init__(
        self,
        in_shape: Sequence[int],
        channels: Sequence[int],
        out_features: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        activation: str = "gelu",
        in_features: int | None = None,
    ):
        self.in_shape, self.channels = tuple(in_shape), tuple(channels)
        if len(self.in_shape) != 3 or not channels or min(*in_shape, *channels, kernel_size, stride) < 1:
            raise ValueError(
                "in_shape (channels, height, width), at least one layer, and sizes of at least 1 are needed, got "
                f"{self.in_shape}, {self.channels}, {kernel_size=} and {stride=}"
            )
        check_activation(activation)
        self.kernel_size = kernel_size
        self.stride = stride
        self.activation = activation
        height, width = self.in_shape[1:]
        for _ in self.channels:
            height, width = ((size + 2 * (kernel_size // 2) - kernel_size) // stride + 1 for size in (height, width))
        self.out_shape = (self.channels[-1], height, width)
        self.map_features = self.channels[-1] * height * width
        self.has_linear = out_features is not None
        self.out_features = self.map_features if out_features is None else out_features
        self.image_features = self.in_shape[0] * self.in_shape[1] * self.in_shape[2]
        self.in_features = self.image_features if in_features is None else in_features
        if self.in_features < self.image_features or self.out_features < 1:
            raise ValueError(
                f"in_features has to hold the image's {self.image_features} and out_features at least 1, "
                f"got {self.in_features} and {self.out_features}"
            )

    def __repr__(self) -> str:
        return f"ConvExpert({self.in_shape}, {self.channels}, {self.out_features})"

    @property
    def output_rows(self) -> tuple[str, ...]:
        last = len(self.channels) - 1
        return ("w_out", "b_out") if self.has_linear else (f"kernel_{last}", f"bias_{last}")

    def sizes(self) -> dict[str, int]:
        return {}

    def row_specs(self) -> dict[str, RowSpec]:
        specs = {}
        for layer, (c_in, c_out) in enumerate(pairwise((self.in_shape[0], *self.channels))):
            fan_in = Init("uniform", c_in * self.kernel_size**2)
            specs[f"kernel_{layer}"] = RowSpec((c_out, c_in, self.kernel_size, self.kernel_size), fan_in)
            specs[f"bias_{layer}"] = RowSpec((c_out,), fan_in)
        if self.has_linear:
            fan_in = Init("uniform", self.map_features)
            specs["w_out"] = RowSpec((self.map_features, self.out_features), fan_in)
            specs["b_out"] = RowSpec((self.out_features,), fan_in)
        return specs

    def compute(self, x: Tensor, ops: ExpertOps) -> Tensor:
        activation, padding = ACTIVATIONS[self.activation], self.kernel_size // 2
        y = x[..., x.shape[-1] - self.image_features :].unflatten(-1, self.in_shape)
        for layer in range(len(self.channels)):
            y = y if layer == 0 else activation(y)
            y = ops.conv2d(y, f"kernel_{layer}", f"bias_{layer}", self.stride, padding)
        y = y.flatten(-3)
        return ops.linear(activation(y), "w_out", "b_out") if self.has_linear else y
