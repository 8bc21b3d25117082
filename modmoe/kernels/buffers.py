"""Memory for gradients that is used again: fresh pages cost more than the products that fill them."""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

MIN_BYTES = 128 * 1024  # smaller ones come from the heap anyway


class GradientBuffers:
    """Lends memory in the shape of a parameter for its gradient, the same as last time if nobody holds that any more.

    PyTorch's CPU allocator gives large tensors back to the system when ``zero_grad`` drops them, and the system clears
    every page that it hands out: for the gradients of 64 experts that takes longer than computing them (measured). Here
    the memory stays with the parameter until that is gone. Whoever still holds the last gradient (a second backward
    pass before ``zero_grad``, a list, a numpy view) keeps it: then there is new memory.
    """

    def __init__(self) -> None:
        self._held = WeakIdKeyDictionary()

    def take(self, parameter: Tensor) -> Tensor:
        """Memory with the parameter's shape, dtype and device, whatever it holds."""
        if parameter.nbytes < MIN_BYTES or parameter.device.type != "cpu":
            return torch.empty_like(parameter)
        held: Tensor | None = self._held.get(parameter)
        fits = held is not None and held.shape == parameter.shape and held.dtype == parameter.dtype
        if held is None or not fits or _num_owners(held) > 1:
            held = torch.empty_like(parameter, memory_format=torch.contiguous_format)
            self._held[parameter] = held
        return held.detach()  # a tensor of its own, so that autograd may take it as the gradient without a copy


def _num_owners(tensor: Tensor) -> int:
    """How many tensors, arrays and the like hold the memory."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1  # the storage object here is one


gradient_buffers = GradientBuffers()
