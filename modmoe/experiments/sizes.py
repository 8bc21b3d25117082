"""Models of equal size."""

from collections.abc import Callable

from torch import nn

from modmoe.growth import count_parameters


def nearest_size(make: Callable[[int], nn.Module], target: int) -> int:
    """The size at which a model's number of parameters, which grows with it, comes nearest to the target."""

    def count(size: int) -> int:
        return count_parameters(make(size)).total

    low, high = 1, 2
    while count(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return min((low, high), key=lambda size: abs(count(size) - target))
