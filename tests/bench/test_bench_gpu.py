"""What of the GPU benchmarks can be tested without a GPU. Numbers here are made up, and nothing is timed."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.budgets import assert_within_budget, budget
from bench.gpu import bench_core, bench_grid, bench_smoke
from bench.gpu import contenders as gpu_contenders
from bench.gpu import floor as gpu_floor
from bench.gpu import machine as gpu_machine
from bench.gpu.compiling import compile_seconds
from bench.gpu.contenders import CuDNN, Floor, Ours, TorchBSR, bytes_moved, contenders_of, floor_programs
from bench.record import LEFT
from bench.workloads import MASKS, Workload
from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

PROJECT = Path(gpu_machine.__file__).parents[2]
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
    picked = [work for work in works if work.pattern == Picks()]
    assert {(work.H, work.dtype_name) for work in picked[:4]} == {
        (H, dtype) for H, sparsity, dtype in wanted if sparsity == 0.9
    }


def test_first_look_has_blocks_and_picks():
    works = bench_smoke.SMOKE
    assert [(work.H, work.pattern) for work in works] == [
        (H, pattern) for pattern in (Blocks(16, 1), Picks()) for H in (1024, 512, 2560)
    ]
    assert {(work.cell, work.dtype_name, work.B, work.sparsity) for work in works} == {("GRU", "float32", 1, 0.9)}
    assert list(map(str, bench_smoke.CONTENDERS)) == ["nn", "nn, CUDA graph", "ours", "ours, CUDA graph"]


def test_grid_is_whole():
    works = bench_grid.GRID
    assert len(works) == len(set(map(str, works))) == 7 * 4 * 3 * 2
    assert {work.H for work in works} == {128, 256, 512, 1024, 2048, 2560, 4096}
    assert {work.B for work in works} == {1, 4, 16, 64}
    assert {work.sparsity for work in works} == {0.8, 0.9, 0.95}
    assert {work.dtype_name for work in works} == {"float32", "bfloat16"}


def test_every_row_holds_all_contenders():
    plain = ["nn", "nn, CUDA graph", "ours", "ours, CUDA graph", "ours, CUDA graph, 0 % zeros", "floor"]
    assert list(map(str, contenders_of(TINY))) == plain
    narrow = list(map(str, contenders_of(dataclasses.replace(TINY, dtype=torch.bfloat16))))
    assert [name for name in narrow if name not in plain] == ["nn, float16, CUDA graph"]
    square = list(map(str, contenders_of(dataclasses.replace(TINY, pattern=Blocks(16, 16)))))
    assert [name for name in square if name not in plain] == ["torch BSR per step", "torch BSR per step, CUDA graph"]
    assert list(map(str, contenders_of(TINY.pruned_in(Picks(1, 32))))) == plain


def test_names_and_precisions():
    half = dataclasses.replace(TINY, cell="LSTM", dtype=torch.bfloat16)
    assert CuDNN(graph=True).name(TINY) == "nn.GRU, CUDA graph"
    assert Ours(zeros=False).name(half) == "PersistentLSTM, 0 % zeros"
    assert [c.precision(TINY) for c in (CuDNN(), TorchBSR(), Ours())] == ["tf32", "tf32", "float32"]
    assert {c.precision(half) for c in (CuDNN(), TorchBSR(), Ours())} == {"bfloat16 layer"}


@no_gpu
@pytest.mark.slow("programs")
def test_gpu_suites_are_skipped_without_one_and_can_be_recorded(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", "bench/gpu/bench_core.py"]
    command += ["-m", "gpu", "-k", "floor", f"--record={tmp_path / 'rows.jsonl'}"]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == LEFT, result.stdout
    assert "needs an NVIDIA GPU" in result.stdout
    assert " passed" not in result.stdout
    rows = len(bench_core.CORE)
    assert result.stdout.endswith(f"rows.jsonl, {rows} rows: {rows} left\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (4, "")
    assert "ERROR: --record: " in result.stderr


def test_gpu_suites_have_their_marker():
    assert all(suite.pytestmark.name == "gpu" for suite in (bench_smoke, bench_core, bench_grid))


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
    assert info["compile_s"] == 0  # nothing is where Triton interprets
    assert 0 < info["max_error"] < 1e-3
    assert ("tile" in info) == isinstance(contender, Ours)
    assert torch.get_num_threads() == threads


def test_compiling_is_timed_apart(monkeypatch):
    from triton import knobs

    def compile_it(us: int, *, cache_hit: bool) -> None:
        times = dataclasses.make_dataclass("Times", ["total"])(us)
        listener: Any = knobs.compilation.listener
        listener(src=None, metadata={}, metadata_group={}, times=times, cache_hit=cache_hit)

    before = knobs.compilation.listener
    with compile_seconds() as seconds:
        for us, cache_hit in ((2_500_000, False), (9, True), (500_000, False)):
            compile_it(us, cache_hit=cache_hit)
    assert seconds == [2.5, 0.5]
    assert knobs.compilation.listener is before


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
