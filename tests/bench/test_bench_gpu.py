"""What of the GPU benchmarks can be tested without a GPU. Numbers here are made up, and nothing is timed."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.budgets import assert_within_budget, budget
from bench.gpu import bench_core, bench_grid
from bench.gpu import contenders as gpu_contenders
from bench.gpu import floor as gpu_floor
from bench.gpu import grid as gpu_grid
from bench.gpu import soak as gpu_soak
from bench.gpu import sweep as gpu_sweep
from bench.gpu import warm as gpu_warm
from bench.gpu.contenders import CuDNN, Floor, Ours, TorchBSR, bytes_moved, contenders_of, convert, floor_programs
from bench.workloads import MASKS, Workload
from triton_sparse_rnn.kernels.triton import tiles
from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.sparse.patterns import Blocks

PROJECT = Path(gpu_grid.__file__).parents[2]
TINY = Workload(H=40, sparsity=0.5, T=3, B=2, pattern=Blocks(8, 1), device="cpu")

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, which needs a CPU")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


# Workloads and budgets


@pytest.mark.parametrize("masks", MASKS)
def test_masks(masks):
    work = Workload(cell="LSTM", H=64, sparsity=0.75, masks=masks)
    kept = work.layer.get_parameter("weight_hh_l0").view(4, 4, 16, 64).ne(0)
    assert (kept.any(2) == kept.all(2)).all()  # whole blocks
    counts = kept.all(2).sum(2)  # of blocks, by gate and unit group
    assert counts.float().mean() == pytest.approx(16, abs=4)
    assert (counts.unique().tolist() == [16]) == (masks == "balanced")
    assert bool((kept == kept[:1]).all()) == (masks == "tied")
    assert (masks in str(work)) == (masks != "random")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_workload_is_narrow_throughout(dtype):
    work = dataclasses.replace(TINY, dtype=dtype)
    assert {work.x.dtype, *(parameter.dtype for parameter in work.layer.parameters())} == {dtype}
    assert str(work) == f"{TINY}, {str(dtype).removeprefix('torch.')}"
    assert TINY.layer.get_parameter("weight_hh_l0").dtype == torch.float32
    y = work.layer(work.x)[0]
    precision = f"{work.dtype_name} layer"
    assert 1e-5 < assert_within_budget(y, work, precision).largest < 1e-2
    with pytest.raises(AssertionError, match="nothing to time"):
        assert_within_budget(y + 0.1, work, precision)


def test_the_budget_of_tf32_lies_between_those_of_float32_and_bfloat16():
    allowed = [budget(TINY, precision).largest for precision in ("float32", "tf32", "bfloat16")]
    assert allowed == sorted(allowed)
    assert 1e-5 < allowed[1] < 1e-2


def test_the_budget_of_a_shorter_workload_serves_a_longer_one():
    work = dataclasses.replace(TINY, T=40)
    assert_within_budget(work.layer(work.x)[0], work, "float32", like=TINY)


# Suites


def test_core_suite_has_the_goals_and_at_most_forty_layers():
    works = bench_core.CORE
    assert len(works) == len(set(map(str, works))) <= 40
    assert all(work.device == "cuda" for work in works)
    wanted = {(H, sparsity, dtype) for H in (1024, 2560) for sparsity in (0.9,) for dtype in ("float32", "bfloat16")}
    assert wanted <= {(work.H, work.sparsity, work.dtype_name) for work in works[:6] if work.B == 1}
    assert {"GRU", "LSTM", "RNN"} == {work.layer_name for work in works}
    assert {work.masks for work in works} == set(MASKS)


def test_grid_is_whole():
    works = [work for part in bench_grid.PARTS.values() for work in part]
    assert len(works) == len(set(map(str, works))) == 7 * 4 * 3 * 2
    assert {work.H for work in works} == {128, 256, 512, 1024, 2048, 2560, 4096}
    assert {work.B for work in works} == {1, 4, 16, 64}
    assert {work.sparsity for work in works} == {0.8, 0.9, 0.95}
    assert {work.dtype_name for work in works} == {"float32", "bfloat16"}
    for part, rows in bench_grid.PARTS.items():
        assert [name for name in bench_grid.PARTS if f"{part}-" in f"{name}-"] == [part]
        assert {f"H{work.H}_{work.dtype_name}" for work in rows} == {part}


def test_every_row_holds_all_contenders():
    plain = ["nn", "nn, CUDA graph", "ours", "ours, CUDA graph", "ours, CUDA graph, 0 % zeros", "floor"]
    assert list(map(str, contenders_of(TINY))) == plain
    narrow = list(map(str, contenders_of(dataclasses.replace(TINY, dtype=torch.bfloat16))))
    assert [name for name in narrow if name not in plain] == ["nn, float16, CUDA graph"]
    square = list(map(str, contenders_of(dataclasses.replace(TINY, pattern=Blocks(16, 16)))))
    assert [name for name in square if name not in plain] == ["torch BSR per step", "torch BSR per step, CUDA graph"]


def test_names_and_precisions():
    half = dataclasses.replace(TINY, cell="LSTM", dtype=torch.bfloat16)
    assert CuDNN(graph=True).name(TINY) == "nn.GRU, CUDA graph"
    assert Ours(zeros=False).name(half) == "PersistentLSTM, 0 % zeros"
    assert [c.precision(TINY) for c in (CuDNN(), TorchBSR(), Ours())] == ["tf32", "tf32", "float32"]
    assert {c.precision(half) for c in (CuDNN(), TorchBSR(), Ours())} == {"bfloat16 layer"}


@no_gpu
@pytest.mark.slow("programs")
def test_gpu_suites_are_skipped_without_one():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", "bench/gpu/bench_core.py"]
    command += ["-m", "gpu", "-k", "floor"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=own)
    assert result.returncode == 0, result.stdout
    assert "needs an NVIDIA GPU" in result.stdout
    assert " passed" not in result.stdout


def test_gpu_suites_have_their_marker():
    assert all(suite.pytestmark.name == "gpu" for suite in (bench_core, bench_grid))


# Contenders, as far as a CPU takes them


@interpreted
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(
    "work",
    [
        TINY,
        dataclasses.replace(TINY, T=1, dtype=torch.bfloat16),
        dataclasses.replace(TINY, T=1, cell="LSTM", dtype=torch.float16),
        dataclasses.replace(TINY, cell="RNN_TANH", masks="tied"),
    ],
    ids=str,
)
def test_ours_is_right(work, zeros):
    expected, run, facts = Ours(zeros=zeros).prepare(work)
    assert expected is work if zeros else expected == work.without_zeros
    contender = Ours(zeros=zeros)
    with torch.inference_mode():
        y = run()
        assert contender.error(y, expected) < 0.01
        with pytest.raises(AssertionError, match="nothing to time"):
            contender.error(y.roll(1, dims=2), expected)
    assert isinstance(facts["tile"], str)
    assert facts["on_chip"] in (True, False)


@pytest.mark.parametrize("B", [1, 17])
def test_bsr_is_right(B, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    work = Workload(H=64, sparsity=0.5, T=3, B=B, pattern=Blocks(16, 16))
    expected, run, _ = TorchBSR().prepare(work)
    assert TorchBSR().error(run(), expected) < 0.02


def test_bsr_is_skipped_where_torch_refuses_it(monkeypatch):
    def refuse(*arguments):
        raise NotImplementedError("not here")

    monkeypatch.setattr(torch, "addmm", refuse)
    with pytest.raises(pytest.skip.Exception, match="not here"):
        TorchBSR().prepare(Workload(H=64, sparsity=0.5, T=3, pattern=Blocks(16, 16)))


class Clock:
    """Stands in for a device's clock, which ticks once for each event."""

    now = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Clock.now += 1
        self.time = Clock.now

    def elapsed_time(self, end):
        return (end.time - self.time) * 0.5  # ms


