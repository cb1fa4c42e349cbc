"""Compiles a kernel whose machine code is known, for each target; prints JSON, a list of MachineCode."""

import dataclasses
import json
import sys

import triton
import triton.language as tl

from tools.machine_code import ARCHITECTURES, compile_for


@triton.jit
def steps(x_ptr, w_ptr, y_ptr, S, stride, BLOCK: tl.constexpr):
    """Multiply a row by weights that were loaded before the loop, step by step, with a barrier in each."""
    offs = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + offs)
    for _ in range(S):
        tl.store(y_ptr + offs, tl.exp2(tl.load(x_ptr + offs, volatile=True) * w))
        tl.debug_barrier()
        x_ptr += stride
        y_ptr += stride


def main() -> None:
    types = {"x_ptr": "*fp32", "w_ptr": "*fp32", "y_ptr": "*fp32", "S": "i32", "stride": "i32"}
    found = []
    for arch in ARCHITECTURES:
        code = compile_for(steps, types, {"BLOCK": 512}, arch=arch, num_warps=4, divisible=("stride",))
        found.append(dataclasses.asdict(code) | {"barriers": code.count("BAR"), "exponentials": code.count("MUFU")})
    limited = compile_for(steps, types, {"BLOCK": 4096}, arch=90, num_warps=4, maxnreg=32)
    found.append(dataclasses.asdict(limited))
    try:
        compile_for(steps, types, {}, arch=90, num_warps=4)
    except ValueError as error:
        found.append(str(error))
    json.dump(found, sys.stdout, default=sorted)


if __name__ == "__main__":
    main()
