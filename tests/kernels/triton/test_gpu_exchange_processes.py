"""The exchange with every program in a process of its own, under conduct that would break a careless one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from program_processes import DIED, Conduct, Outcome, ProgramId, run_programs
from torch import Tensor

from triton_sparse_rnn.kernels.triton.exchange import NAN, SENTINEL, look, new_exchange, publish, read_when_ready, wait

UNITS = 4
K = 32
PATIENT = 2**30  # polls: more than there is time for
IMPATIENT = 1000  # polls, a second or so
SENTINEL_NAN = torch.tensor(SENTINEL.value, dtype=torch.int32).view(torch.float32)


@triton.jit
def add_units(
    columns_ptr,  # [D, H, K] int32
    h0_ptr,  # [D, B, H] float32
    exchange_ptr,
    status_ptr,
    spin_limit,
    S,
    B,
    H,
    UNITS: tl.constexpr,
    K: tl.constexpr,
    PACK: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """h[s + 1, j] = (j + sum over k of h[s, columns[j, k]]) mod 1024: of integers, so exact in any order of addition.

    Grid (P, D, B).
    """
    d = tl.program_id(1)
    b = tl.program_id(2)
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    mask = units < H
    columns_ptr += (d * H + units[:, None]) * K + tl.arange(0, K)[None, :]
    columns = tl.load(columns_ptr, mask=mask[:, None], other=H)
    h = tl.load(h0_ptr + (d * B + b) * H + units, mask=mask, other=0.0)
    exchange_ptr += d * (S + 1) * (H + 1) * B + b
    publish(exchange_ptr + units * B, h, mask)
    for _ in range(S):
        words = read_when_ready(exchange_ptr, columns, B * 4, status_ptr, spin_limit, PACK, PORTABLE)
        h = tl.sum(words, axis=1) + units
        h -= 1024 * tl.floor(tl.minimum(h, 2.0**20) / 1024)  # infinity stays
        exchange_ptr += (H + 1) * B
        publish(exchange_ptr + units * B, h, mask)


@triton.jit
def publish_any_nan(ptr, h, mask):
    tl.store(ptr, h.to(tl.int32, bitcast=True), mask=mask)


@triton.jit
def publish_twice(ptr, h, mask):
    publish_any_nan(ptr, h + 1, mask)
    publish_any_nan(ptr, h, mask)


@triton.jit
def read_once(base_ptr, columns, stride_bytes, status_ptr, spin_limit, PACK: tl.constexpr, PORTABLE: tl.constexpr):
    return tl.load(base_ptr + columns * (stride_bytes // 4)).to(tl.float32, bitcast=True)


@triton.jit
def read_for_ever(base_ptr, columns, stride_bytes, status_ptr, spin_limit, PACK: tl.constexpr, PORTABLE: tl.constexpr):
    words = look(base_ptr, columns, stride_bytes, PACK, PORTABLE)
    return wait(words, base_ptr, columns, stride_bytes, status_ptr, 2**30, PACK, PORTABLE)


def all_units(H: int) -> Tensor:
    """Every unit reads every unit."""
    return torch.stack([torch.randperm(H) for _ in range(H)])


def neighbours(H: int) -> Tensor:
    """Unit j reads itself and the two before it, where they are."""
    columns = torch.arange(H)[:, None] - torch.arange(3)
    return torch.where(columns < 0, H, columns)


def as_stored(h: Tensor) -> Tensor:
    return torch.where(h.isnan(), NAN.value, h.view(torch.int32))


class Launch:
    """Of add_units with P programs in each chain, the last of them with one unit less."""

    def __init__(self, P: int = 3, D: int = 1, S: int = 6, B: int = 1, columns: Callable[[int], Tensor] = all_units):
        self.S, self.B, self.H = S, B, P * UNITS - 1
        self.grid = (P, D, B)
        self.columns = torch.full((D, self.H, K), self.H, dtype=torch.int32)  # the rest is padding
        for d in range(D):
            read = columns(self.H)
            self.columns[d, :, : read.shape[1]] = read
        self.h0 = torch.randint(0, 1024, (D, B, self.H)).float()
        self.exchange = new_exchange(D, S, self.H, B, torch.device("cpu"))
        self.status = torch.zeros(1, dtype=torch.int32)

    def run(self, spin_limit: int = PATIENT, **how: Any) -> Outcome:
        arguments = {
            "columns_ptr": self.columns,
            "h0_ptr": self.h0,
            "exchange_ptr": self.exchange,
            "status_ptr": self.status,
            "spin_limit": spin_limit,
            "S": self.S,
            "B": self.B,
            "H": self.H,
            "UNITS": UNITS,
            "K": K,
            "PACK": 1,
            "PORTABLE": True,
        }
        return run_programs(add_units, self.grid, arguments, **how)

    def expected(self) -> Tensor:
        """The exchange as it must be left."""
        h = torch.zeros(self.exchange.shape)
        h[:, 0, : self.H] = self.h0.transpose(1, 2)
        units = torch.arange(self.H)[:, None]
        for d, columns in enumerate(self.columns.long()):
            for s in range(self.S):
                total = h[d, s][columns].sum(1) + units
                h[d, s + 1, : self.H] = total - 1024 * (total.clamp(max=2.0**20) / 1024).floor()
        return as_stored(h)

    def is_right(self) -> bool:
        return torch.equal(self.exchange, self.expected()) and self.status.item() == 0


@pytest.mark.parametrize(("P", "D", "B"), [(2, 1, 3), (3, 2, 1), (6, 1, 1)])
def test_every_word_is_written_once_by_its_owner_and_read_by_all(P: int, D: int, B: int):
    launch = Launch(P, D, B=B)
    outcome = launch.run()
    assert launch.is_right()
    for (p, d, b), writes in zip(itertools.product(range(P), range(D), range(B)), outcome.writes, strict=True):
        owned = torch.zeros_like(writes)
        owned[d, :, p * UNITS : min((p + 1) * UNITS, launch.H), b] = 1
        assert torch.equal(writes, owned)


@pytest.mark.parametrize("p", [0, 2])
def test_the_others_wait_for_a_late_program(p: int):
    launch = Launch()
    launch.run(conduct={(p, 0, 0): Conduct(late_s=0.3)})
    assert launch.is_right()


def delays(P: int, seed: int) -> dict[ProgramId, Conduct]:
    return {(p, 0, 0): Conduct(delay_s=0.003, seed=seed) for p in range(P)}


def test_delays_change_nothing():
    launch = Launch(P=4, S=25)
    launch.run(conduct=delays(4, seed=0))
    assert launch.is_right()


@pytest.mark.slow("processes")
@pytest.mark.parametrize("seed", range(3))
def test_delays_over_many_steps_change_nothing(seed: int):
    launch = Launch(P=6, S=400)
    launch.run(conduct=delays(6, seed), limit_s=300)
    assert launch.is_right()


@pytest.mark.parametrize("columns", [all_units, neighbours])
def test_nan_with_the_bits_of_the_sentinel_is_handed_over(columns: Callable[[int], Tensor]):
    launch = Launch(columns=columns)
    launch.h0[0, 0, 2] = SENTINEL_NAN
    launch.h0[0, 0, 5] = -torch.nan
    launch.run()
    assert launch.is_right()
    assert torch.equal(launch.exchange[0, 0, [2, 5], 0], torch.full((2,), NAN.value))


def test_infinity_is_handed_over():
    launch = Launch(columns=neighbours)
    launch.h0[0, 0, 3] = torch.inf
    launch.run()
    assert launch.is_right()
    assert launch.exchange[0, -1].view(torch.float32).isinf().any()


@pytest.mark.parametrize(
    "slot", [pytest.param(0, marks=pytest.mark.slow("processes")), 2]
)  # the bound takes seconds each time
def test_the_others_end_when_a_program_dies(slot: int):
    """With the bound waited out once, not at each of the steps that follow: that would take longer than the limit."""
    launch = Launch(P=4, S=60, columns=neighbours)
    outcome = launch.run(IMPATIENT, conduct={(1, 0, 0): Conduct(dies_in_slot=slot)}, limit_s=30)
    assert outcome.exit_codes == {(0, 0, 0): 0, (1, 0, 0): DIED, (2, 0, 0): 0, (3, 0, 0): 0}
    assert launch.status.item() == 1

    words, expected = launch.exchange[0, :, :, 0], launch.expected()[0, :, :, 0]
    missing = words == SENTINEL.value
    assert missing.sum(1).tolist() == [0] * slot + [UNITS // 2] + [UNITS] * (60 - slot)
    assert missing[:, UNITS : 2 * UNITS].sum() == missing.sum()

    lost = missing.clone()
    for s in range(60):
        lost[s + 1, : launch.H] |= lost[s][launch.columns[0].long()].any(1)
    h = words.view(torch.float32)
    assert h[lost].isnan().all()
    right = words == expected
    assert right[: slot + 1][~lost[: slot + 1]].all()
    assert right[:, :UNITS].all()  # program 0 needs nobody
    assert (right | h.isnan()).all()  # those that wait after the bound give up what would have come


@pytest.mark.parametrize("conduct", [{(0, 0, 0): Conduct(late_s=0.5)}, delays(3, seed=0)], ids=["late", "delays"])
def test_a_reader_that_does_not_wait_is_seen(conduct: dict[ProgramId, Conduct]):
    launch = Launch()
    launch.run(conduct=conduct, replaced={"read_when_ready": read_once})
    assert not launch.is_right()


def test_an_exchange_that_was_not_filled_is_seen():
    launch = Launch()
    launch.run()
    launch.h0 += 1
    launch.run(conduct={(0, 0, 0): Conduct(late_s=0.5)})
    assert not launch.is_right()


def test_a_second_write_of_a_word_is_seen():
    outcome = Launch().run(replaced={"publish": publish_twice})
    assert outcome.writes.max() == 2


def test_a_nan_that_is_published_as_it_is_makes_others_hang():
    launch = Launch()
    launch.h0[0, 0, 2] = SENTINEL_NAN
    with pytest.raises(TimeoutError, match=r"programs \[\(0, 0, 0\), \(1, 0, 0\), \(2, 0, 0\)\] were still running"):
        launch.run(replaced={"publish": publish_any_nan}, limit_s=2)


def test_a_reader_without_a_bound_hangs_when_another_has_died():
    with pytest.raises(TimeoutError, match=r"programs \[\(2, 0, 0\)\] were still running"):
        Launch(columns=neighbours).run(
            IMPATIENT,
            conduct={(1, 0, 0): Conduct(dies_in_slot=2)},
            replaced={"read_when_ready": read_for_ever},
            limit_s=3,
        )


def test_an_error_in_a_program_is_told_and_ends_the_others():
    with pytest.raises(RuntimeError, match=r"programs \[\(1, 0, 0\)\] raised(.|\n)*sleep length must be non-negative"):
        Launch().run(conduct={(1, 0, 0): Conduct(late_s=-1)})


def test_only_what_the_kernel_uses_can_be_replaced():
    with pytest.raises(RuntimeError, match="has no global 'meet' to replace"):
        Launch().run(replaced={"meet": read_once})
