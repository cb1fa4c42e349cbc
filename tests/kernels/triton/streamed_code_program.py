"""Compiles the kernels that read weights at every step, each row of their tables for each target given as an argument.

Run without TRITON_INTERPRET. Prints JSON: for each kernel what is wrong with its machine code.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from tools import residency
from tools.machine_code import compile_for
from triton_sparse_rnn.kernels.triton import block_product, streamed
from triton_sparse_rnn.kernels.triton.cells import CELLS
from triton_sparse_rnn.kernels.triton.exchange import BETWEEN, NONE

INTEGERS = ("columns_ptr", "starts_ptr", "lengths_ptr", "status_ptr", "exchange_ptr")


def pointer(name: str, weights: str) -> str:
    if name == "starts_ptr":
        return "*i64"
    if name.endswith(INTEGERS):
        return "*i32"
    return f"*{weights}" if "values" in name else "*fp32"


def jobs(architectures: list[int]) -> Iterator[tuple[str, Any, dict[str, Any], str, int, Any, bool]]:
    """Name, kernel, constants, dtype of weights, target, tile, and whether programs exchange h."""
    cells = (("RNN_TANH", "fp32"), ("GRU", "fp32"), ("LSTM", "bf16"))
    for arch, (mode, weights), picked in itertools.product(architectures, cells, (False, True)):
        tiles = [(tile, True) for tile in streamed.BETWEEN_TILES]
        of_products = block_product.PICKED_TILES if picked else block_product.TILES
        tiles += [(tile, False) for tile in of_products if tile.rows <= streamed._MOST_ROWS]
        for tile, between in tiles:
            constants = {
                "CELL": CELLS[mode], "ROWS": tile.rows, "BLOCK_K": tile.block_k, "DOT": tile.dot,
                "EXCHANGE": (BETWEEN if between else NONE).value, "RAGGED": between, "FUSED_INPUT": not between,
                "HH_PICKED": picked, "IH_PICKED": picked, "PACK": streamed._PACK, "PORTABLE": False,
            }  # fmt: skip
            how = f"{'between' if between else 'one step'} {tile.rows} rows{' of picks' if picked else ''}"
            name = f"streamed {mode} {weights} {how} sm_{arch}"
            yield name, streamed.streamed_steps, constants, weights, arch, tile, between
    product_tiles = [(tile, False) for tile in block_product.TILES]
    product_tiles += [(tile, True) for tile in block_product.PICKED_TILES]
    products = itertools.product(architectures, ((1, "bf16"), (3, "fp32")), product_tiles)
    for arch, (G, weights), (tile, picked) in products:
        constants = {
            "GATES": G, "SLOTS": 1 if G == 1 else 4, "EMPTY": 2 if G == 3 else 4, "USED": 1 if G == 1 else 4,
            "HAS_BIAS": True, "ROWS": tile.rows, "BLOCK_K": tile.block_k, "DOT": tile.dot, "PICKED": picked,
            "PORTABLE": False, "stride_x_c": 1, "stride_y_s": 1, "stride_bias_s": 1,
        }  # fmt: skip
        name = f"product {G} {weights} {tile.rows} rows{' of picks' if picked else ''} sm_{arch}"
        yield name, block_product.block_product_kernel, constants, \
            weights, arch, tile, False  # fmt: skip


def problems(architectures: list[int], index: int) -> tuple[str, list[str]]:
    """Compile one of the jobs, which are made anew here: kernels cannot be sent to another process."""
    name, kernel, constants, weights, arch, tile, between = list(jobs(architectures))[index]
    absent = [] if constants.get("RAGGED", True) else ["starts_ptr", "lengths_ptr"]
    if kernel is streamed.streamed_steps:
        absent += [] if between else ["exchange_ptr", "sums_ptr"]
        inputs = ("x_ptr", "ih_values_ptr", "ih_columns_ptr", "ih_starts_ptr", "slot_bias_ptr")
        absent += [] if constants["FUSED_INPUT"] else inputs
    types = {
        argument: pointer(argument, weights) if argument.endswith("_ptr") else "i32"
        for argument in kernel.arg_names
        if argument not in constants and argument not in absent
    }
    code = compile_for(
        kernel, types, constants | dict.fromkeys(absent), arch=arch, num_warps=tile.num_warps, maxnreg=tile.maxnreg
    )
    found = [f"spills {code.spilled_bytes} bytes"] if code.spilled_bytes else []
    if between:
        found += residency._exchange_problems(code, between=True)
        found += [opcode for opcode in code.opcodes if opcode.startswith("LDGSTS")]
    return name, found


def main() -> None:
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        architectures = list(map(int, sys.argv[1:]))
        count = len(list(jobs(architectures)))
        json.dump(dict(pool.map(problems, [architectures] * count, range(count))), sys.stdout)


if __name__ == "__main__":
    main()
