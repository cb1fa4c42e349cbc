"""The program that compares patterns: what it counts, checks and prints. Its times are made up or not looked at."""

import json

import pytest
import torch

from bench.cpu import patterns
from bench.cpu.patterns import Measured, Stored
from triton_sparse_rnn.kernels.cpu import support
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

H = 64
ONE, OTHER = Stored(Blocks(16, 1)), Stored(Picks(16, 64, 4), "int8")
RECURRENCE = {"GRU H=64, 16x1, float32": (2.0, 100), "GRU H=64, picks 16x4 of 64, int8": (3.0, 75)}
VECTORS = {
    "16x1, float32": (2.0, 100),
    "16x1, float32, projection": (1.0, 100),
    "picks 16x4 of 64, int8": (1.0, 100),
    "picks 16x4 of 64, int8, projection": (3.0, 100),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(patterns, "STEPS", {H: 22})
    monkeypatch.setattr(patterns, "LAYERS", [("GRU", H)])
    monkeypatch.setattr(patterns, "TURNS", 2)
    monkeypatch.setattr(patterns, "PAIRS", [(ONE, OTHER)])
    monkeypatch.setattr(patterns, "VECTORS", [ONE, OTHER])


def test_recurrence_is_measured_by_what_is_stored():
    measured = patterns.measure_recurrence([("GRU", H)])
    assert list(measured) == list(RECURRENCE)
    units = 4 * (64 - round(0.9 * 64)), 64 - round(0.9 * 64)  # of a gate: blocks as many in each of its unit groups
    assert [m.vectors for m in measured.values()] == [3 * units[0], 3 * 4 * units[1]]
    assert all(m.us > 0 for m in measured.values())


def test_vectors_have_a_projection_and_torch_is_timed_only_as_this_processor(monkeypatch):
    monkeypatch.delenv("NUMBA_CPU_NAME", raising=False)
    measured = patterns.measure_vectors(H)
    assert set(measured) == {*VECTORS, patterns.DENSE}
    assert measured[patterns.DENSE].vectors == 3 * H * H // 16
    monkeypatch.setenv("NUMBA_CPU_NAME", "haswell")
    assert set(patterns.measure_vectors(H)) == set(VECTORS)


@pytest.mark.parametrize("part", ["recurrence", "whole_layer"])
def test_a_wrong_result_is_not_timed(monkeypatch, part):
    monkeypatch.setattr(patterns, part, lambda work, *weights, **options: lambda: torch.zeros(work.T, 1, H))
    with pytest.raises(AssertionError, match="nothing to time"):
        patterns.measure_vectors(H)


@pytest.mark.parametrize(
    ("part", "numbers", "rows"),
    [
        ("recurrence", RECURRENCE, ["| GRU H=64 | 16x1, float32 | picks 16x4 of 64, int8 | 2.00 | 3.00 | 2.00 |"]),
        (
            "vectors",
            VECTORS,
            [
                "| 16x1, float32 | 1.00 | 1.00 to 1.00 | 1.00 |",
                "| picks 16x4 of 64, int8 | 0.50 | 0.50 to 0.50 | 3.00 |",
            ],
        ),
    ],
)
def test_tables_have_medians_of_the_processes(monkeypatch, capsys, part, numbers, rows):
    environments = []

    def alone(part, environment):
        environments.append(environment)
        return "these vectors", {name: Measured(*values) for name, values in numbers.items()}

    monkeypatch.setattr(patterns, "measure_alone", alone)
    patterns.main([part, "--processes", "3"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "## these vectors"
    assert [line[: len(row)] for line, row in zip(printed[4:], rows, strict=False)] == rows
    processors = patterns.environments() if part == "vectors" else [{}]
    assert environments == [environment for environment in processors for _ in range(3)]
    assert environments[0] == {}


def test_a_process_says_what_it_compiled_for(monkeypatch):
    monkeypatch.setitem(patterns.MEASURES, "recurrence", lambda: {"a": Measured(1.5, 2)})
    threads = torch.get_num_threads()
    found = json.loads(patterns.measure_here("recurrence"))
    torch.set_num_threads(threads)
    assert found == {"compiled for": support.vectors(), "measured": {"a": [1.5, 2]}}
