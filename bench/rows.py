"""Rows of what pytest-benchmark or record.py wrote, one file for each process that was run, and tables of such."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.record import ended_rows

BASELINES = ("nn.GRU", "nn.LSTM", "nn.RNN", "F.linear", "without pruner", "reading", "kernel")


class Row(NamedTuple):
    """One contender in one group of one suite (a file bench_*.py), over all files read."""

    suite: str
    group: str
    contender: str
    median_us: float  # a call
    ratios: list[float]  # to the baseline of the group, one for each file that has it
    facts: dict[str, Any]


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Return a row for each contender of each group, in the order of the first file.

    Raises:
        ValueError: a file is not pytest-benchmark's JSON, or if its name ends in .jsonl, not of record.py.
    """
    times: dict[tuple[str, str, str], list[float]] = {}
    ratios: dict[tuple[str, str, str], list[float]] = {}
    facts: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in paths:
        in_file: dict[tuple[str, str, str], float] = {}
        for key, median_us, extra_info in _entries(path):
            in_file[key], facts[key] = median_us, extra_info
        for (suite, group, contender), median_us in in_file.items():
            key = suite, group, contender
            times.setdefault(key, []).append(median_us)
            baselines = (in_file.get((suite, group, name)) for name in BASELINES)
            if (baseline := next(filter(None, baselines), None)) is not None:
                ratios.setdefault(key, []).append(baseline / median_us)
    return [Row(*key, statistics.median(values), ratios.get(key, []), facts[key]) for key, values in times.items()]


def markdown(headings: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *cells))


def _entries(path: Path) -> Iterator[tuple[tuple[str, str, str], float, dict[str, Any]]]:
    try:
        for entry in _passed_rows(path) if path.suffix == ".jsonl" else json.loads(path.read_bytes())["benchmarks"]:
            suite = Path(entry["fullname"].partition("::")[0]).stem
            contender = entry["extra_info"].get("contender", entry["name"])
            statistic = entry["extra_info"].get("statistic", "median")
            yield (suite, entry["group"], contender), entry["stats"][statistic] * 1e6, entry["extra_info"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not JSON that pytest --benchmark-json wrote, nor --record ({error!r})") from error


def _passed_rows(path: Path) -> list[dict[str, Any]]:
    return [row for row in ended_rows(path) if row["outcome"] == "passed"]
