"""The lines that matter of a GPU check. Numbers here are made up."""

import json

import pytest

from bench.gpu.headlines import headlines, main, training

MACHINE = {"gpu": "A GPU", "sms": 132, "copy_bandwidth": 4e12, "driver": "1", "cuda": "2", "cudnn": 3}
VERSIONS = {"torch": "4", "triton": "5", "python": "6"}


def row(suite, layer, contender, us_per_step=1.0, **facts):
    sizes = {"cell": "GRU", "T": 100, "B": 1, "H": 1024, "sparsity": 0.9, "dtype": "float32", "masks": "random"}
    own = {
        "contender": contender,
        "device_us": us_per_step * 100,
        "max_error": 1e-7,
        "tile": "a tile",
        "compile_s": 2.5,
    }
    return {
        "fullname": f"bench/gpu/{suite}.py::{suite}[{layer}-{contender}]",
        "outcome": "passed",
        "name": suite,
        "group": layer,
        "stats": {"median": us_per_step * 1e-4},
        "extra_info": sizes | own | {"block_size": [16, 1]} | MACHINE | VERSIONS | facts,
    }


def ended(suite, layer, contender, outcome, reason):
    return {"fullname": f"{suite}.py::{suite}[{layer}-{contender}]", "outcome": outcome, "reason": reason}


def trained(group: str, contender: str, device_us: float) -> dict:
    facts = {"contender": contender, "device_us": device_us, "zeros": 0.5}
    return {
        "fullname": f"bench_lstm_training.py::x[{group}-{contender}]",
        "outcome": "passed",
        "group": group,
        "extra_info": facts,
    }


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return path

    return write


def test_a_layer_of_the_first_look_has_a_line(write):
    contenders = {"nn.GRU": 12, "nn.GRU, CUDA graph": 10, "PersistentGRU": 3, "PersistentGRU, CUDA graph": 2.5}
    lines = [row("bench_smoke", "GRU H=1024", name, us) for name, us in contenders.items()]
    assert headlines(write(*lines, *lines[:1])) == [
        "GRU H=1024: eager 3.00 against 12.00 (4.00x), CUDA graph 2.50 against 10.00 (4.00x) µs a step, ours against "
        "torch.nn",
        "4 measured; compiling their kernels took 10 s, which is in none of these times",
    ]
    assert headlines(write(*lines[:2]))[0].startswith("GRU H=1024: eager not measured against 12.00, CUDA graph not ")


def test_layers_of_the_core_suite_are_held_against_the_goals(write):
    lines = [row("bench_core", "GRU H=1024", name, us) for name, us in {"nn.GRU": 12, "PersistentGRU": 0.9}.items()]
    found = headlines(write(*lines))
    assert found[0] == "pass  GRU H=1024 B=1 90% zeros <= 1 µs a step: 0.9 in float32"
    assert sum(line.startswith("not measured") for line in found) == 2


def test_failures_and_skips_are_told(write):
    lines = [ended("bench_core", "GRU", "torch BSR", "skipped", "torch refuses: no")]
    lines += [ended("bench_core", "GRU", "ours", "failed", "Error(1) exceeds Error(0)\nassert False")]
    lines += [{"fullname": "bench_core.py::bench_core[GRU-floor]", "outcome": "begun"}] * 2
    assert headlines(write(*lines)) == [
        "FAILED  GRU-ours: Error(1) exceeds Error(0)",
        "FAILED  GRU-floor: the process ended in it, 2 times",
        "1 skipped, which their contenders cannot run",
        "0 measured; compiling their kernels took 0 s, which is in none of these times",
    ]


def test_training_is_compared_with_cudnn_in_the_same_group(write):
    lines = [trained("a", "nn.LSTM", 3000.0), trained("a", "80% zeros", 2000.0), trained("b", "no zeros", 12.5)]
    assert training(lines) == ["a: nn.LSTM 3,000 µs; 80% zeros (50%) 1.50x", "b: nn.LSTM nan µs; no zeros (50%) nanx"]
    assert headlines(write(*({**line, "stats": {"median": 1.0}, "name": "x"} for line in lines)))[:2] == training(lines)
    assert training([]) == []


def test_the_program_prints_them_and_writes_a_table(write, tmp_path, capsys):
    path = write(row("bench_smoke", "GRU H=1024", "PersistentGRU"))
    assert main([str(path), "--table", str(tmp_path / "table.md")]) == 0
    assert "\n1 measured; " in capsys.readouterr().out
    assert (tmp_path / "table.md").read_text().startswith("| layer | ours |")
    path.write_text("{}\n")
    assert main([str(path)]) == 2
    assert "bench.gpu.headlines: " in capsys.readouterr().err
    assert main([str(tmp_path / "none.jsonl")]) == 2
