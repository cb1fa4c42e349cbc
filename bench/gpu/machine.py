"""What belongs beside a time that was taken on a GPU: the device, its limits, the versions."""

from __future__ import annotations

import functools
import shutil
import statistics
import subprocess
from typing import Any

import torch

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
