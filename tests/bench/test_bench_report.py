"""Numbers here are made up."""

import json

import pytest

from bench.cpu.break_even import Point, break_even, table
from bench.report import main, tables
from bench.rows import read_rows


def entry(suite, group, contender, median_us, **facts):
    return {
        "fullname": f"bench/{suite}.py::bench_it[{group}-{contender}]",
        "name": "bench_it",
        "group": group,
        "stats": {"median": median_us * 1e-6},
        "extra_info": {"contender": contender, "cell": "GRU", "H": 4, "T": 10, "B": 1, "precision": "float32", **facts},
    }


@pytest.fixture
def write(tmp_path):
    def write(name, entries):
        path = tmp_path / name
        path.write_text(json.dumps({"benchmarks": entries}), encoding="utf-8")
        return path

    return write


def test_each_cell_has_its_own_baseline(write):
    path = write(
        "run.json",
        [
            entry("bench_a", "G", "nn.GRU", 100),
            entry("bench_a", "G", "PersistentGRU", 20),
            entry("bench_a", "L", "nn.LSTM", 60),
            entry("bench_a", "L", "PersistentLSTM", 20),
            entry("bench_a", "R", "alone", 7),
        ],
    )
    assert [(row.contender, row.ratios) for row in read_rows([path])] == [
        ("nn.GRU", [pytest.approx(1)]),
        ("PersistentGRU", [pytest.approx(5)]),
        ("nn.LSTM", [pytest.approx(1)]),
        ("PersistentLSTM", [pytest.approx(3)]),
        ("alone", []),
    ]


def test_equal_groups_of_two_suites_are_kept_apart(write):
    entries = [
        entry(suite, "G", contender, median_us)
        for suite, times in (("bench_a", (100, 20)), ("bench_b", (30, 10)))
        for contender, median_us in zip(("nn.GRU", "ours"), times, strict=True)
    ]
    rows = read_rows([write("run.json", entries)])
    assert [(row.suite, row.ratios[0]) for row in rows if row.contender == "ours"] == [
        ("bench_a", pytest.approx(5)),
        ("bench_b", pytest.approx(3)),
    ]


def test_several_files_give_the_median_of_ratios_and_their_range(write):
    paths = [
        write(
            f"{i}.json", [entry("bench_a", "G", "nn.GRU", dense), entry("bench_a", "G", "ours", ours, max_error=2e-7)]
        )
        for i, (dense, ours) in enumerate([(100, 50), (300, 30), (80, 20)])
    ]
    assert tables(read_rows(paths)).splitlines() == [
        "## bench_a",
        "",
        "| workload | contender | µs a call | µs a step | ratio | smallest to largest | largest error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| G | nn.GRU | 100.0 | 10.00 | 1.00 | 1.00 to 1.00 |  |",
        "|  | ours | 30.0 | 3.00 | 4.00 | 2.00 to 10.00 | 2.0e-07 |",
    ]


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ((20, 15, 5), "30 % (peer)"),
        ((20, 10, 5), "20 % (peer)"),
        ((9, 12, 8), "30 % (peer)"),  # the last crossing counts
        ((9, 8, 7), "0 % (peer), the lowest measured"),
        ((20, 15, 11), "above 40 % (peer)"),
    ],
)
def test_break_even_lies_on_the_line_between_two_points(ours, expected):
    points = [Point(sparsity, time, 10, "peer") for sparsity, time in zip((0.0, 0.2, 0.4), ours, strict=True)]
    assert break_even(points) == expected


def test_break_even_table_takes_the_baseline_and_the_best_float32_peer(write):
    suite = "bench_break_even"
    entries = []
    for sparsity, ours in ((0.8, 8), (0.0, 40), (0.4, 24)):  # a line: 40 - 40 s
        facts = {"sparsity": sparsity}
        entries += [
            entry(suite, str(sparsity), "nn.GRU", 30, **facts),
            entry(suite, str(sparsity), "slow peer", 20, **facts),
            entry(suite, str(sparsity), "fast peer", 12, **facts),
            entry(suite, str(sparsity), "peer in int8", 1, **facts | {"precision": "int8"}),
            entry(suite, str(sparsity), "PersistentGRU", ours, **facts),
            entry(suite, str(sparsity), "PersistentGRU, picks", ours + 10, **facts),
        ]
    other_suite = entry("bench_forward", "0.0", "PersistentGRU", 1, sparsity=0.0)
    rows = read_rows([write("run.json", [*entries, other_suite])])
    assert table(rows).splitlines()[2:] == [
        "| GRU | 4 | PersistentGRU | 25 % (nn.GRU) | 70 % (fast peer) |",
        "| GRU | 4 | PersistentGRU, picks | 50 % (nn.GRU) | above 80 % (fast peer) |",
    ]


def test_main_prints_and_draws(write, tmp_path, capsys):
    path = write(
        "run.json",
        [
            entry(suite, f"H={H}", contender, median_us, H=H, sparsity=0.9)
            for suite in ("bench_forward", "bench_peers")
            for H in (256, 512)
            for contender, median_us in (("nn.GRU", 90), ("PersistentGRU", 10))
        ],
    )
    plots = tmp_path / "ratios.png", tmp_path / "peers.png"
    assert main([str(path), "--plot", str(plots[0]), "--plot-peers", str(plots[1])]) == 0
    assert "PersistentGRU | 10.0 | 1.00 | 9.00" in capsys.readouterr().out
    assert all(plot.stat().st_size > 1000 for plot in plots)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"benchmarks": [{"group": "G"}]}'])
def test_a_file_of_another_kind_is_refused(tmp_path, capsys, text):
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    assert main([str(path)]) == 2
    assert "is not JSON that pytest --benchmark-json wrote" in capsys.readouterr().err
