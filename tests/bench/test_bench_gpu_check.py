"""The script that checks a GPU, with a stand-in for Python; once with Python itself and a GPU that is pretended."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench

PROJECT = Path(bench.__file__).parents[1]
SCRIPT = PROJECT / "bench" / "gpu_check.sh"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
needs_bash = pytest.mark.skipif(shutil.which("bash") is None or shutil.which("timeout") is None, reason="needs bash")
FAKE_PYTHON = """#!/usr/bin/env bash
# Stands in for python3 with a GPU: writes what the real one would, and fails where $FAIL says so, every time or once.
printf '%s\\n' "$*" >>"$CALLS"
for word in "$@"; do
    case $word in --record=*) echo '{}' >>"${word#*=}" ;; esac
    case ${previous-} in --out | --table) echo '{}' >>"$word" ;; esac
    previous=$word
done
case "$*" in
    *gpu.machine*) echo "gpu A GPU, driver 1" ;;
    *gpu.headlines*) echo "the lines that matter" ;;
    *) echo "the end of it" ;;
esac
case "$*" in ${FAIL:-none})
    if [ ! -e "$CALLS.failed" ] || [ -z "${ONCE-}" ]; then
        touch "$CALLS.failed"
        if [ "${STATUS-}" = late ]; then sleep 60; fi
        exit "${STATUS:-7}"
    fi ;;
esac
exit 0
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def check(tmp_path):
    """Runs the script; returns its exit status, what it added to the summary, what it called, and what it printed."""
    python, calls, folder = executable(tmp_path / "python", FAKE_PYTHON), tmp_path / "calls", tmp_path / "out"
    summary = folder / "summary.txt"

    def run(*arguments, **environment):
        before = summary.read_text() if summary.exists() else ""
        calls.write_text("")
        environment = {**os.environ, "PYTHON": str(python), "CALLS": str(calls), **environment}
        command = ["bash", str(SCRIPT), *arguments, str(folder)]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        after = summary.read_text() if summary.exists() else ""
        return result.returncode, after.removeprefix(before), calls.read_text(), result.stdout + result.stderr

    return run


PARTS = {  # of each check, and what each calls
    "--smoke": {
        "a test of each kernel": "test_gpu_exchange",
        "compilation": "gpu.warm smoke",
        "layers": "bench_smoke.py",
    },
    "--core": {
        "compilation": "gpu.warm core",
        "core suite": "bench_core.py",
        "LSTM training": "bench_lstm_training.py",
    },
    "--full": {
        "tests of kernels": "tests/kernels/triton",
        "other tests on a GPU": "tests/ops/test_triton_backend.py",
        "soak": "gpu.soak",
        "other tiles": "gpu.sweep",
        "grid": "bench_grid.py",
    },
}
EACH_PART = [(check, part, call) for check, parts in PARTS.items() for part, call in parts.items()]


@needs_bash
@pytest.mark.parametrize("name", PARTS)
def test_every_part_of_a_check_runs(check, name, tmp_path):
    status, summary, calls, printed = check(name)
    assert status == 0, printed
    assert summary.startswith(f"== {name[2:]}, 2")
    assert "gpu A GPU, driver 1\n" in summary.partition("UTC: ")[2]
    assert [part for part in PARTS[name] if f"{part}: passed after " in summary] == list(PARTS[name])
    assert [call for call in PARTS[name].values() if call not in calls] == []
    assert summary.endswith("the lines that matter\n")
    assert printed.endswith("the lines that matter\n")


