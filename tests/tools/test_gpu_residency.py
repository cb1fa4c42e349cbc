"""The rules for machine code hold for the kernel, and each is broken by a kernel that was broken on purpose."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_compilation import without_interpreter

from tools import residency
from tools.machine_code import ARCHITECTURES, MachineCode
from tools.sass import Access
from triton_sparse_rnn.kernels.triton.tiles import SLOTS, TABLE, ResidentTile, choose_residency

ALONE = ResidentTile(slots=4, itemsize=4, groups=2, rows=1, num_warps=4, ko=1, tiles=2, registers=64)
POLL = Access("LDG.E.STRONG.GPU", frozenset({"exchange_ptr"}), in_time_loop=True)
WEAK_POLL = Access("LDG.E", frozenset({"exchange_ptr"}), in_time_loop=True)
PUBLISH = Access("STG.E.STRONG.SYS", frozenset({"exchange_ptr"}), in_time_loop=True)


def found_by_program(which: str, folder: Path) -> dict[str, list[str]]:
    """Problems by kernel; see broken_kernels.py."""
    command = [sys.executable, Path(__file__).with_name("broken_kernels.py"), which]
    result = subprocess.run(command, cwd=folder, env=without_interpreter(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_kernel_breaks_no_rule_and_weak_stores_do(tmp_path):
    found = found_by_program("some", tmp_path)
    assert found.pop("right, sm_90") == []
    assert found == {"weak stores": ["weak accesses to the exchange or the status: 2 STG.E"]}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of all kernels, which takes the compiler a while."""
    return found_by_program("all", tmp_path_factory.mktemp("broken"))


@pytest.mark.slow("compiler")
@pytest.mark.parametrize("kind", ["", ", picks"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernel_breaks_no_rule_on_any_target(found, arch, kind):
    assert found[f"right, sm_{arch}{kind}"] == []


@pytest.mark.slow("compiler")
@pytest.mark.parametrize("kind", ["", ", picks"])
@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        ("weak loads", "weak accesses to the exchange or the status: {words} LDG.E"),
        ("pipelined loads", "copies asynchronously: {words} LDGSTS.E"),
        ("weights in the loop", "loads weights or columns inside the time loop: "),
        ("nothing published", "nothing writes the exchange inside the time loop"),
        ("too large a tile", "spills "),
        ("too few registers said", "spills "),
    ],
)
def test_a_kernel_broken_on_purpose_is_found_out(found, kernel, problem, kind):
    problem = problem.format(words=12 if kind else 4)
    assert any(problem in text for text in found[kernel + kind]), found[kernel + kind]


def machine_code(*accesses: Access, shared_bytes: int = 0) -> MachineCode:
    return MachineCode(90, 4, 64, 0, shared_bytes, ("EXIT",), (), accesses)


def test_a_program_alone_reads_the_exchange_behind_its_barrier():
    assert residency.problems(machine_code(WEAK_POLL, PUBLISH), ALONE) == []
    stale = Access("LDG.E.CONSTANT", frozenset({"exchange_ptr"}), in_time_loop=True)
    (problem,) = residency.problems(machine_code(stale, PUBLISH), ALONE)
    assert problem == "reads the exchange through a cache that is not kept up to date: 1 LDG.E.CONSTANT"


@pytest.mark.parametrize(
    ("accesses", "words", "reloads"),
    [
        ([("LDG.E.128", {"weights_ptr"})], 1, "1 LDG.E.128"),
        ([("LDG.E", {"columns_ptr"})], 1, "1 LDG.E"),
        ([("LDG.E", {"exchange_ptr", "columns_ptr"})], 1, None),  # there is no other read of the exchange
        ([("LDG.E", {"exchange_ptr", "columns_ptr"})], None, "1 LDG.E"),
        ([("LDG.E", {"exchange_ptr", "columns_ptr"})] * 2, 1, "2 LDG.E"),
        ([("LDG.E", {"exchange_ptr"}), ("LDG.E", {"exchange_ptr", "weights_ptr"})], 1, "1 LDG.E"),
        ([("LDG.E.128", {"exchange_ptr", "weights_ptr"})], 1, "1 LDG.E.128"),
        ([("LDG.E.64", {"sums_ptr"})], 1, None),
    ],
)
def test_what_is_taken_for_a_load_of_weights(accesses, words, reloads):
    found = [Access(opcode, frozenset(arguments), in_time_loop=True) for opcode, arguments in accesses]
    problems = residency.problems(machine_code(*found, PUBLISH), ALONE, words)
    told = [problem for problem in problems if "loads weights or columns" in problem]
    assert told == ([f"loads weights or columns inside the time loop: {reloads}"] if reloads else [])


