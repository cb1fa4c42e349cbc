"""The file of finished runs: JSON lines, each written in one go, so that an interrupted program leaves whole lines.

A last line that is damaged (the machine stopped while it was written) is left out, and cut off before the next one is
written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Key(NamedTuple):
    """What names a run in a file."""

    task: str
    row: str
    seed: int
    steps: int


def key_of(run: dict[str, Any]) -> Key:
    """Return the name of a run."""
    return Key(*(run[field] for field in Key._fields))


@dataclasses.dataclass(frozen=True)
class Records:
    """The files of one program.

    Attributes:
        program: its name in messages.
        fields: that each of its lines has, beside those of Key.
    """

    program: str
    fields: frozenset[str]

    def read(self, path: Path) -> list[dict[str, Any]]:
        """Return the runs in a file, none if there is no file.

        Raises:
            ValueError: a line, other than a damaged last one, is not of this program.
        """
        return self._read(path)[0]

    def read_files(self, paths: Iterable[Path]) -> dict[Key, dict[str, Any]]:
        """Return the runs of several files; of two with the same name, the later one counts.

        Raises:
            OSError: a file cannot be read.
            ValueError: one is not of this program, or none holds a run.
        """
        runs: dict[Key, dict[str, Any]] = {}
        for path in paths:
            path.stat()
            runs |= {key_of(run): run for run in self.read(path)}
        if not runs:
            raise ValueError("there is no finished run to show")
        return runs

    def missing(self, path: Path, settings: Mapping[Key, Any]) -> list[Key]:
        """Return which runs the file lacks, in the order of `settings`, that says what decides their outcomes.

        Raises:
            ValueError: the file is not of this program, or holds one of the runs with other settings.
        """
        held = {key_of(run): run["settings"] for run in self.read(path)}
        for key, wanted in settings.items():
            if key in held and held[key] != wanted:
                raise ValueError(f"{path} holds a run of {key.row!r} with other settings; name another file")
        return [key for key in settings if key not in held]

    def append(self, path: Path, run: dict[str, Any]) -> None:
        """Write a run behind the whole lines of a file."""
        end = self._read(path)[1]
        path.touch()
        with path.open("r+b", buffering=0) as file:
            file.truncate(end)
            file.seek(end)
            file.write((json.dumps(run) + "\n").encode())

    def _read(self, path: Path) -> tuple[list[dict[str, Any]], int]:
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
            if not (isinstance(run, dict) and run.keys() >= {*Key._fields, *self.fields}):
                raise ValueError(f"{path}, line {number}: not of {self.program}; name another file")
            runs.append(run)
            end += len(line)
        return runs, end