class Benchmark:
    """Stands in for the fixture of pytest-benchmark."""

    def __init__(self):
        self.extra_info, self.group, self.calls = {}, None, 0

    def __call__(self, run):
        self.calls += 1
        return run()


@interpreted
@pytest.mark.parametrize("contender", [CuDNN(), Ours(graph=True), TorchBSR(graph=True)], ids=str)
def test_a_row_holds_its_facts(contender, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(gpu_contenders, "replayed", lambda run: run)
    monkeypatch.setattr(gpu_contenders, "EVENT_SECONDS", 0)
    monkeypatch.setattr(gpu_contenders, "usable_cores", lambda: threads + 1)
    benchmark, work = Benchmark(), dataclasses.replace(TINY, H=48, T=2, B=1, pattern=Blocks(16, 16))
    gpu_contenders.measure(benchmark, work, contender)
    info = json.loads(json.dumps(benchmark.extra_info))
    assert (benchmark.calls, benchmark.group) == (1, str(work))
    assert (info["contender"], info["precision"]) == (contender.name(work), contender.precision(work))
    assert (info["H"], info["dtype"], info["device"], info["device_us"]) == (48, "float32", "cpu", 500)
    assert 0 < info["max_error"] < 1e-3
    assert ("tile" in info) == isinstance(contender, Ours)
    assert torch.get_num_threads() == threads


@interpreted
def test_what_a_kernel_does_not_write_is_seen(monkeypatch):
    y = TINY.layer(TINY.x)[0]
    monkeypatch.setattr(Ours, "prepare", lambda self, work: (work, lambda: y, {}))  # the result is there already
    with pytest.raises(AssertionError, match="not finite"):
        gpu_contenders.measure(Benchmark(), TINY, Ours())


@pytest.mark.parametrize(("H", "programs"), [(16, 1), (17, 2), (1024, 64), (2112, 132), (2113, 67), (4096, 128)])
def test_floor_programs_fit_side_by_side(H, programs):
    assert floor_programs(H, 132) == programs


def test_bytes_are_the_fewest():
    work = Workload(H=64, sparsity=0.5, T=3, B=2, masks="balanced", dtype=torch.bfloat16)
    assert bytes_moved(work) == 2 * (2 * 3 * 64 * 64 // 2 + 2 * 3 * 64 + 2 * 3 * 2 * 64)


@interpreted
@pytest.mark.parametrize("H", [5, 16, 100, 700])
@pytest.mark.parametrize("steps", [1, 4])
def test_exchange_hands_over_every_word(H, steps):
    h, status = gpu_floor.start_values(H, "cpu"), gpu_floor.new_status("cpu")
    end = gpu_floor.hand_over(h, steps, 1, status)
    assert torch.equal(end, gpu_floor.expected(h, steps))
    assert status.item() == 0
    assert not torch.equal(end, h)
    changed = h.index_fill(0, torch.tensor(H - 1), 1.0)
    assert not torch.equal(gpu_floor.expected(changed, steps), end)


def test_a_floor_with_a_lost_word_is_not_timed():
    work = dataclasses.replace(TINY, T=2)
    right = gpu_floor.expected(gpu_floor.start_values(work.H, "cpu"), 2)
    assert Floor().error(right, work) == 0
    with pytest.raises(AssertionError, match="words were lost"):
        Floor().error(right + torch.eye(1, work.H)[0], work)


# Soak


@interpreted
def test_soak_of_the_exchange():
    result = gpu_soak.soak_exchange(20, 5, "cpu", 1, longest_delay_ns=100)
    assert result == {"H": 20, "programs": 1, "identical": True, "right": True, "passed": True}


@interpreted
def test_a_soak_sees_one_wrong_bit(monkeypatch):
    loads = []
    assert gpu_soak.soak_layer(dataclasses.replace(TINY, B=1), 7, loads.append)["passed"]
    assert len(loads) == 2 * 3
    assert len(set(loads)) == 6

    class Wrong:
        calls = 0

        def __call__(self, x, state):
            self.calls += 1
            y, state = fast(x, state)
            if self.calls == 5:
                y.view(-1)[7] = y.view(-1)[7].nextafter(torch.tensor(1.0))
            return y, state

    fast, facts = convert(dataclasses.replace(TINY, B=1))
    monkeypatch.setattr(gpu_soak, "convert", lambda work: (Wrong(), facts))
    assert not gpu_soak.soak_layer(dataclasses.replace(TINY, B=1), 7, loads.append)["passed"]


# Sweep and warm-up


def test_candidates_hold_the_layer():
    work = Workload(H=256, sparsity=0.9, B=2, masks="tied")
    found = list(gpu_sweep.candidates(work))
    assert len(found) == len(set(found)) > 5
    assert {tile.rows for tile in found} == {1, 2}
    assert {tile.tied for tile in found} == {True, False}
    kept = work.layer.get_parameter("weight_hh_l0").view(3, 16, 16, 256).ne(0).all(2).sum(2)
    assert min(tile.columns for tile in found) >= int(kept.max())


def test_only_is_undone_after_an_error():
    before = tiles.TABLE
    with gpu_warm.only(()):
        assert tiles.TABLE == ()
    with pytest.raises(KeyError), gpu_warm.only(()):
        raise KeyError
    assert tiles.TABLE is before


@interpreted
def test_a_sweep_goes_on_after_errors_and_stops_in_time(tmp_path, monkeypatch, capsys):
    class Here:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    def try_tile(job):
        if job.table == ():
            raise RuntimeError("out of registers")
        return {"tile": "a tile", "device_us": 2000.0 if job.table is None else 1000.0}

    monkeypatch.setattr(gpu_sweep, "workers", lambda jobs: Here())
    monkeypatch.setattr(gpu_sweep, "warm", lambda jobs, pool: [None] * len(jobs))
    monkeypatch.setattr(gpu_sweep, "try_tile", try_tile)
    work = Workload(H=256, sparsity=0.9, T=10)
    lines = gpu_sweep.sweep([work], tmp_path / "sweep.jsonl", 100)
    written = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert [line.get("error") for line in lines[:3]] == [None, "RuntimeError('out of registers')", None]
    assert [line["chosen"] for line in written] == [True] + [False] * (len(lines) - 1)
    assert written[2]["num_warps"] > 0
    summary = gpu_sweep.summary(lines).splitlines()
    assert summary[0].endswith(f"{len(lines) - 1} tiles timed, 1 failed")
    assert [line.split()[0] for line in summary[1:]] == ["chosen", "100.000", "100.000", "100.000"]
    assert gpu_sweep.sweep([work], tmp_path / "none.jsonl", -1) == []
    assert "no time left" in capsys.readouterr().out


@interpreted
def test_a_layer_that_does_not_compile_is_reported():
    assert gpu_warm.run_once(gpu_warm.Job(TINY)) is None
    assert gpu_warm.run_once(gpu_warm.Job(dataclasses.replace(TINY, masks="none"))) == "KeyError('none')"


@pytest.mark.parametrize("program", [gpu_grid, gpu_soak, gpu_sweep, gpu_warm])
def test_programs_say_that_there_is_no_gpu(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = {gpu_grid: [[str(tmp_path)]], gpu_warm: []}.get(program, [["--out", str(tmp_path / "out")]])
    assert program.main(*arguments) == 2
    assert f"{program.__name__}: there is no CUDA device that torch can use" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", ["0", "-1", "x"])
def test_soak_refuses_a_wrong_number_of_steps(steps, capsys):
    with pytest.raises(SystemExit):
        gpu_soak.main(["--out", "out", "--steps", steps])
    assert "--steps" in capsys.readouterr().err
