"""Compiles the kernel of resident.py as it is and broken on purpose, and prints what `residency.problems` says of each.

    python broken_kernels.py some|all

Run without TRITON_INTERPRET, from an empty folder, which the broken kernels' sources are written to. Prints JSON: for
each variant, or for the first two, a list of problems.
"""

import dataclasses
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from unittest import mock

from tools import residency
from triton_sparse_rnn.kernels.triton import resident, resident_product
from triton_sparse_rnn.kernels.triton.tiles import ResidentTile

TILE = ResidentTile(slots=4, itemsize=4, groups=1, rows=1, num_warps=4, ko=2, tiles=2, registers=128)
PICKED = dataclasses.replace(TILE, picked=True, ko=1, tiles=3)

WEAK_STORES = """

@triton.jit
def publish(ptr, h, mask):
    tl.store(ptr, h.to(tl.int32, bitcast=True), mask=mask)
"""
SILENT = """

@triton.jit
def publish(ptr, h, mask):
    pass
"""
LOADS = """

@triton.jit
def look(
    base_ptr, columns, stride_bytes, PACK: tl.constexpr, PORTABLE: tl.constexpr,
    HALF: tl.constexpr = WHOLE, HAS_BELOW: tl.constexpr = False, H=0, below=0,
):
    return tl.load(base_ptr + columns_in(columns, HALF, PORTABLE) * (stride_bytes // 4), volatile=VOLATILE)


@triton.jit
def wait(
    words, base_ptr, columns, stride_bytes, status_ptr, spin_limit, PACK: tl.constexpr, PORTABLE: tl.constexpr,
    HALF: tl.constexpr = WHOLE, HAS_BELOW: tl.constexpr = False, H=0, below=0,
):
    return words.to(tl.float32, bitcast=True)
"""
STRONG_LOADS, WEAK_LOADS = (LOADS.replace("VOLATILE", word) for word in ("True", "False"))
LOOP = "    for s in range(begin, end):\n"
PIPELINED_LOOP = "    for s in tl.range(begin, end, num_stages=3):\n"
LOADING_LOOP = f"""{LOOP}        if PICKED:
            weights, columns = load_picked_tiles(weights_ptr, columns_ptr, program, GROUPS * SLOTS, TILES, KO)
        else:
            weights, columns = load_tiles(weights_ptr, columns_ptr, program, GROUPS, SLOTS, TILES, KO, TIED)
"""


def broken(name: str, *, loop: str = LOOP, appended: str = ""):
    """Return the kernel with another head of the time loop, or functions of its own instead of imported ones."""
    source, product = (inspect.getsource(module) for module in (resident, resident_product))
    assert source.count(LOOP) == 1
    Path(f"{name}_product.py").write_text(product + appended)
    source = source.replace(resident_product.__name__, f"{name}_product").replace(LOOP, loop)
    path = Path(f"{name}.py").resolve()
    path.write_text(source + (appended if "publish" in appended else ""))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.resident_steps


def problems(kernel, tile: ResidentTile = TILE, arch: int = 90) -> list[str]:
    """Compile a kernel as residency.py does."""
    with mock.patch.object(resident, "resident_steps", kernel):
        return residency.problems(residency.compile_tile(residency.TileCase(tile, "GRU", "float32", arch)), tile)


def main() -> None:
    sys.path.insert(0, str(Path.cwd()))
    kernel = resident.resident_steps
    found = {"right, sm_90": problems(kernel)}
    weak_stores = broken("weak_stores", appended=WEAK_STORES)
    found["weak stores"] = problems(weak_stores)
    if sys.argv[1] == "all":
        found |= all_others(kernel)
    json.dump(found, sys.stdout)


def all_others(kernel) -> dict[str, list[str]]:
    found = {}
    weak_loads = broken("weak_loads", appended=WEAK_LOADS)
    pipelined = broken("pipelined", loop=PIPELINED_LOOP, appended=STRONG_LOADS)
    loading, silent = broken("loading", loop=LOADING_LOOP), broken("silent", appended=SILENT)
    for kind, tile in (("", TILE), (", picks", PICKED)):
        found |= {f"right, sm_{arch}{kind}": problems(kernel, tile, arch) for arch in residency.ARCHITECTURES}
        found[f"weak loads{kind}"] = problems(weak_loads, tile)
        found[f"pipelined loads{kind}"] = problems(pipelined, tile)
        found[f"weights in the loop{kind}"] = problems(loading, tile)
        found[f"nothing published{kind}"] = problems(silent, tile)
        large = dataclasses.replace(tile, ko=4, tiles=20, registers=255)
        found[f"too large a tile{kind}"] = problems(kernel, large)
        found[f"too few registers said{kind}"] = problems(kernel, dataclasses.replace(tile, registers=32))
    return found


if __name__ == "__main__":
    main()
