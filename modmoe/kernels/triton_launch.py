"""Sizes of tiles, and the one place where kernels are launched."""

import dataclasses
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from modmoe.hosts import import_host


@dataclass(frozen=True)
class Tiles:
    """A program computes block_m x block_n numbers, block_k terms of their sums at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By architecture and bytes of a number. Sized so that every kernel's shared memory fits and few registers spill, which
# tests check by compiling them; not tuned on a card.
TILES = {
    (80, 2): Tiles(128, 128, 32, num_warps=8, num_stages=3),  # also 8.6, 8.9 and 12.x, which have less shared memory
    (80, 4): Tiles(64, 64, 32, num_warps=4, num_stages=3),
    (90, 2): Tiles(128, 128, 64, num_warps=8, num_stages=3),
    (90, 4): Tiles(64, 64, 32, num_warps=4, num_stages=3),
    (100, 2): Tiles(128, 128, 64, num_warps=8, num_stages=3),
    (100, 4): Tiles(64, 64, 32, num_warps=4, num_stages=3),
}
INTERPRETED = Tiles(16, 32, 32, num_warps=1, num_stages=1)
FEW_ROWS = 32  # assignments for each expert up to which a tile of more rows would mostly compute nothing


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU, for tests: TRITON_INTERPRET=1, set before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there: a CUDA device from compute capability 8.0 on, not in double precision."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if interpreting():
        return device.type == "cpu"
    cuda = device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    return cuda and torch.cuda.get_device_capability(device) >= (8, 0)


def architecture(device: torch.device) -> int:
    """The column of ``TILES`` for a device: 80, 90 or 100; 0 for the interpreter."""
    if device.type == "cpu":
        return 0
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


def choose_tiles(arch: int, element_size: int) -> Tiles:
    """The tiles for an architecture and numbers of so many bytes."""
    return INTERPRETED if arch == 0 else TILES[arch, element_size]


def fewer_rows(tiles: Tiles, num_rows: int, num_experts: int) -> Tiles:
    """Tiles for N assignments to E experts; by sizes only, so that the host need not know the loads."""
    if tiles.block_m > FEW_ROWS and num_rows <= FEW_ROWS * num_experts:
        return dataclasses.replace(tiles, block_m=FEW_ROWS, num_warps=4)
    return tiles


def narrower(tiles: Tiles) -> Tiles:
    """Tiles for the kernels of the hidden layer, whose second sum and activation take registers too."""
    return dataclasses.replace(tiles, block_n=min(tiles.block_n, 64))


def precision(dtype: torch.dtype) -> str:
    """Of products in float32: exact ones, unless ``torch.set_float32_matmul_precision`` allows TF32."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def load_kernels() -> ModuleType:
    """The module of kernels.

    Raises:
        MissingExtraError: if Triton is not installed.
    """
    import_host("triton")
    from modmoe.kernels import triton_kernels

    return triton_kernels


def launch(kernel: Any, grid: tuple[int, ...], tiles: Tiles, *arguments: Any, **constants: Any) -> None:
    """Run one kernel: constants are compiled into it."""
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, wherever the tensors are
        kernel[grid](
            *arguments,
            **constants,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
