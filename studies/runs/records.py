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

import torch

from triton_sparse_rnn.doctor import processor_name, versions


class Key(NamedTuple):
    """What names a run in a file."""

    task: str
    row: str
    seed: int
    steps: int


def key_of(run: dict[str, Any]) -> Key:
    """Return the name of a run."""
    return Key(*(run[field] for field in Key._fields))


def line_of(key: Key, **facts: Any) -> dict[str, Any]:
    """Return what a file holds of a run, or of its times: its name, facts, and where they were found."""
    here = {"threads": torch.get_num_threads(), "processor": processor_name(), "versions": versions()}
    return key._asdict() | facts | here


class Lines(NamedTuple):
    """What files hold: finished runs, and what was timed of them."""

    runs: dict[Key, dict[str, Any]]
    times: dict[Key, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Records:
    """The files of one program.

    Attributes:
        program: its name in messages.
        fields: that each run has, beside those of Key.
        times: that each line about the time of a run has instead; none: nothing is timed.
    """

    program: str
    fields: frozenset[str]
    times: frozenset[str] = frozenset()

    def read(self, path: Path) -> list[dict[str, Any]]:
        """Return the lines of a file, none if there is no file.

        Raises:
            ValueError: a line, other than a damaged last one, is not of this program.
        """
        return self._read(path)[0]

    def read_files(self, paths: Iterable[Path]) -> Lines:
        """Return what several files hold; of two lines of the same run, the later one counts.

        Raises:
            OSError: a file cannot be read.
            ValueError: one is not of this program, or none holds a run.
        """
        found = Lines({}, {})
        for path in paths:
            path.stat()
            for line in self.read(path):
                (found.times if self._is_time(line) else found.runs)[key_of(line)] = line
        if not found.runs:
            raise ValueError("there is no finished run to show")
        return found

    def missing(self, path: Path, settings: Mapping[Key, Any]) -> list[Key]:
        """Return which runs the file lacks, in the order of `settings`, that says what decides their outcomes.

        Raises:
            ValueError: the file is not of this program, or holds one of the runs with other settings.
        """
        held = {key_of(line): line["settings"] for line in self.read(path) if not self._is_time(line)}
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

    def _is_time(self, line: dict[str, Any]) -> bool:
        return bool(self.times) and line.keys() >= self.times

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
            fields = {*Key._fields, *(() if isinstance(run, dict) and self._is_time(run) else self.fields)}
            if not (isinstance(run, dict) and run.keys() >= fields):
                raise ValueError(f"{path}, line {number}: not of {self.program}; name another file")
            runs.append(run)
            end += len(line)
        return runs, end
