"""Compiles the kernels of gate gradients for a target; prints JSON: what is wrong with each, by name.

    python gate_gradient_code_program.py 90 loop|some|all

"loop" is the time loop in bfloat16 alone. Each kernel takes the registers and the stack that it needs, so a spill
anywhere is seen; of the time loop, the order of what hands over gate gradients is held against loop.py's argument.
"""

import itertools
import json
import sys

from tools.machine_code import MachineCode, compile_for
from triton_sparse_rnn.kernels.triton.gate_gradients.loop import STAGES, gate_gradient_steps
from triton_sparse_rnn.kernels.triton.gate_gradients.products import (
    BLOCK_I,
    BLOCK_K,
    CHUNKS_AT_A_TIME,
    ROWS_AT_A_TIME,
    input_gradient,
    list_chunks,
    list_rows,
    warps_for,
    weight_gradient,
)
from triton_sparse_rnn.kernels.triton.gate_gradients.products import STAGES as PRODUCT_STAGES
from triton_sparse_rnn.kernels.triton.gate_gradients.states import BLOCK, lstm_states
from triton_sparse_rnn.kernels.triton.gate_gradients.states import STAGES as STATE_STAGES
from triton_sparse_rnn.kernels.triton.gate_gradients.step import BLOCKS, DENSE, ELEMENTS, Zeroing, gate_gradient_step
from triton_sparse_rnn.kernels.triton.gate_gradients.through_time import choose_step_tile
from triton_sparse_rnn.kernels.triton.tiles import H200

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
WORDS = 128  # chunks of the largest layers
GATES = "of the dtype of gates"
TYPES = {
    **dict.fromkeys(["gates_ptr", "grad_y_ptr", "weight_ptr", "x_ptr", "out_ptr"], GATES),
    **dict.fromkeys(["c_ptr", "c0_ptr", "dh_ptr", "dc_ptr", "thresholds_ptr"], "*fp32"),
    **dict.fromkeys(["seed_ptr", "zeros_ptr", "starts_ptr"], "*i64"),
    **dict.fromkeys(["exchange_ptr", "kept_ptr", "lengths_ptr", "list_ptr", "counts_ptr", "status_ptr"], "*i32"),
}
INTEGERS = ["spin_limit", "first_slice", "t", "R", "T", "N", "B", "C", "H", "I"]
STRIDES = ["stride_grad_y", "stride_weight", "stride_x"]


def compile_kernel(kernel, dtype, constants, arch, num_warps, maxnreg=None) -> MachineCode:
    types = {name: f"*{dtype}" if kind == GATES else kind for name, kind in TYPES.items()}
    types |= dict.fromkeys([*INTEGERS, *STRIDES], "i32")
    types = {name: types[name] for name in kernel.arg_names if name not in constants}
    divisible = [name for name in ("H", "I", *STRIDES) if name in types]
    return compile_for(kernel, types, constants, arch=arch, num_warps=num_warps, maxnreg=maxnreg, divisible=divisible)


def order_problems(code: MachineCode) -> list[str]:
    """What breaks the argument of loop.py, in the order of instructions of a step."""
    found = []
    kinds = [opcode.partition(".")[0] for opcode in code.step]
    strong = [i for i, opcode in enumerate(code.step) if "STRONG" in opcode]
    word = next(i for i in strong if kinds[i] == "STG")
    stored = max(i for i in range(word) if kinds[i] == "STG")
    if not follow(kinds[stored + 1 : word], "BAR", "MEMBAR"):
        found.append("a word is stored without barrier and fence behind the gate gradients")
    waited = max(strong)
    read = next((i for i in range(waited, len(kinds)) if kinds[i] == "LDGSTS"), None)
    if read is None or not follow(kinds[waited:read], "MEMBAR", "CCTL", "BAR"):
        found.append("gate gradients are read without fence and barrier behind the wait")
    if "LDGSTS" in kinds[:waited]:
        found.append("copies begin before the wait has ended")
    weak = [a.opcode for a in code.accesses if a.arguments & {"exchange_ptr", "status_ptr"} and not a.strong]
    if weak:
        found.append(f"weak accesses to words or status: {weak}")
    return found


def follow(kinds, *wanted) -> bool:
    """Whether the wanted kinds are there in this order."""
    rest = iter(kinds)
    return all(kind in rest for kind in wanted)


