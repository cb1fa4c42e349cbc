"""The table and the goals of the GPU benchmarks. Numbers here are made up."""

import json

import pytest

from bench.gpu.report import goals, layers_of, table
from bench.report import main as report
from bench.rows import read_rows

MACHINE = {"gpu": "A GPU", "sms": 132, "copy_bandwidth": 4e12, "driver": "1", "cuda": "2", "cudnn": 3}
VERSIONS = {"torch": "4", "triton": "5", "python": "6"}


def entry(contender, us_per_step, *, suite="bench_core", H=1024, sparsity=0.9, B=1, dtype="float32", **facts):
    T = 1000
    extra = {"contender": contender, "cell": "GRU", "T": T, "B": B, "H": H, "sparsity": sparsity, "dtype": dtype}
    extra |= {
        "block_size": [16, 1],
        "masks": "random",
        "max_error": 1e-7,
        "device_us": us_per_step * T,
        "tile": "a tile",
    }
    return {
        "fullname": f"bench/{suite}.py::bench_core[x]",
        "name": "bench_core",
        "group": f"GRU H={H} B={B} {sparsity:.0%} {dtype}",
        "stats": {"median": us_per_step * T * 1e-6},
        "extra_info": extra | MACHINE | VERSIONS | facts,
    }


@pytest.fixture
def rows_of(tmp_path):
    def read(entries):
        path = tmp_path / "core.json"
        path.write_text(json.dumps({"benchmarks": entries}), encoding="utf-8")
        return read_rows([path])

    return read


def layer_entries(nn, ours, **facts):
    return [
        entry("nn.GRU", 2 * nn, **facts),
        entry("nn.GRU, CUDA graph", nn, **facts),
        entry("PersistentGRU", 2 * ours, **facts),
        entry("PersistentGRU, CUDA graph", ours, **facts),
        entry("PersistentGRU, CUDA graph, 0 % zeros", ours / 2, **facts),
        entry("floor: exchange", 0.5, bytes_us=100.0, projection_us=200.0, **facts),
    ]


def test_gpu_table_has_a_line_for_each_layer(rows_of):
    rows = rows_of([*layer_entries(10, 2), entry("nn.GRU", 3, suite="bench_forward")])
    heading, _, line, *_, machine = table(rows).splitlines()
    cells = dict(
        zip((cell.strip() for cell in heading.split("|")), (cell.strip() for cell in line.split("|")), strict=True)
    )
    assert cells.pop("") == ""
    assert cells == {
        "layer": "GRU H=1024 B=1 90% float32",
        "ours": "4.000",
        "ours, graph": "2.000",
        "0 % zeros, graph": "1.000",
        "nn": "20.000",
        "nn, graph": "10.000",
        "nn in float16, graph": "",
        "torch BSR": "",
        "floor: exchange": "0.500",
        "floor: bytes": "0.100",
        "W_ih x": "0.200",
        "ratio": "5.00",
        "ratio, graph": "5.00",
        "largest error": "1.0e-07",
        "kernels": "a tile",
    }
    assert machine == "A GPU: 132 SMs, copies at 4.00 TB/s; driver 1, cuda 2, cudnn 3, torch 4, triton 5, python 6."


def test_goals_without_measurements(rows_of):
    lines = goals(rows_of([])).splitlines()
    assert len(lines) == 5
    assert all(line.startswith("not measured  ") for line in lines)


def test_goals_take_the_fastest_way_of_each_side(rows_of):
    entries = layer_entries(9.9, 1.0) + layer_entries(10, 1.5, H=2560, dtype="bfloat16")
    entries += layer_entries(10, 1.6, H=2560, sparsity=0.95)
    entries += [entry("nn.GRU, float16, CUDA graph", 6, H=2560, sparsity=0.95)]
    assert goals(rows_of(entries)).splitlines() == [
        "pass  GRU H=1024 B=1 90% zeros <= 1 µs a step: 1 in float32",
        "pass  GRU H=2560 B=1 90% zeros <= 1.5 µs a step: 1.5 in bfloat16",
        "FAIL  GRU H=2560 B=1 95% zeros >= 6.8 times torch.nn: 3.75 in float32",
        "FAIL  GRU H=1024 B=1 90% zeros >= 10 times torch.nn: 9.9 in float32",
        "pass  never slower than torch.nn for H > 192 and B <= 16: 3 of 3 layers",
    ]


def test_losing_layers_are_told_and_those_without_a_right_result_too(rows_of):
    entries = layer_entries(1, 2, H=256, B=16) + layer_entries(1, 4, H=128) + layer_entries(3, 1, H=512)
    entries += [entry("nn.GRU", 5, H=2048)]
    assert goals(rows_of(entries)).splitlines()[4:] == [
        "FAIL  never slower than torch.nn for H > 192 and B <= 16: 1 of 2 layers",
        "slower  0.50 times as fast as torch.nn: GRU H=256 B=16 90% float32",
        "slower  0.25 times as fast as torch.nn: GRU H=128 B=1 90% float32",
        "not measured  ours beside torch.nn: GRU H=2048 B=1 90% float32",
    ]


def test_equal_layers_of_two_suites_are_kept_apart(rows_of):
    rows = rows_of([*layer_entries(10, 2), entry("nn.GRU", 3, suite="bench_grid")])
    assert [len(layer.rows) for layer in layers_of(rows)] == [6, 1]


def test_report_prints_what_is_asked_for(rows_of, tmp_path, capsys):
    rows_of(layer_entries(10, 2))
    path = str(tmp_path / "core.json")
    for option, expected in ((["--gpu"], "| ours, graph |"), (["--gpu-goals"], "FAIL  GRU"), ([], "## bench_core")):
        assert report([path, *option]) == 0
        assert expected in capsys.readouterr().out
    with pytest.raises(SystemExit):
        report([path, "--gpu", "--gpu-goals"])
