"""Every Triton kernel compiled to machine code for each architecture, without a card.

What is compiled is what a call would launch: the host's part runs on the CPU, and each launch is compiled with its own
arguments instead of being run. It needs Triton without its interpreter, hence a process of its own (this file as a
program).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from modmoe import Expert, MLPExpert, Routing, SwiGLUExpert
from modmoe.kernels import triton, triton_launch
from modmoe.kernels.triton import run_triton
from modmoe.rows import Group

ROOT = Path(__file__).resolve().parents[2]

# Bytes of shared memory that a program may take. The column for 8.0 also serves 8.6, 8.9 and 12.x, which have least.
SHARED = {80: 101376, 90: 232448, 100: 232448}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}
KERNELS = {"hidden_forward", "scatter_product", "hidden_backward", "weight_gradient"}

# name: architecture, dtype, kind, features, tokens, whether tokens stand in order
BUILDS = {
    f"{arch}_{str(dtype).removeprefix('torch.')}": (arch, dtype, kind, 256, 512, True)
    for arch in SHARED
    for dtype, kind in ((torch.float32, MLPExpert(256, 512)), (torch.bfloat16, SwiGLUExpert(256, 512, bias=True)))
}
BUILDS["90_few_rows_of_odd_sizes_in_no_order"] = (
    90,
    torch.bfloat16,
    MLPExpert(33, 17, activation="tanh"),
    33,
    8,
    False,
)


def build(arch: int, dtype: torch.dtype, expert: Expert, features: int, num_tokens: int, ordered: bool) -> list[dict]:
    """What is known of each kernel that a forward and backward pass launches."""
    found: dict[str, dict] = {}

    def compile_instead(
        kernel: Any, grid: tuple, tiles: triton_launch.Tiles, *arguments: Any, **constants: Any
    ) -> None:
        constants |= {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k}
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        source = specialise(kernel, arguments, constants)
        key = str((kernel.__name__, source.signature, source.constants, source.attrs))
        if key not in found:
            found[key] = describe(kernel.__name__, compiler.compile(source, GPUTarget("cuda", arch, 32), options))

    from triton import compiler
    from triton.backends.compiler import GPUTarget

    triton_launch.launch = compile_instead
    triton_launch.architecture = lambda device: arch
    triton.usable = lambda device, dtype: True
    tensors = {
        name: torch.zeros(2, *(expert.sizes().get(size, size) for size in spec.shape), dtype=dtype).requires_grad_()
        for name, spec in expert.row_specs().items()
    }
    x = torch.zeros(num_tokens, features, dtype=dtype, requires_grad=True)
    weight = torch.zeros(num_tokens, requires_grad=True)
    token = torch.arange(num_tokens)
    scores = torch.zeros(num_tokens, 2)
    routing = Routing(token, token % 2, weight, num_tokens, 2, scores, scores, top_k=1 if ordered else None)
    run_triton([Group((0, 1), (0, 1), False, tensors)], expert, x, routing).sum().backward()
    return list(found.values())


def specialise(kernel: Any, arguments: tuple, constants: dict) -> Any:
    """As Triton does at a launch: the type of each argument, and what 16 divides; a 1 becomes a constant."""
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    attributes: dict[tuple, list] = {}
    for index, name in enumerate(kernel.arg_names):
        argument = arguments[index] if index < len(arguments) else None
        if argument is None or (isinstance(argument, int) and argument == 1):
            signature[name] = "constexpr"
            constants = constants if argument is None else constants | {name: 1}
            continue
        address = argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
        signature[name] = POINTERS[argument.dtype] if isinstance(argument, torch.Tensor) else "i32"
        if address % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def describe(name: str, compiled: Any) -> dict:
    from triton import knobs

    code = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "kernel": name,
        "shared": compiled.metadata.shared,
        "bytes": len(compiled.asm["cubin"]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "tensor_cores": bool(re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", code)),
        "tf32": "tf32" in code,
        "blocks_of_16_bytes": bool(re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", code)),
    }


def main(path: str) -> None:
    torch.set_num_threads(1)
    Path(path).write_text(json.dumps({name: build(*arguments) for name, arguments in BUILDS.items()}))


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "builds.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", BUILDS)
def test_every_kernel_compiles_and_fits(name, builds):
    assert {build["kernel"] for build in builds[name]} == KERNELS
    # the output's and the input gradient's product; the gradients of the inner and of the outer matrix
    assert len(builds[name]) == 6
    assert all(build["bytes"] > 0 for build in builds[name])
    assert max(build["shared"] for build in builds[name]) <= SHARED[BUILDS[name][0]]
    assert {build["stack"] for build in builds[name]} == {0}  # no register is kept in memory


@pytest.mark.parametrize("name", BUILDS)
def test_float32_is_exact_and_half_precision_uses_tensor_cores(name, builds):
    half = BUILDS[name][1] == torch.bfloat16
    assert {build["tensor_cores"] for build in builds[name]} == {half}
    assert not any(build["tf32"] for build in builds[name])


@pytest.mark.parametrize("name", BUILDS)
def test_aligned_rows_are_read_in_blocks(name, builds):
    # an address out of a table says nothing of its alignment: without the hint each number would be read by itself
    aligned = BUILDS[name][3] % 16 == 0
    assert {build["blocks_of_16_bytes"] for build in builds[name]} == {aligned}


if __name__ == "__main__":
    main(sys.argv[1])
