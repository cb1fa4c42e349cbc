"""Rows of a suite, each a line of JSON as soon as it has ended: a run that is cut leaves what it measured, and goes on.

    pytest -m gpu bench/gpu/bench_core.py --record core.jsonl           and the same again for what is left

A line has what pytest-benchmark tells of a row, and how it ended: passed, failed or skipped. One more says before a row
that it has begun, so that a row in which the process ends is known; it is tried twice. Rows of a group are compared
with each other, so all those of a group that was cut are measured again, in one process. The later line counts.
"""

from __future__ import annotations

import collections
import errno
import json
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

FIELDS = frozenset({"fullname", "outcome"})
BEGUN = "begun"
MOST_TRIES = 2
# Exit statuses of pytest, beside its own.
DISABLED = pytest.ExitCode.USAGE_ERROR
NOT_WRITTEN = 74
LEFT = 75  # rows were left for want of time
FAULTED = 76  # the device no longer works in this process: what is left needs a new one


def ended_rows(path: Path) -> list[dict[str, Any]]:
    """Return a line for each row that has ended, whichever way.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line, other than a damaged last one, is no row.
    """
    return list(_ends_of(_read(path, FIELDS)[0]).values())


def _ends_of(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the line of each row that is not to be tried again."""
    ends: dict[str, dict[str, Any]] = {}
    tries: collections.Counter[str] = collections.Counter()
    for line in lines:
        row = line["fullname"]
        if line["outcome"] != BEGUN:
            ends[row] = line
            tries[row] = 0
            continue
        tries[row] += 1
        ends.pop(row, None)
        if tries[row] >= MOST_TRIES:
            ends[row] = {**line, "outcome": "failed", "reason": f"the process ended in it, {MOST_TRIES} times"}
    return ends


def lines_to_append_to(path: Path, fields: frozenset[str]) -> list[dict[str, Any]]:
    """Return the lines of JSON of a file, which is made if there is none; a damaged last one is cut off.

    Args:
        path: of the file.
        fields: that each line has.
    Raises:
        OSError: it cannot be read or written.
        ValueError: it holds something else.
    """
    path.touch()
    lines, end = _read(path, fields)
    if end < path.stat().st_size:
        os.truncate(path, end)
    return lines


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Write a line in one go. Raises OSError if it is not all written."""
    text = (json.dumps(line) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        if file.write(text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _read(path: Path, fields: frozenset[str]) -> tuple[list[dict[str, Any]], int]:
    """Return the lines, and how many bytes of the file they take; a damaged last one does not count."""
    lines, end = [], 0
    written = path.read_bytes().splitlines(keepends=True)
    for number, text in enumerate(written, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not text.endswith(b"\n") or (line is None and number == len(written)):
            break
        if not (isinstance(line, dict) and line.keys() >= fields):
            raise ValueError(f"{path}, line {number}, lacks one of {', '.join(sorted(fields))}; name another file")
        lines.append(line)
        end += len(text)
    return lines, end


class Record:
    """The rows in a file, and what is left of those that are wanted."""

    def __init__(self, path: Path) -> None:
        """Read the file, which is made if there is none; a damaged last line is cut off.

        Raises:
            OSError: it cannot be read or written.
            ValueError: it holds something else.
        """
        self._path = path
        self._lines = lines_to_append_to(path, FIELDS)

    def append(self, line: dict[str, Any]) -> None:
        """Write a line. Raises OSError if it is not all written."""
        append_line(self._path, line)
        self._lines.append(line)

    def outcomes(self) -> dict[str, str]:
        """Return how each row ended that is not to be tried again."""
        return {row: line["outcome"] for row, line in _ends_of(self._lines).items()}

    def left(self, groups: Iterable[Sequence[str]]) -> list[str]:
        """Return the rows to measure: of each group that lacks one, all but those that failed."""
        found = self.outcomes()
        lacking = [rows for rows in groups if not found.keys() >= set(rows)]
        return [row for rows in lacking for row in rows if found.get(row) != "failed"]


class RecordPlugin:
    """Lets pytest measure what is left, and write it."""

    def __init__(self, path: Path, has_faulted: Callable[[], bool]) -> None:
        """Read what the file holds.

        Args:
            path: of the file.
            has_faulted: whether what follows a row that failed would fail too, whatever it is.
        Raises:
            OSError, ValueError: as Record.
        """
        self._path, self._record, self._has_faulted = path, Record(path), has_faulted
        self._rows: list[str] = []
        self._faulted = False

    @pytest.hookimpl(trylast=True)  # after -m and -k
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        groups: dict[str, list[str]] = {}
        for item in items:
            groups.setdefault(_group_of(item), []).append(item.nodeid)
        self._rows = [item.nodeid for item in items]
        left = set(self._record.left(groups.values()))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in left])
        items[:] = [item for item in items if item.nodeid in left]

    @pytest.hookimpl(trylast=True)  # after what skips it
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._append({"fullname": item.nodeid, "outcome": BEGUN})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.when == "call":
            if report.passed and getattr(getattr(item, "funcargs", {}).get("benchmark"), "disabled", False):
                pytest.exit("--record: pytest-benchmark measures nothing, as it is disabled", returncode=DISABLED)
            self._append(_line_of(item, call, report))
            if report.failed and self._has_faulted():
                self._faulted = True
                item.session.shouldstop = "the device has faulted: what is left needs a new process"
        return report

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        own = pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED
        if self._faulted:
            session.exitstatus = FAULTED
        elif exitstatus in own:
            counts = self._counts()
            session.exitstatus = 1 if counts["failed"] or exitstatus == 1 else LEFT if counts["left"] else 0

    def pytest_unconfigure(self) -> None:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self._counts().items() if count)
        print(f"{self._path.name}, {len(self._rows)} rows: {counts or 'none'}")

    def _counts(self) -> dict[str, int]:
        found = self._record.outcomes()
        counts = collections.Counter(found.get(row, "left") for row in self._rows)
        return {outcome: counts[outcome] for outcome in ("passed", "failed", "skipped", "left")}

    def _append(self, line: dict[str, Any]) -> None:
        try:
            self._record.append(line)
        except OSError as error:
            pytest.exit(f"a row could not be written: {error}", returncode=NOT_WRITTEN)


def _group_of(item: pytest.Item) -> str:
    """What the rows have in common that are compared with each other: all but the contender."""
    callspec: Any = getattr(item, "callspec", None)
    params = {} if callspec is None else {name: str(value) for name, value in callspec.params.items()}
    params.pop("contender", None)
    return f"{item.nodeid.partition('[')[0]} {params}"


def _line_of(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> dict[str, Any]:
    line: dict[str, Any] = {"fullname": item.nodeid, "outcome": report.outcome}
    if call.excinfo is not None:
        line["reason"] = str(call.excinfo.value).strip() or call.excinfo.typename
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if report.passed and benchmark is not None and benchmark.stats:
        found = benchmark.stats.as_dict(include_data=False)
        line |= {name: found[name] for name in ("name", "group", "stats", "extra_info")}
    return line
