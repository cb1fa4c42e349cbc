"""The script that checks a GPU, with a stand-in for Python, and the grid, which runs part by part. Nothing is timed."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import bench_grid
from bench.gpu import grid as gpu_grid

PROJECT = Path(gpu_grid.__file__).parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
needs_bash = pytest.mark.skipif(shutil.which("bash") is None or shutil.which("timeout") is None, reason="needs bash")
FAKE_PYTHON = """#!/usr/bin/env bash
# Stands in for python3 with a GPU: does nothing, writes what the real one would, and fails where $FAIL says so.
printf '%s\\n' "$*" >>"$CALLS"
for word in "$@"; do
    case $word in --benchmark-json=*) echo '{}' >"${word#*=}" ;; esac
    if [ "${previous-}" = --out ]; then echo '{}' >"$word"; fi
    previous=$word
done
case "$*" in *gpu.grid*) echo '{}' >"$3/grid.json"; echo "H1_float32: done" ;; esac
case "$*" in ${FAIL:-none}) exit "${STATUS:-7}" ;; esac
exit 0
"""


@pytest.fixture
def check(tmp_path):
    python, calls, folder = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    python.write_text(FAKE_PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)

    def run(*arguments, **environment):
        command = ["bash", str(PROJECT / "bench" / "gpu_check.sh"), *arguments, str(folder)]
        environment = {**os.environ, "PYTHON": str(python), "CALLS": str(calls), **environment}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        summary = folder / "summary.txt"
        return result.returncode, summary.read_text() if summary.exists() else "", calls.read_text(), folder

    return run


PARTS = {  # and what each calls
    "tests of kernels": "kernels/triton",
    "compilation": "gpu.warm",
    "core suite": "gpu/bench_core",
    "LSTM training": "lstm_training.py",
    "soak": "gpu.soak",
    "sweep": "gpu.sweep",
}


@needs_bash
def test_check_runs_every_part(check):
    status, summary, calls, folder = check()
    assert status == 0, summary
    assert [part for part in PARTS if f"{part}: passed in" in summary] == list(PARTS)
    assert len(list(folder.iterdir())) <= 8
    wanted = ["tests/kernels/triton", "bench/gpu/bench_core.py", "bench.gpu.soak", "bench.gpu.sweep", "--gpu-goals"]
    wanted += ["bench/gpu/bench_lstm_training.py", "-m bench.gpu.bench_lstm_training"]
    assert [call for call in wanted if call not in calls] == []


@needs_bash
@pytest.mark.parametrize(("part", "call"), PARTS.items())
def test_check_goes_on_after_a_failure(check, part, call):
    status, summary, _, _ = check(FAIL=f"*{call}*")
    assert status == 1
    assert [name for name in PARTS if f"{name}: FAILED with status 7" in summary] == [part]
    assert [name for name in PARTS if f"{name}: passed in" in summary] == [name for name in PARTS if name != part]


@needs_bash
def test_check_ends_in_time(check):
    status, summary, calls, _ = check(GPU_CHECK_SECONDS="100")
    assert status == 1
    assert "core suite: FAILED, no time left for it" in summary
    assert "bench_core.py" not in calls


@needs_bash
@pytest.mark.parametrize("grid_status", [0, 1, 3])
def test_check_of_the_whole_grid(check, grid_status):
    status, summary, calls, folder = check("--full", FAIL="*gpu.grid*", STATUS=str(grid_status))
    assert status == grid_status
    assert "H1_float32: done" in summary
    assert ("call it again" in summary) == (grid_status == 3)
    assert "bench.report" in calls
    assert {path.name for path in folder.iterdir()} == {"grid.json", "grid.log", "grid.md", "summary.txt"}


@needs_bash
@pytest.mark.parametrize("arguments", [[], [""], ["--full"], ["--fast", "DIR"], ["a", "b"]])
def test_check_refuses_wrong_arguments(arguments, tmp_path):
    command = ["bash", str(PROJECT / "bench" / "gpu_check.sh"), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "usage: bash bench/gpu_check.sh [--full] DIR\n")


@needs_bash
@no_gpu
@pytest.mark.slow("programs")
def test_check_says_that_there_is_no_gpu(tmp_path):
    command = ["bash", str(PROJECT / "bench" / "gpu_check.sh"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no torch that finds an NVIDIA GPU" in result.stderr


def benchmark_json(rows: int) -> str:
    row = {"fullname": "bench/gpu/bench_grid.py::bench_grid[x]", "stats": {"median": 1e-3, "data": [1e-3] * 9}}
    return json.dumps({"benchmarks": [row] * rows})


def test_a_grid_is_resumed_where_it_ended(tmp_path):
    parts, asked = list(bench_grid.PARTS), []

    def run_part(part, result, seconds):
        asked.append(part)
        if len(asked) == 3:
            return 124  # stopped: it is to be run again
        result.write_text(benchmark_json(2))
        return 0

    folder = tmp_path / "new"
    assert gpu_grid.run_grid(folder, 1e6, run_part) == 1
    assert asked == parts
    assert gpu_grid.run_grid(folder, 1e6, run_part) == 0
    assert asked == [*parts, parts[2]]
    grid = json.loads((folder / "grid.json").read_text())
    assert sorted(grid["parts"]) == sorted(parts)
    assert len(grid["benchmarks"]) == 2 * len(parts)
    assert "data" not in grid["benchmarks"][0]["stats"]
    assert [path.name for path in folder.iterdir()] == ["grid.json"]


def test_a_grid_leaves_what_has_no_time(tmp_path):
    def run_part(part, result, seconds):
        raise AssertionError("there is no time")

    assert gpu_grid.run_grid(tmp_path, gpu_grid.FIRST_GUESS_SECONDS - 1, run_part) == 3


@pytest.mark.parametrize(("status", "text"), [(1, benchmark_json(1)), (0, benchmark_json(0)), (1, ""), (2, None)])
def test_a_part_with_failures_makes_the_grid_fail(tmp_path, status, text):
    def run_part(part, result, seconds):
        if text is not None:
            result.write_text(text)
        return status

    assert gpu_grid.run_grid(tmp_path, 1e6, run_part) == 1
    grid = gpu_grid.read_grid(tmp_path / "grid.json")
    assert len(grid["parts"]) == (len(bench_grid.PARTS) if text == benchmark_json(1) else 0)


@pytest.mark.parametrize("text", ["", "[]", '{"benchmarks": []}'])
def test_a_grid_file_of_another_kind_is_not_overwritten(tmp_path, text):
    (tmp_path / "grid.json").write_text(text)
    with pytest.raises(ValueError, match="move it away"):
        gpu_grid.run_grid(tmp_path, 1e6, lambda *arguments: 0)
    assert (tmp_path / "grid.json").read_text() == text