def ways_of_the_loop(dtype, everything):
    """What the time loop is compiled for, and how float32 is multiplied."""
    precisions = ("tf32", "tf32x3") if dtype == "fp32" else ("tf32",)
    zeroings = [Zeroing(BLOCKS.value, True, 16, 16), Zeroing(ELEMENTS.value, True)]
    sizes = [(2048, 64)]
    if everything:
        zeroings += [Zeroing(DENSE.value), Zeroing(ELEMENTS.value), Zeroing(BLOCKS.value, True, 64, 16)]
        zeroings += [Zeroing(BLOCKS.value, True, 16, 64), Zeroing(BLOCKS.value, False, 4, 2)]
        sizes = list(itertools.product((256, 512, 1024, 2048, 8192), (1, 16, 64, 256)))
    for zeroing in zeroings:
        tiles = dict.fromkeys(choose_step_tile(H, B, zeroing, BYTES[dtype], H200.sms) for H, B in sizes)
        for tile, precision, ragged in itertools.product(tiles, precisions, (True, False) if everything else (True,)):
            yield zeroing, tile, precision, ragged


def examine_loop(arch, dtype, everything) -> dict[str, list[str]]:
    found = {}
    for zeroing, tile, precision, ragged in ways_of_the_loop(dtype, everything):
        skips = zeroing.group == BLOCKS.value
        absent = [] if ragged else ["starts_ptr", "lengths_ptr"]
        absent += [] if skips else ["list_ptr"]
        constants = {
            **dict.fromkeys(absent), **step_constants(zeroing, tile, ragged), "WORDS": WORDS, "SKIPS": skips,
            "PARTS": tile.num_warps // 4, "PRECISION": precision, "STAGES": STAGES[precision], "PORTABLE": False,
        }  # fmt: skip
        code = compile_kernel(gate_gradient_steps, dtype, constants, arch, tile.num_warps, maxnreg=255)
        problems = spills(code) + order_problems(code)
        name = f"loop, {dtype} by {precision}, {zeroing}, {tile}{', ragged' if ragged else ''}"
        found[name] = problems
    return found


def examine_others(arch, dtype, everything) -> dict[str, list[str]]:
    """The kernels beside the loop, ragged: for a rectangle they do less."""
    found = {}
    zeroing = Zeroing(BLOCKS.value, True, 16, 16)
    tile = choose_step_tile(2048, 64, zeroing, BYTES[dtype], H200.sms)
    kernels = {
        "step": (gate_gradient_step, step_constants(zeroing, tile, True), tile.num_warps),
        "states": (lstm_states, {"REVERSE": True, "RAGGED": True, "BLOCK": BLOCK, "STAGES": STATE_STAGES}, 1),
    }
    for units, rows in ((16, 16), (32, 32), (16, 64)) if everything else ((16, 16),):
        tile = choose_step_tile(2048, 64, Zeroing(BLOCKS.value, True, units, rows), BYTES[dtype], H200.sms)
        lists = {"ROWS": tile.rows, "RAGGED": True, "BLOCK": ROWS_AT_A_TIME // tile.rows}
        product = {"CHUNK": tile.chunk, "PORTABLE": False}
        kernels[f"list of rows, {tile}"] = list_rows, lists, 4
        kernels["list of chunks"] = list_chunks, {"BLOCK": CHUNKS_AT_A_TIME}, 4
        for precision in ("tf32", "tf32x3") if dtype == "fp32" else ("tf32",):
            columns = {"BLOCK_I": BLOCK_I[precision], "STAGES": PRODUCT_STAGES}
            constants = {**product, **columns, "PRECISION": precision}
            kernels[f"dW by {precision}, {tile}"] = weight_gradient, {**constants, "BLOCK_K": BLOCK_K}, 4
            constants |= {"ROWS": tile.rows, "RAGGED": True}
            kernels[f"dx by {precision}, {tile}"] = input_gradient, constants, warps_for(tile.rows)
    for name, (kernel, constants, num_warps) in kernels.items():
        found[f"{name}, {dtype}"] = spills(compile_kernel(kernel, dtype, constants, arch, num_warps, maxnreg=255))
    return found


def step_constants(zeroing, tile, ragged) -> dict[str, object]:
    return {
        "ROWS": tile.rows, "UNITS": tile.units, "CHUNK": tile.chunk, "GROUP": zeroing.group, "SAMPLE": zeroing.sample,
        "BLOCK_UNITS": zeroing.units, "BLOCK_ROWS": zeroing.rows, "REVERSE": False, "RAGGED": ragged,
    }  # fmt: skip


def spills(code: MachineCode) -> list[str]:
    return [f"spills {code.spilled_bytes} bytes a thread"] if code.spilled_bytes else []


if __name__ == "__main__":
    arch, everything = int(sys.argv[1]), sys.argv[2] == "all"
    dtypes = {"all": tuple(BYTES), "some": ("fp32", "bf16"), "loop": ("bf16",)}[sys.argv[2]]
    examined = {}
    for dtype in dtypes:
        examined |= examine_loop(arch, dtype, everything)
    for dtype in {"all": dtypes, "some": ("bf16",), "loop": ()}[sys.argv[2]]:
        examined |= examine_others(arch, dtype, everything)
    json.dump(examined, sys.stdout)
