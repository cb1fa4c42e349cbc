"""Rows of a suite that is cut, whatever cuts it, and goes on. The suite here measures nothing."""

import json
import sys
from pathlib import Path

import pytest

import bench
from bench.record import FAULTED, LEFT, NOT_WRITTEN, Record, ended_rows
from bench.rows import read_rows

pytest_plugins = "pytester"

CONFTEST = """
from pathlib import Path

import pytest
from bench.record import RecordPlugin


def pytest_addoption(parser):
    parser.addoption("--record", type=Path)


def pytest_configure(config):
    config.pluginmanager.register(RecordPlugin(config.getoption("--record"), Path("faulted").exists))


def pytest_runtest_setup(item):
    if "late" in item.name and not Path("time").exists():
        pytest.skip("begins too late")
"""
SUITE = """
import os
from pathlib import Path

import pytest


@pytest.mark.parametrize("contender", ["nn", "ours"])
@pytest.mark.parametrize("work", ["a", "b", "late"])
def test_it(benchmark, work, contender):
    with open("measured", "a") as file:
        file.write(f"{work}-{contender} ")
    if Path(f"{work}-{contender}").exists():
        exec(Path(f"{work}-{contender}").read_text())
    benchmark.group = work
    benchmark.extra_info.update(contender=contender, T=2)
    benchmark(lambda: None)
"""


@pytest.fixture
def suite(pytester, monkeypatch):
    """Runs the suite, apart if it may end its process; returns its exit status, what was measured, its last line."""
    monkeypatch.setenv("PYTHONPATH", str(Path(bench.__file__).parents[1]))
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_suite=SUITE)
    quick = ["--benchmark-max-time=0.001", "--benchmark-min-rounds=1", "-p", "no:cacheprovider", "-q"]

    def run(*arguments, apart=False):
        Path("measured").unlink(missing_ok=True)
        run_it = pytester.runpytest_subprocess if apart else pytester.runpytest_inprocess
        result = run_it("--record=rows.jsonl", *quick, *arguments)
        measured = Path("measured").read_text().split() if Path("measured").exists() else []
        return result.ret, measured, result.outlines[-1] if result.outlines else ""

    return run


def outcomes() -> dict[str, str]:
    return {line["fullname"].partition("[")[2].rstrip("]"): line["outcome"] for line in ended_rows(Path("rows.jsonl"))}


def test_what_is_left_is_measured_by_the_next_run(suite):
    status, measured, last = suite()
    assert (status, measured) == (LEFT, ["a-nn", "a-ours", "b-nn", "b-ours"])
    assert last == "rows.jsonl, 6 rows: 4 passed, 2 left"
    Path("time").touch()
    assert suite() == (0, ["late-nn", "late-ours"], "rows.jsonl, 6 rows: 6 passed")
    assert suite() == (0, [], "rows.jsonl, 6 rows: 6 passed")
    rows = read_rows([Path("rows.jsonl")])
    assert [(row.suite, row.group, row.contender) for row in rows[:2]] == [
        ("test_suite", "a", "nn"),
        ("test_suite", "a", "ours"),
    ]
    assert rows[0].median_us > 0
    assert rows[0].facts["T"] == 2


def test_a_killed_group_is_measured_again_and_a_row_that_kills_twice_is_left_out(suite):
    Path("time").touch()
    Path("b-ours").write_text("os._exit(9)")
    status, measured, _ = suite(apart=True)
    assert (status, measured) == (9, ["a-nn", "a-ours", "b-nn", "b-ours"])
    assert outcomes() == dict.fromkeys(["a-nn", "a-ours", "b-nn"], "passed")
    status, measured, _ = suite(apart=True)
    assert (status, measured) == (9, ["b-nn", "b-ours"])  # together, as they are compared
    assert suite() == (1, ["late-nn", "late-ours"], "rows.jsonl, 6 rows: 5 passed, 1 failed")
    (lost,) = (line for line in ended_rows(Path("rows.jsonl")) if line["outcome"] == "failed")
    assert lost["reason"] == "the process ended in it, 2 times"
    assert suite()[:2] == (1, [])


