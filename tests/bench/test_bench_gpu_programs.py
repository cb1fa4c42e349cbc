"""The programs of the GPU benchmarks: soak, sweep, warm-up, and what they ask the machine. Nothing is timed."""

import dataclasses
import json
import sys

import pytest
import torch

from bench.gpu import bench_core, bench_smoke
from bench.gpu import machine as gpu_machine
from bench.gpu import soak as gpu_soak
from bench.gpu import sweep as gpu_sweep
from bench.gpu import warm as gpu_warm
from bench.gpu.contenders import convert
from bench.workloads import Workload
from triton_sparse_rnn.kernels.triton import tiles
from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

TINY = Workload(H=40, sparsity=0.5, T=3, B=2, pattern=Blocks(8, 1), device="cpu")

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, which needs a CPU")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


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


def test_candidates_hold_the_layer():
    work = Workload(H=256, sparsity=0.9, B=2, masks="tied")
    found = list(gpu_sweep.candidates(work))
    assert len(found) == len(set(found)) > 5
    assert {tile.rows for tile in found} == {1, 2}
    assert {tile.tied for tile in found} == {True, False}
    kept = work.layer.get_parameter("weight_hh_l0").view(3, 16, 16, 256).ne(0).all(2).sum(2)
    assert min(tile.columns for tile in found) >= int(kept.max())
    picked = list(gpu_sweep.candidates(Workload(H=256, sparsity=0.9, B=2).pruned_in(Picks())))
    assert len(picked) == len(set(picked)) > 5
    assert all(tile.picked and not tile.tied for tile in picked)
    assert {tile.ahead for tile in picked} == {None, 4}


def test_only_is_undone_after_an_error():
    before = tiles.TABLE
    with gpu_warm.only(()):
        assert tiles.TABLE == ()
    with pytest.raises(KeyError), gpu_warm.only(()):
        raise KeyError
    assert tiles.TABLE is before


@interpreted
def test_a_sweep_goes_on_after_errors_and_stops_in_time(tmp_path, monkeypatch):
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
    lines, left = gpu_sweep.sweep([work], tmp_path / "sweep.jsonl", 100)
    assert left == 0
    written = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert [line.get("error") for line in lines[:3]] == [None, "RuntimeError('out of registers')", None]
    assert [line["chosen"] for line in written] == [True] + [False] * (len(lines) - 1)
    assert written[2]["num_warps"] > 0
    summary = gpu_sweep.summary(lines).splitlines()
    assert summary[0].endswith(f"{len(lines) - 1} tiles timed, 1 failed")
    assert [line.split()[0] for line in summary[1:]] == ["chosen", "100.000", "100.000", "100.000"]
    assert gpu_sweep.sweep([work], tmp_path / "none.jsonl", -1) == ([], len(lines))
    held = (tmp_path / "sweep.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "sweep.jsonl").write_text("".join(held[:-2]) + held[-2][:20])  # cut in the last but one
    again, left = gpu_sweep.sweep([work], tmp_path / "sweep.jsonl", 100)
    assert (len(again), left) == (len(lines), 0)
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == len(held)
    monkeypatch.setattr(gpu_sweep, "has_faulted", lambda: True)
    lines, left = gpu_sweep.sweep([work], tmp_path / "faulted.jsonl", 100)
    assert (len(lines), lines[-1]["error"], left) == (2, "RuntimeError('out of registers')", len(again) - 2)
    (tmp_path / "none.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="lacks one of chosen, layer, streamed"):
        gpu_sweep.sweep([work], tmp_path / "none.jsonl", 100)


@interpreted
def test_a_layer_that_does_not_compile_is_reported():
    assert gpu_warm.run_once(gpu_warm.Job(TINY)) is None
    assert gpu_warm.run_once(gpu_warm.Job(dataclasses.replace(TINY, masks="none"))) == "KeyError('none')"


@interpreted
def test_what_is_compiled_beforehand(tmp_path):
    core = gpu_warm.works_of("core")
    assert set(core) == {*bench_core.CORE, *(work.without_zeros for work in bench_core.CORE)}
    smoke = gpu_warm.works_of("smoke", tmp_path / "none.jsonl")
    assert smoke == bench_smoke.SMOKE
    rows = [f"bench/gpu/bench_smoke.py::bench_smoke[{work}-{c}]" for work in smoke[1:] for c in bench_smoke.CONTENDERS]
    lines = [json.dumps({"fullname": row, "outcome": "passed"}) + "\n" for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    assert gpu_warm.works_of("smoke", tmp_path / "rows.jsonl") == smoke[:1]


@no_gpu
def test_what_is_missing_is_said(monkeypatch, capsys):
    name = "pytest_benchmark"
    monkeypatch.setitem(sys.modules, name, None)
    assert gpu_machine.main() == 2
    assert capsys.readouterr().err.splitlines() == [
        f"bench.gpu.machine: {name} cannot be imported: import of {name} halted; None in sys.modules",
        f"bench.gpu.machine: torch {torch.__version__} finds no NVIDIA GPU",
    ]
    assert not gpu_machine.has_faulted()


def test_a_device_that_raises_has_faulted(monkeypatch):
    def raise_it():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not gpu_machine.has_faulted()
    monkeypatch.setattr(torch.cuda, "synchronize", raise_it)
    assert gpu_machine.has_faulted()


@pytest.mark.parametrize("program", [gpu_soak, gpu_sweep, gpu_warm])
def test_programs_say_that_there_is_no_gpu(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["core"] if program is gpu_warm else ["--out", str(tmp_path / "out")]
    assert program.main(arguments) == 2
    assert f"{program.__name__}: there is no CUDA device that torch can use" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", ["0", "-1", "x"])
def test_soak_refuses_a_wrong_number_of_steps(steps, capsys):
    with pytest.raises(SystemExit):
        gpu_soak.main(["--out", "out", "--steps", steps])
    assert "--steps" in capsys.readouterr().err
