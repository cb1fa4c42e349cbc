"""The file of finished runs: JSON lines, each written in one go, so that an interrupted program leaves whole lines.

A last line that is damaged (the machine stopped while it was written) is left out, and cut off before the next one is
written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FIELDS = {
    "task", "row", "seed", "steps", "settings", "gate_gradient", "quality", "zeros", "redundant_macs", "distribution",
}  # fmt: skip


class Key(NamedTuple):
    """What names a run in a file."""

    task: str
    row: str
    seed: int
    steps: int


def key_of(run: dict[str, Any]) -> Key:
    """Return the name of a run."""
    return Key(*(run[field] for field in Key._fields))


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the runs in a file, none if there is no file.

    Raises:
        ValueError: a line, other than a damaged last one, is not of this program.
    """
    return _read(path)[0]


def read_files(paths: Iterable[Path]) -> dict[Key, dict[str, Any]]:
    """Return the runs of several files; of two with the same name, the later one counts.

    Raises:
        OSError: a file cannot be read.
        ValueError: one is not of this program, or none holds a run.
    """
    runs: dict[Key, dict[str, Any]] = {}
    for path in paths:
        path.stat()
        runs |= {key_of(run): run for run in read_runs(path)}
    if not runs:
        raise ValueError("there is no finished run to show")
    return runs


def append_run(path: Path, run: dict[str, Any]) -> None:
    """Write a run behind the whole lines of a file."""
    end = _read(path)[1]
    path.touch()
    with path.open("r+b", buffering=0) as file:
        file.truncate(end)
        file.seek(end)
        file.write((json.dumps(run) + "\n").encode())


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the runs and how many bytes of the file they take."""
    if not path.exists():
        return [], 0
    runs, end = [], 0
    lines: Sequence[bytes] = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            run = json.loads(line)
        except ValueError:
            run = None
        if not line.endswith(b"\n") or (run is None and number == len(lines)):
            break
        if not (isinstance(run, dict) and run.keys() >= FIELDS):
            raise ValueError(f"{path}, line {number}: not of bench.gate_gradients; name another file")
        runs.append(run)
        end += len(line)
    return runs, end