def test_failures_and_skips_are_kept_with_their_reasons(suite):
    Path("a-nn").write_text("pytest.skip('torch refuses: no')")
    Path("b-nn").write_text("raise RuntimeError('out of registers\\nand more')")
    Path("time").touch()
    status, _, last = suite()
    assert (status, last) == (1, "rows.jsonl, 6 rows: 4 passed, 1 failed, 1 skipped")
    reasons = [line["reason"] for line in ended_rows(Path("rows.jsonl")) if "reason" in line]
    assert reasons == ["torch refuses: no", "out of registers\nand more"]
    assert suite()[:2] == (1, [])


def test_nothing_is_measured_on_a_device_that_has_faulted(suite):
    Path("time").touch()
    Path("a-ours").write_text("Path('faulted').touch(); raise RuntimeError('an illegal memory access')")
    assert suite()[:2] == (FAULTED, ["a-nn", "a-ours"])
    Path("faulted").unlink()
    status, measured, last = suite()
    assert (status, measured) == (1, ["b-nn", "b-ours", "late-nn", "late-ours"])
    assert last == "rows.jsonl, 6 rows: 5 passed, 1 failed"


def test_rows_that_are_not_measured_are_not_taken_for_measured_ones(suite):
    status, measured, _ = suite("--benchmark-disable")
    assert (status, measured) == (pytest.ExitCode.USAGE_ERROR, ["a-nn"])
    assert ended_rows(Path("rows.jsonl")) == []


def test_an_interrupt_leaves_what_was_measured(suite):
    Path("b-nn").write_text("raise KeyboardInterrupt")
    assert suite(apart=True)[2] == "rows.jsonl, 6 rows: 2 passed, 4 left"
    Path("b-nn").unlink()
    assert suite()[1] == ["b-nn", "b-ours"]


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of a process stands in for the disk")
def test_a_full_disk_ends_the_run_and_keeps_what_is_written(suite, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    line = json.dumps({"fullname": "x" * 800, "outcome": "skipped", "reason": ""}) + "\n"
    Path("rows.jsonl").write_text(line)
    Path("a-nn").write_text("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))")  # of any file
    status, measured, _ = suite(apart=True)
    assert (status, measured) == (NOT_WRITTEN, ["a-nn"])
    assert Path("rows.jsonl").read_text().startswith(line)
    Path("a-nn").unlink()
    Path("time").touch()
    assert suite()[0] == 0
    assert len(ended_rows(Path("rows.jsonl"))) == 7


def test_rows_that_are_not_wanted_leave_no_group_unfinished(suite):
    assert suite("-k", "a-nn or b-") == (0, ["a-nn", "b-nn", "b-ours"], "rows.jsonl, 3 rows: 3 passed")
    assert suite("-k", "a-nn or b-")[:2] == (0, [])


def test_a_damaged_last_line_is_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = json.dumps({"fullname": "a", "outcome": "passed"}) + "\n"
    for damage in ("", '{"fullname": "b", "outc', '{"fullname": "b"}'):
        path.write_text(whole + damage)
        assert [line["fullname"] for line in ended_rows(path)] == ["a"]
        record = Record(path)
        assert path.read_text() == whole
        record.append({"fullname": "c", "outcome": "passed"})
        assert record.outcomes() == {"a": "passed", "c": "passed"}
        assert list(Record(path).outcomes()) == ["a", "c"]


@pytest.mark.parametrize("text", ["[]\n", '{"benchmarks": []}\n', "x\n{}\n"])
def test_a_file_of_another_kind_is_not_written_to(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    for read in (Record, ended_rows, lambda path: read_rows([path])):
        with pytest.raises(ValueError, match="lacks one of fullname, outcome"):
            read(path)
    assert path.read_text() == text
