"""Compiles the kernels of TTT-Linear for an H100, without one, and prints the shared memory that each takes.

A process of its own: with the tests' TRITON_INTERPRET kernels are not made to be compiled.
"""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moshi_ttt.kernels import linear_kernels
from moshi_ttt.kernels.scan import Launch

LAUNCH = Launch(rows=64)
INTEGERS = ("N", "H", "M")


def shared_memory(kernel, **constants) -> int:
    """Bytes of one program's."""
    names = kernel.arg_names
    types = {name: "i32" if name in INTEGERS else "*fp32" for name in names}
    types |= {"radius": "fp32"} | dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name] == "*fp32"}
    compiled = triton.compile(
        ASTSource(kernel, types, values, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": LAUNCH.warps, "num_stages": 1},
    )
    assert compiled.asm["cubin"]
    return compiled.metadata.shared


if __name__ == "__main__":
    shared = {"KP": LAUNCH.rows, "D": 128, "BLOCK": LAUNCH.block, "BOUND": True, "P": "tf32x3"}
    sizes = {
        "forward, kept": shared_memory(linear_kernels.forward, KEEP=True, **shared),
        "forward, in place": shared_memory(linear_kernels.forward, KEEP=False, **shared),
        "backward": shared_memory(linear_kernels.backward, **shared),
    }
    print(json.dumps(sizes))
