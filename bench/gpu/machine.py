"""What belongs beside a time that was taken on a GPU: the device, its limits, the versions.

`python -m bench.gpu.machine` prints it, and says what is missing here to test and to measure.
"""

from __future__ import annotations

import functools
import importlib
import shutil
import statistics
import subprocess
import sys
from typing import Any

import torch

NEEDED = ("triton", "numba", "pytest", "pytest_benchmark")  # besides torch
COPY_BYTES = 2**31  # far more than a cache holds
COPIES = 20


@functools.cache
def gpu_facts() -> dict[str, Any]:
    """Return facts of the current CUDA device that JSON takes."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    import triton

    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "copy_bandwidth": copy_bandwidth(),
    }


@functools.cache
def driver_version() -> str | None:
    """As nvidia-smi tells it; None where that is missing or fails."""
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.partition("\n")[0].strip() or None


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second that a large copy on the device reads and writes, the median of several copies."""
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(COPIES + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * COPY_BYTES / statistics.median(times[3:])


def has_faulted() -> bool:
    """Whether an earlier kernel has broken the device for this process, as one does that writes outside its memory."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # of which type is torch's own affair
        return True
    return False


def missing() -> list[str]:
    """Return what this machine lacks, a line for each."""
    lines = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken installation may raise anything
            lines.append(f"{name} cannot be imported: {error}")
    if not torch.cuda.is_available():
        lines.append(f"torch {torch.__version__} finds no NVIDIA GPU")
    return lines


def main() -> int:
    """Print all there is to know; 2 if something is missing."""
    if lines := missing():
        print("\n".join(f"bench.gpu.machine: {line}" for line in lines), file=sys.stderr)
        return 2
    from triton_sparse_rnn.doctor import diagnosis

    print(diagnosis())
    facts = gpu_facts()
    print(", ".join(f"{name} {facts[name]}" for name in ("gpu", "driver", "cuda", "cudnn", "triton", "copy_bandwidth")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
