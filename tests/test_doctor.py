import os
import re
import types

import pytest
import torch
import triton

from triton_sparse_rnn import doctor
from triton_sparse_rnn.kernels.cpu import support
from triton_sparse_rnn.kernels.triton import exchange
from triton_sparse_rnn.ops import dispatch


def test_says_what_runs_here_and_why_the_rest_does_not(monkeypatch: pytest.MonkeyPatch):
    reasons = {"triton": "no GPU is there", "cpu": None, "reference": None}
    monkeypatch.setattr(dispatch, "unavailable_reason", reasons.get)
    assert doctor.backend_reasons() == reasons
    lines = [line.split() for line in doctor.diagnosis().splitlines()]
    assert ["triton", "cannot", "run", "here:", "no", "GPU", "is", "there"] in lines
    assert ["reference", "runs", "here"] in lines


def test_what_the_cpu_kernels_are_compiled_for(monkeypatch: pytest.MonkeyPatch):
    for features, expected, picks in (
        ({"avx512f", "avx512vnni", "avx512vbmi"}, "AVX-512 with vpdpbusd", "at full speed, with activations in int8"),
        ({"avx512f", "avx512vnni"}, "AVX-512 with vpdpbusd", "at full speed; not with activations in int8"),
        ({"avx512f"}, "AVX-512", "at full speed; not with activations in int8"),
        ({"avx2", "fma"}, "AVX2", "slower than blocks"),
        (set(), "generic", "slowly"),
    ):
        monkeypatch.setattr("triton_sparse_rnn.kernels.cpu.target.features", lambda found=features: frozenset(found))
        assert doctor.kernel_target() == expected
        assert f"CPU kernels    {expected}" in doctor.diagnosis()
        assert f"picks run      {picks}" in doctor.diagnosis()
    monkeypatch.setattr(support, "vectors", lambda: "none")
    assert doctor.picks_speed() == "in plain torch only"
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda backend: "numba is gone")
    assert doctor.kernel_target() == "none"


def test_what_runs_the_gpu_kernels(monkeypatch: pytest.MonkeyPatch):
    reason = None
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda backend: reason)
    version = re.escape(triton.__version__)
    for interpreted, expected in (
        (True, f"interpreted on the CPU by Triton {version}, as TRITON_INTERPRET=1 asks"),
        (False, f"compiled by Triton {version} for CUDA "),
    ):
        monkeypatch.setattr(exchange, "INTERPRETED", interpreted)
        assert re.match(expected, doctor.gpu_kernels())
        assert re.search(f"GPU kernels +{expected}", doctor.diagnosis())
    reason = "there is none"
    assert doctor.gpu_kernels() == "none"


def test_the_cuda_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.cuda_device() == "none that torch can use"
    found = types.SimpleNamespace(name="Abacus 3000", multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {1: found}.get)
    assert doctor.cuda_device() == "Abacus 3000, 132 SMs, compute capability 9.0"


def test_reference_runs_everywhere():
    assert doctor.backend_reasons()["reference"] is None
    assert set(doctor.backend_reasons()) == set(dispatch.BACKENDS)


def test_versions_name_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package-anywhere"))
    found = doctor.versions()
    assert found["torch"]
    assert found["no-such-package-anywhere"] is None
    assert "no-such-package-anywhere  not installed" in doctor.diagnosis()


def test_a_machine_that_tells_nothing_of_its_processor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_processor_info", dict)
    processor = doctor.describe_processor()
    assert processor["processor"] == doctor.processor_name() != ""
    assert len(processor["vector_instructions"]) == 1


def test_the_processor_as_linux_names_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_processor_info", lambda: {"model name": "Abacus 2000", "flags": "fpu fma avx2"})
    processor = doctor.describe_processor()
    assert processor["processor"] == doctor.processor_name() == "Abacus 2000"
    assert processor["vector_instructions"] == ["avx2", "fma"]


def test_usable_cores_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert doctor.usable_cores() == doctor.describe_processor()["usable_cores"] == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert doctor.usable_cores() == 1