@needs_bash
def test_one_folder_serves_all_checks(check, tmp_path):
    for name in PARTS:
        check(name)
    files = {"summary.txt", "log.txt", "rows.jsonl", "table.md", "soak.jsonl", "sweep.jsonl"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files


@needs_bash
def test_the_core_is_what_is_checked_by_default(check):
    assert check()[1].startswith("== core, ")


@needs_bash
@pytest.mark.parametrize(("name", "part", "call"), EACH_PART)
def test_a_check_goes_on_after_a_failure(check, name, part, call):
    status, summary, _, printed = check(name, FAIL=f"*{call}*")
    assert status == 1
    assert [other for other in PARTS[name] if f"{other}: FAILED with status 7 after" in summary] == [part]
    others = [other for other in PARTS[name] if other != part]
    assert [other for other in PARTS[name] if f"{other}: passed after" in summary] == others
    assert printed.endswith("the lines that matter\n")


@needs_bash
def test_a_part_that_has_ended_is_not_run_again_and_one_that_was_stopped_is(check):
    check("--full", FAIL="*gpu.soak*", ONCE="yes")
    status, summary, calls, _ = check("--full")
    assert status == 1
    assert "tests of kernels has passed in an earlier call" in summary
    assert "soak has FAILED in an earlier call" in summary
    assert "tests/kernels/triton" not in calls
    assert "bench_grid.py" in calls  # it knows by its rows what is left


@needs_bash
@pytest.mark.parametrize(("result", "words"), [("75", "some is left for another call"), ("137", "STOPPED")])
def test_what_is_left_is_said_and_the_next_call_goes_on(check, result, words):
    status, summary, _, _ = check("--full", FAIL="*tests/kernels/triton*", STATUS=result, ONCE="yes")
    assert status == 3
    assert f"tests of kernels: {words}" in summary
    assert summary.endswith("something is left: call it again\n")
    status, summary, calls, _ = check("--full")
    assert status == 0
    assert "tests/kernels/triton" in calls
    assert "soak has passed in an earlier call" in summary


@needs_bash
@pytest.mark.parametrize("result", ["76", "134", "139"])
def test_a_suite_goes_on_in_a_new_process_after_a_crash(check, result):
    status, summary, calls, _ = check("--core", FAIL="*bench_core.py*", STATUS=result, ONCE="yes")
    assert status == 1
    assert calls.count("bench_core.py") == 2
    words = "the GPU has faulted" if result == "76" else f"FAILED with status {result}"
    assert f"core suite: {words} after" in summary
    assert "core suite: passed after" in summary


@needs_bash
def test_a_suite_that_crashes_before_its_first_row_is_not_begun_again(check, tmp_path):
    python = (tmp_path / "python").read_text().replace("--record=*)", "--no-record=*)")
    (tmp_path / "python").write_text(python)
    status, summary, calls, _ = check("--core", FAIL="*bench_core.py*", STATUS="139")
    assert status == 1
    assert calls.count("bench_core.py") == 1
    assert "LSTM training: passed after" in summary


@needs_bash
def test_a_check_ends_in_time(check):
    status, summary, calls, _ = check("--core", GPU_CHECK_SECONDS="80")
    assert status == 3
    assert "core suite: left for another call, there is no time" in summary
    assert "bench_core.py" not in calls
    assert "LSTM training: passed" in summary


@needs_bash
@pytest.mark.slow("programs")
def test_a_part_that_takes_too_long_is_stopped(check):
    status, summary, _, _ = check("--core", FAIL="*bench_lstm*", STATUS="late", GPU_CHECK_SECONDS="28")
    assert status == 3
    assert "LSTM training: STOPPED after 1" in summary


@needs_bash
@pytest.mark.parametrize(
    "arguments", [[], [""], ["--full"], ["--smoke", ""], ["--fast", "DIR"], ["a", "b"], ["--core", "--full", "DIR"]]
)
def test_wrong_arguments_are_refused(arguments, tmp_path):
    result = subprocess.run(["bash", str(SCRIPT), *arguments], cwd=tmp_path, capture_output=True, text=True)
    usage = "usage: bash bench/gpu_check.sh [--smoke | --core | --full] DIR\n"
    assert (result.returncode, result.stderr) == (2, usage)
    help_ = subprocess.run(["bash", str(SCRIPT), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (help_.returncode, help_.stdout) == (0, usage)


@needs_bash
def test_a_wrong_time_is_refused(check):
    status, summary, _, printed = check(GPU_CHECK_SECONDS="5m")
    assert (status, summary) == (2, "")
    assert printed.startswith("usage: ")


@needs_bash
def test_what_is_missing_on_the_machine_is_said(check, tmp_path):
    status, summary, calls, printed = check(FAIL="*gpu.machine*")
    assert (status, summary, calls.count("\n")) == (2, "", 1)
    assert printed.splitlines()[0] == "gpu A GPU, driver 1"  # its own words
    assert "cannot check a GPU here, as said above" in printed
    assert not (tmp_path / "out").exists()


@needs_bash
def test_a_folder_that_cannot_be_written_to_is_said(check, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert check()[0] == 2
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.txt").symlink_to("/dev/full")  # as on a disk without space
    status, _, calls, printed = check()
    assert (status, calls.count("\n")) == (2, 1)
    assert f"cannot write to {tmp_path / 'out' / 'log.txt'}" in printed


@needs_bash
def test_a_summary_that_cannot_be_written_is_printed_all_the_same(check, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.txt").symlink_to("/dev/full")
    command = ["bash", str(SCRIPT), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "CALLS": str(tmp_path / "calls")}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    assert "core suite: passed after" in printed


def test_every_kernel_has_a_test_in_the_first_look():
    text = (PROJECT / "bench" / "gpu" / "smoke_tests.txt").read_text()
    for test in (line for line in text.splitlines() if not line.startswith("#")):
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (PROJECT / path).read_text(), test
    sources = "".join(path.read_text() for path in (PROJECT / "kernels" / "triton").rglob("*.py"))
    functions = set(re.findall(r"^@triton\.jit\b.*\ndef (\w+)", sources, flags=re.MULTILINE))
    kernels = functions & set(re.findall(r"\b(\w+)(?:\.run\(|\[.*\]\()", sources))
    assert {"resident_steps", "fill_exchange", "input_gradient"} <= kernels
    assert kernels <= set(re.findall(r"\w+", text))


@needs_bash
@no_gpu
@pytest.mark.slow("programs")
def test_check_says_that_there_is_no_gpu(tmp_path):
    command = ["bash", str(SCRIPT), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "finds no NVIDIA GPU" in result.stderr
    assert not (tmp_path / "out").exists()


@needs_bash
@no_gpu
@pytest.mark.slow("programs")
def test_the_first_look_at_a_pretended_gpu(tmp_path):
    """All of its programs, on small layers; the tests of kernels are only collected, which shows that they exist."""
    pretend = Path(__file__).with_name("pretended_gpu.py")
    python = executable(
        tmp_path / "python",
        f"""#!/usr/bin/env bash
        case "$*" in
            "-c import xdist") exit 1 ;;
            *test_gpu_*) exec {sys.executable} "$@" --collect-only ;;
            *) exec {sys.executable} {pretend} "$@" ;;
        esac
        """,
    )
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHON": str(python), "GPU_CHECK_SECONDS": "3000"}
    command = ["bash", str(SCRIPT), "--smoke", str(out)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1].startswith("24 measured; ")
    assert len([line for line in lines if " µs a step, ours against torch.nn" in line]) == 6
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in rows if row["outcome"] != "begun"] == ["passed"] * 24
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout
    assert (out / "rows.jsonl").read_text().count("\n") == len(rows)
