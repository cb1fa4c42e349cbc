"""The few lines that matter of what was measured on a GPU: `python -m bench.gpu.headlines FILE`, of pytest's --record.

Which goals are met, how fast the layers of bench_smoke.py and bench_lstm_training.py are beside torch.nn's, what has
failed, and how long kernels were compiled, which is in none of the times.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.report import comparison, goals, layers_of, table
from bench.record import ended_rows
from bench.rows import read_rows

Line = dict[str, Any]  # of record.py


def headlines(path: Path) -> list[str]:
    """Return the lines of a file.

    Raises:
        OSError, ValueError: it cannot be read, or holds something else.
    """
    ended, rows = ended_rows(path), read_rows([path])
    by_outcome = {outcome: [line for line in ended if line["outcome"] == outcome] for outcome in ("passed", "failed")}
    first_look = [row for row in rows if row.suite == "bench_smoke"]
    others = [row for row in rows if row.suite in ("bench_core", "bench_grid")]
    lines = [comparison(layer) for layer in layers_of(first_look)]
    lines += goals(others).splitlines() if others else []
    lines += training(line for line in by_outcome["passed"] if "lstm_training" in line["fullname"])
    lines += [f"FAILED  {_row_of(line)}: {_first_line(line['reason'])}" for line in by_outcome["failed"]]
    skipped = sum(line["outcome"] == "skipped" for line in ended)
    lines += [f"{skipped} skipped, which their contenders cannot run"] * (skipped > 0)
    seconds = sum(line["extra_info"].get("compile_s", 0) for line in by_outcome["passed"])
    count = len(by_outcome["passed"])
    return [*lines, f"{count} measured; compiling their kernels took {seconds:.0f} s, which is in none of these times"]


def training(results: Iterable[Line]) -> list[str]:
    """Return a line for each group: nn.LSTM's time by the device's clock, and how many times as fast the others are."""
    lines = []
    for group, members in itertools.groupby(results, key=lambda result: result["group"]):
        facts = [result["extra_info"] for result in members]
        dense_us = next((fact["device_us"] for fact in facts if fact["contender"] == "nn.LSTM"), float("nan"))
        others = [
            f"{fact['contender']} ({fact['zeros']:.0%}) {dense_us / fact['device_us']:.2f}x"
            for fact in facts
            if fact["contender"] != "nn.LSTM"
        ]
        lines.append(f"{group}: nn.LSTM {dense_us:,.0f} µs; {', '.join(others)}")
    return lines


def _row_of(line: Line) -> str:
    """Its layer and contender."""
    return line["fullname"].partition("[")[2].removesuffix("]") or line["fullname"]


def _first_line(text: str) -> str:
    return text.partition("\n")[0][:300]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print them."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.headlines", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE", help="that pytest --record wrote, a .jsonl")
    parser.add_argument("--table", type=Path, metavar="FILE", help="also write a table of all layers")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(headlines(options.file)))
        if options.table is not None:
            options.table.write_text(table(read_rows([options.file])) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"bench.gpu.headlines: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
