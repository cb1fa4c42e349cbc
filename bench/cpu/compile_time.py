"""How long a layer compiles at its first call, and how long in the next process: `python -m bench.cpu.compile_time`.

Each line is two fresh processes with a cache folder of their own, empty for the first one. What is timed is `warm_up()`
of a converted layer; importing the package, and numba with it, is timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

from bench.rows import markdown

CASES: dict[str, dict[str, Any]] = {
    "GRU, 16x1": {"cell": "GRU", "storage": ("Blocks", 16, 1)},
    "GRU, 16x32": {"cell": "GRU", "storage": ("Blocks", 16, 32)},
    "GRU, picks 16x1 of 32": {"cell": "GRU", "storage": ("Picks",)},
    "LSTM, 16x1": {"cell": "LSTM", "storage": ("Blocks", 16, 1)},
    "LSTM, 16x32": {"cell": "LSTM", "storage": ("Blocks", 16, 32)},
    "RNN, 16x1": {"cell": "RNN", "storage": ("Blocks", 16, 1)},
    "GRU, 16x1, int8 weights": {"cell": "GRU", "storage": ("Blocks", 16, 1), "weight_dtype": "int8"},
    "GRU, 16x1, int8 weights and activations": {
        "cell": "GRU", "storage": ("Blocks", 16, 1), "weight_dtype": "int8", "activation_dtype": "int8",
    },
}  # fmt: skip


def measure(name: str) -> dict[str, float]:
    """Convert a layer in this process, and return the seconds of importing and of `warm_up()`."""
    start = time.perf_counter()
    import numba.core.registry  # noqa: F401
    import torch

    import triton_sparse_rnn

    imported = time.perf_counter()
    case = CASES[name]
    dtypes = {key: getattr(torch, case[key]) for key in ("weight_dtype", "activation_dtype") if key in case}
    kind, *sizes = case["storage"]
    storage = getattr(triton_sparse_rnn, kind)(*sizes)
    layer = getattr(torch.nn, case["cell"])(64, 64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*little to skip")
        fast: Any = triton_sparse_rnn.to_sparse(layer.eval(), storage=storage, backend="cpu", **dtypes)
    converted = time.perf_counter()
    fast.warm_up()
    return {"import": imported - start, "warm_up": time.perf_counter() - converted}


def table() -> str:
    """Return a Markdown table, a line for each case."""
    cells = []
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            first, second = (_alone(name, folder) for _ in range(2))
        seconds = first["warm_up"], second["warm_up"], second["import"]
        cells.append([name, *(f"{value:.2f}" for value in seconds)])
    return markdown(["layer", "first process, s", "second process, s", "imports, s"], cells)


def _alone(name: str, cache_folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.cpu.compile_time", "--case", name]
    environment = os.environ | {"NUMBA_CACHE_DIR": cache_folder}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print the table, or what one case measures."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu.compile_time", description=__doc__)
    parser.add_argument("--case", choices=CASES, help="measure one case in this process and print JSON")
    options = parser.parse_args()
    print(table() if options.case is None else json.dumps(measure(options.case)))


if __name__ == "__main__":
    main()
