"""What no persistent kernel can beat: programs that hand over h as the layers do, and compute next to nothing.

Every program publishes UNITS words a step. Each is made of the sum of all words of the step before, so that nobody can
run ahead; it is a whole number below PRIME, so sums are exact, in any order, and the host knows what must come out:

    h[0] = h_in        h[s + 1][u] = (sum of h[s] + 31 u + s) mod PRIME

With delays, some programs sleep before they publish: a soak test of the exchange.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED, new_exchange, publish, read_when_ready

PRIME = 65521
SPIN_LIMIT = 2**24
THREAD_WORDS = 4  # that a thread reads at once
_PRIME = tl.constexpr(PRIME)


@triton.jit
def hand_over_steps(
    exchange_ptr,
    h_in_ptr,
    status_ptr,
    spin_limit,
    S,
    H,
    stride_bytes,
    longest_delay_ns,
    seed,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    DELAYS: tl.constexpr,
    PACK: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """Run S steps; grid (P,).

    Args:
        exchange_ptr: [1, S + 1, H + 1, 1] int32, filled.
        h_in_ptr: [H] float32, whole numbers below PRIME.
        status_ptr, spin_limit: as in exchange.py.
        stride_bytes: 4.
        longest_delay_ns, seed: with DELAYS, of the sleep that one program in 64 takes in a step.
    """
    p = tl.program_id(0)
    units = p * UNITS + tl.arange(0, UNITS)
    mask = units < H
    publish(exchange_ptr + units, tl.load(h_in_ptr + units, mask=mask, other=0.0), mask)
    for s in range(S):
        total = 0
        for chunk in tl.static_range(CHUNKS):
            columns = tl.minimum(chunk * BLOCK + tl.arange(0, BLOCK), H)  # row H holds zeros
            h = read_when_ready(exchange_ptr, columns, stride_bytes, status_ptr, spin_limit, PACK, PORTABLE)
            total += tl.sum(h.to(tl.int32), axis=0)
        h = (total + 31 * units + s) % _PRIME
        if DELAYS and not PORTABLE:
            chance = (tl.randint(seed, p * S + s) & 0xFFFFF).to(tl.int32)
            delay = tl.where((chance & 63) == 0, (chance >> 6) % longest_delay_ns, 0)
            h += sleep(delay + 0 * units) - delay
        exchange_ptr += H + 1
        publish(exchange_ptr + units, h.to(tl.float32), mask)


@triton.jit
def sleep(ns):
    """Return ns after about as many nanoseconds."""
    return tl.inline_asm_elementwise(
        "nanosleep.u32 $1; mov.b32 $0, $1;", "=r,r", [ns], dtype=tl.int32, is_pure=False, pack=1
    )


def hand_over(
    h_in: Tensor, steps: int, programs: int, status: Tensor, *, longest_delay_ns: int = 0, seed: int = 0
) -> Tensor:
    """Return h [H] float32 after `steps` steps of `programs` programs.

    Args:
        h_in: [H] float32.
        status: [1] int32, in memory that the device and the host share; not 0 afterwards if a wait has failed.
    """
    H, device = len(h_in), h_in.device
    exchange = new_exchange(1, steps, H, 1, device)
    block = min(triton.next_power_of_2(H + 1), 4096)
    hand_over_steps.run(
        exchange,
        h_in,
        status,
        SPIN_LIMIT,
        steps,
        H,
        4,
        max(longest_delay_ns, 2),
        seed,
        UNITS=triton.next_power_of_2(triton.cdiv(H, programs)),
        BLOCK=block,
        CHUNKS=triton.cdiv(H, block),
        DELAYS=longest_delay_ns > 0,
        PACK=THREAD_WORDS if block >= 128 * THREAD_WORDS else 1,
        PORTABLE=INTERPRETED,
        grid=(programs, 1, 1),
        warmup=False,
        num_warps=max(4, min(16, block // (32 * THREAD_WORDS))),
        num_stages=1,
        enable_fp_fusion=True,
        launch_cooperative_grid=True,
    )
    return exchange[0, steps, :H, 0].view(torch.float32)


def expected(h_in: Tensor, steps: int) -> Tensor:
    """What `hand_over` must return, on the CPU."""
    h = h_in.cpu().numpy().astype(np.int64)
    units = 31 * np.arange(len(h))
    for s in range(steps):
        h = (h.sum() + units + s) % PRIME
    return torch.from_numpy(h).float()


def start_values(H: int, device: torch.device | str) -> Tensor:
    """Whole numbers [H] to begin with."""
    return torch.randint(PRIME, (H,), generator=torch.Generator().manual_seed(2)).float().to(device)


def new_status(device: torch.device | str) -> Tensor:
    """A status word, 0: pinned on the host, so that both sides see it at once."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=torch.device(device).type == "cuda")
