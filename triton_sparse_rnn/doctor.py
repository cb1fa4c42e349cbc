"""What is installed here, and which backends run: the answer of `triton-sparse-rnn doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from triton_sparse_rnn.tables import align

PACKAGES = ("triton-sparse-rnn", "torch", "numpy", "numba", "llvmlite", "triton", "safetensors", "rich", "matplotlib")
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512vbmi", "avx512_bf16", "amx_int8", "asimd", "sve")


def versions() -> dict[str, str | None]:
    """Return the version of Python and of each package of ours, None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def processor_name() -> str:
    """Return the model name that Linux gives, or what Python knows."""
    return _processor_info().get("model name") or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_processor() -> dict[str, Any]:
    """Return the processor's name, the cores this process may use, and the vector instructions it has."""
    import torch

    info = _processor_info()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "usable_cores": usable_cores(),
        "vector_instructions": [name for name in FEATURES if name in flags]
        or [torch.backends.cpu.get_cpu_capability()],
    }


def backend_reasons() -> dict[str, str | None]:
    """Return for each backend why it cannot run on this machine, None where it can."""
    from triton_sparse_rnn.ops.dispatch import BACKENDS, unavailable_reason

    return {backend: unavailable_reason(backend) for backend in BACKENDS}


def kernel_target() -> str:
    """Return for which vectors backend "cpu" compiles its kernels here."""
    from triton_sparse_rnn.ops.dispatch import unavailable_reason

    if unavailable_reason("cpu") is not None:
        return "none"
    from triton_sparse_rnn.kernels.cpu import target

    return target.vector_path() + (" with vpdpbusd" if target.multiplies_bytes() else "")


def picks_speed() -> str:
    """Return how fast weights stored in picks run on backend "cpu" here."""
    from triton_sparse_rnn.kernels.cpu import support

    return {
        "AVX-512 with bytes": "at full speed, with activations in int8 too",
        "AVX-512": "at full speed; not with activations in int8, which need VBMI and VNNI",
        "AVX2": "slower than blocks, for lack of AVX-512; pattern=Picks(bank=8) is the best of them here",
        "generic": "slowly, for lack of AVX-512; prune in blocks for this machine",
        "none": "in plain torch only",
    }[support.vectors()]


def cuda_device() -> str:
    """Return the name, the size and the compute capability of the current CUDA device."""
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = f"compute capability {device.major}.{device.minor}"
    return f"{device.name}, {device.multi_processor_count} SMs, {capability}"


def gpu_kernels() -> str:
    """Return what runs the kernels of backend "triton" here."""
    from triton_sparse_rnn.ops.dispatch import unavailable_reason

    if unavailable_reason("triton") is not None:
        return "none"
    import torch
    import triton

    from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED

    if INTERPRETED:
        return f"interpreted on the CPU by Triton {triton.__version__}, as TRITON_INTERPRET=1 asks"
    return f"compiled by Triton {triton.__version__} for CUDA {torch.version.cuda}"


def diagnosis() -> str:
    """Return it all as text."""
    import torch

    processor = describe_processor()
    lines = ["Versions"]
    lines += align([[f"  {name}", version or "not installed"] for name, version in versions().items()])
    lines += ["", "Machine"]
    lines += align(
        [
            ["  system", processor["system"]],
            ["  processor", f"{processor['processor']}, {processor['usable_cores']} usable cores"],
            ["  instructions", " ".join(processor["vector_instructions"])],
            ["  CPU kernels", kernel_target()],
            ["  picks run", picks_speed()],
            ["  torch threads", str(torch.get_num_threads())],
            ["  CUDA device", cuda_device()],
            ["  GPU kernels", gpu_kernels()],
        ]
    )
    lines += ["", "Backends, the fastest first"]
    lines += align(
        [
            [f"  {backend}", "runs here" if reason is None else f"cannot run here: {reason}"]
            for backend, reason in backend_reasons().items()
        ]
    )
    return "\n".join(lines)


def _processor_info() -> dict[str, str]:
    """Read the first processor of /proc/cpuinfo, {} where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