def test_shared_memory_bounds_the_programs():
    (problem,) = residency.problems(machine_code(POLL, PUBLISH, shared_bytes=64 * 1024), ALONE)
    assert problem == "8 programs take 532480 bytes of shared memory, more than a multiprocessor has"


def test_an_address_from_nowhere_is_a_problem():
    unknown = Access("STG.E", frozenset(), in_time_loop=True)
    (problem,) = residency.problems(machine_code(POLL, PUBLISH, unknown), ALONE)
    assert problem == "addresses that come from no argument: 1 STG.E"


def test_more_registers_than_the_row_says_are_a_problem():
    (problem,) = residency.problems(machine_code(POLL, PUBLISH), dataclasses.replace(ALONE, registers=40))
    assert problem == "takes 64 registers a thread, but the row of the table says 40"


def test_an_unrolled_loop_has_several_steps():
    assert residency.steps_in_loop(machine_code(POLL, PUBLISH), ALONE) == 1
    assert residency.steps_in_loop(machine_code(POLL, PUBLISH, POLL, PUBLISH), ALONE) == 2
    wide = dataclasses.replace(ALONE, groups=16)  # two words a thread
    assert residency.steps_in_loop(machine_code(POLL, PUBLISH, PUBLISH), wide) == 1


def test_every_row_of_the_table_is_examined():
    table = list(residency.cases([90, 100]))
    assert {case.tile for case in table} == set(TABLE)
    assert all(SLOTS[case.mode] == case.tile.slots for case in table)
    assert {case.mode for case in table} == set(SLOTS) - {"RNN_RELU"}
    assert {case.arch for case in table} == {90, 100}
    assert {case.dtype for case in table if case.tile.itemsize == 2} == {"float16", "bfloat16"}


def test_a_row_that_does_not_compile_is_a_problem(monkeypatch):
    def compile_tile(case, **constants):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(residency, "compile_tile", compile_tile)
    case = next(residency.cases())
    assert residency.examine(case) == residency.Finding(
        case, None, ("it does not compile: RuntimeError: out of resources",)
    )


@pytest.mark.parametrize("picked", [False, True])
@pytest.mark.parametrize("mode", ["GRU", "LSTM", "RNN_TANH"])
@pytest.mark.parametrize("itemsize", [4, 2])
def test_the_largest_layer_fits_and_the_next_does_not(mode, itemsize, picked):
    H = residency.largest_hidden_size(mode, itemsize, 0.9, balanced=True, picked=picked)
    assert choose_residency(mode, H, -(-H // 10) + picked, itemsize, picked=picked)
    assert choose_residency(mode, H + 16, -(-(H + 16) // 10) + picked, itemsize, picked=picked) is None
    assert residency.largest_hidden_size(mode, itemsize, 0.9, balanced=False, picked=picked) <= H


def test_tables(monkeypatch, capsys):
    case = next(residency.cases([90]))
    code = machine_code(POLL, PUBLISH)
    broken = residency.Finding(case, None, ("does not compile",))
    monkeypatch.setattr(residency, "uncompilable", lambda: None)
    monkeypatch.setattr(residency, "findings", lambda table: [residency.Finding(case, code, ()), broken])
    assert residency.main(["--arch", "90", "--markdown"]) == 1
    out, err = capsys.readouterr()
    assert "| tile | cell | weights | target | registers | spilled | shared | " in out
    assert f"| {case.cells()[0]} | {case.mode} | float32 | sm_90 | 64 | 0 | 0 | 0 | 0 | 0 |" in out
    assert "largest H, balanced mask" in out
    assert err == f"PROBLEM: {case.cells()[0]}, {case.mode}, float32, sm_90: does not compile\n"


def test_it_says_why_nothing_can_be_compiled(monkeypatch, capsys):
    monkeypatch.setattr(residency, "uncompilable", lambda: "no compiler")
    assert residency.main([]) == 2
    assert capsys.readouterr().err == "kernels cannot be compiled here: no compiler\n"


@pytest.mark.slow("compiler")
def test_the_table_of_one_target():
    """Of the cells with most state; the whole table takes the compiler a quarter of an hour (CONTRIBUTING.md)."""
    command = [sys.executable, "-m", "tools.residency", "--arch", "90", "--cells", "LSTM", "RNN_TANH"]
    result = subprocess.run(command, env=without_interpreter(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) > len(list(residency.cases([90], ["LSTM", "RNN_TANH"])))
