"""Arrays out of files that others packed, without running any code that such a file may hold.

A pickle can name any function for the reader to call. The readers here know numpy's arrays, and the few objects of
pandas that hold a table's columns, and refuse everything else with `pickle.UnpicklingError`.
"""

import io
import pickle
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np


def arrays_of(content: bytes, file: str, keys: Iterable[str]) -> "dict[str, np.ndarray[Any, Any]]":
    """The named arrays of an .npz file.

    Raises:
        ValueError: if it is damaged or lacks one.
    """
    try:
        with np.load(io.BytesIO(content)) as archive:
            return {key: archive[key] for key in keys}
    except (KeyError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays of numbers and nothing else, so that a changed package could not run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


class TableUnpickler(ArrayUnpickler):
    """Unpickles a pandas table into `Part` objects around arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "pandas":
            return Part
        if (module, name) == ("builtins", "slice"):
            return slice
        if module in {"numpy.core.numeric", "numpy._core.numeric"} and name == "_frombuffer":
            return lambda buffer, dtype, shape, order: np.frombuffer(buffer, dtype).reshape(shape, order=order)
        return super().find_class(module, name)


class Part:
    """What stands for an object of pandas: its arguments and state, and none of its code."""

    def __new__(cls, *args: Any) -> "Part":
        part = super().__new__(cls)
        part.args = args
        return part

    def __setstate__(self, state: Any) -> None:
        self.state = state


def columns_of(frame: Any) -> "dict[str, np.ndarray[Any, Any]]":
    """The columns of a table whose pandas objects are `Part` objects: blocks of rows, each with its places."""
    blocks, (names, *_) = frame.state["_mgr"].args[:2]
    names = names.args[1]["data"]
    return {name: values for block in blocks for name, values in zip(names[block.args[1]], block.args[0], strict=True)}
