"""Gate gradients of an LSTM, one step at a time, back through time, with the small ones made zero.

    dh    = grad_y + dh                                    of the rows of the step
    dc    = dc + dh o (1 - tanh(c)^2)
    gates = (dc g i (1 - i), dc c_before f (1 - f), dc i (1 - g^2), dh tanh(c) o (1 - o))
    gates = rule(gates)
    dc    = dc f                                           carried to the step before, as gates W_hh will be for dh

| tensor     | shape       | dtype   |                                                                             |
|------------|-------------|---------|-----------------------------------------------------------------------------|
| steps      | [T]         | int64   | read: PlaceFields of states.py                                              |
| activated  | [rows, 4 H] | float32 | read: i, f, g, o                                                            |
| c, c0      | [N, H]      | float32 | read: the states after the steps, contiguous, and [B, H] before them        |
| grad_y     | [N, H]      | float32 | read                                                                        |
| dh         | [B, H]      | float32 | read: carried, contiguous                                                   |
| dc         | [B, H]      | float32 | read and written: carried, contiguous                                       |
| thresholds | [4] or [1]  | float32 | read: for each gate, or one for groups                                      |
| seed       | [1]         | int64   | read: of random numbers                                                     |
| gates      | [N, 4 H]    | float32 | written, contiguous                                                         |
| zeros      | [4]         | int64   | added to: how many of each gate are 0                                       |

The rule and its random numbers are those of contract.py and random.py in triton_sparse_rnn/gate_gradients. Groups,
blocks of units and rows with their four gates, take a second pass over the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from triton_sparse_rnn.kernels.cpu.gate_gradients.states import (
    INT64_BYTES,
    STEP_BYTES,
    WIDTH,
    PlaceFields,
    cells_of_row,
    load_step,
)
from triton_sparse_rnn.kernels.cpu.gates import tanh
from triton_sparse_rnn.kernels.cpu.intrinsics import call_kernel, close_over, load_tuple, store_tuple
from triton_sparse_rnn.kernels.cpu.vector_code import (
    FLOAT_BYTES,
    INT64,
    Accumulator,
    Index,
    Integers,
    Vector,
    VectorCode,
)

LSTM_GATES = 4


class GateGradientFields(NamedTuple):
    """Sizes and addresses; the distances between rows are in bytes."""

    steps: Any
    units: Any  # H
    activated: Any
    activated_bytes: Any
    c: Any
    c0: Any
    c0_bytes: Any
    grad_y: Any
    grad_y_bytes: Any
    dh: Any
    dc: Any
    thresholds: Any
    seed: Any
    group_rows: Any
    group_units: Any
    gates: Any
    zeros: Any


class GateGradientFormat(NamedTuple):
    """What the kernel is compiled for."""

    selection: str  # "all", "small" or "sample"
    grouped: bool = False


def emit_gate_gradients(builder: Any, format: GateGradientFormat, address: Any, first: Any, end: Any) -> None:
    """Emit the kernel for step number `first`; `end` is the next one."""
    code, one = VectorCode(builder, WIDTH), VectorCode(builder, 1)
    fields = code.fields(GateGradientFields, code.index(address))
    step = load_step(code, fields.steps, code.index(first))
    with code.loop(code.index(0), step.rows) as row:
        random_row = _hash_row(one, fields, step.first + row)
        for part, unit in code.vectors_of(fields.units):
            gates = _step_back(part, fields, step, row, unit)
            for number, gate in enumerate(gates):
                place = _Place(fields, step.first + row, part.index(number), unit)
                if not format.grouped:
                    gate = _select(part, format, fields, place, random_row, gate)
                    part.add_to_int64(gate.count_zeros(), place.zeros)
                part.store(gate, place.gate, part.index(0))
    if format.grouped:
        _select_groups(code, format, fields, step)


class _Place:
    """Where some units of a gate in a row of N are."""

    def __init__(self, fields: GateGradientFields, row: Index, gate: Index, unit: Index):
        self.column = fields.units * gate + unit
        self.gate = fields.gates + (fields.units * row * LSTM_GATES + self.column) * FLOAT_BYTES
        self.zeros = fields.zeros + gate * INT64_BYTES
        self.threshold = fields.thresholds + gate * FLOAT_BYTES


def _step_back(
    code: VectorCode, fields: GateGradientFields, step: PlaceFields, row: Index, unit: Index
) -> tuple[Vector, Vector, Vector, Vector]:
    """Return the gate gradients of some units, and carry dc to the step before."""
    zero, place = code.index(0), unit * FLOAT_BYTES
    activated = fields.activated + (step.gates + row) * fields.activated_bytes + place
    carried = fields.units * row * FLOAT_BYTES + place
    grad_y = fields.grad_y + (step.first + row) * fields.grad_y_bytes + place
    c_after, c_before = (c + place for c in cells_of_row(step, row, fields))
    if code.width == WIDTH:  # the rows of a step are far apart and short: the processor would ask for the next too late
        for gate in range(LSTM_GATES):
            code.prefetch(activated + fields.units * gate * FLOAT_BYTES + fields.activated_bytes)
        code.prefetch(c_before + fields.units * FLOAT_BYTES)
        code.prefetch(grad_y + fields.grad_y_bytes)
    i, f, g, o = (code.load(activated + fields.units * gate * FLOAT_BYTES, zero) for gate in range(LSTM_GATES))
    c = tanh(code.load(c_after, zero))
    dh = code.load(grad_y, zero) + code.load(fields.dh + carried, zero)
    dc = code.load(fields.dc + carried, zero) + dh * o * _one_minus(c * c)
    code.store(dc * f, fields.dc + carried, zero)
    return (
        dc * g * i * _one_minus(i),
        dc * code.load(c_before, zero) * f * _one_minus(f),
        dc * i * _one_minus(g * g),
        dh * c * o * _one_minus(o),
    )


def _one_minus(vector: Vector) -> Vector:
    return vector.code.constant(1.0) - vector


def _select(
    code: VectorCode,
    format: GateGradientFormat,
    fields: GateGradientFields,
    place: _Place,
    random_row: Integers,
    gates: Vector,
) -> Vector:
    """Make small elements zero."""
    if format.selection == "all":
        return gates
    sizes, threshold = abs(gates), code.load_broadcast(place.threshold, code.index(0))
    if format.selection == "small":
        return sizes.where("<", threshold, 0.0, gates)
    random = _uniform(code.spread(random_row), code.broadcast_low_bits(place.column) + code.lane_numbers())
    signed = ((gates.as_integers() & 0x80000000) | threshold.as_integers()).as_floats()
    chosen = (random * threshold).where("<", sizes, signed, code.constant(0.0))
    return sizes.where("<", threshold, chosen, gates)


def _select_groups(code: VectorCode, format: GateGradientFormat, fields: GateGradientFields, step: PlaceFields) -> None:
    """Make the elements of small groups zero, in all of a step."""
    one = VectorCode(code.builder, 1)
    with code.loop(code.index(0), _pieces(step.rows, fields.group_rows)) as row_group:
        first_row = fields.group_rows * row_group
        rows = code.smaller(fields.group_rows, step.rows - first_row)
        first_row = step.first + first_row
        random_row = _hash_row(one, fields, first_row)
        with code.loop(code.index(0), _pieces(fields.units, fields.group_units)) as unit_group:
            first_unit = fields.group_units * unit_group
            units = code.smaller(fields.group_units, fields.units - first_unit)
            squares = {part: Accumulator(part.constant(0.0)) for part in (code, one)}
            for part, place in _places_of_group(code, one, fields, first_row, rows, first_unit, units):
                gates = part.load(place.gate, part.index(0))
                squares[part].add(gates * gates)
            total = one.total(squares[code].read()) + squares[one].read()
            size = (total / one.broadcast_low_bits(units * rows * LSTM_GATES).to_floats()).sqrt()
            random = _uniform(random_row, one.broadcast_low_bits(unit_group))
            factor = _factor_of_group(one, format, fields, size, random)
            for part, place in _places_of_group(code, one, fields, first_row, rows, first_unit, units):
                gates = part.load(place.gate, part.index(0)) * part.spread(factor)
                part.store(gates, place.gate, part.index(0))
                part.add_to_int64(gates.count_zeros(), place.zeros)


def _pieces(total: Index, size: Index) -> Index:
    return (total + size - 1) // size


def _places_of_group(
    code: VectorCode,
    one: VectorCode,
    fields: GateGradientFields,
    first_row: Index,
    rows: Index,
    first_unit: Index,
    units: Index,
) -> Iterator[tuple[VectorCode, _Place]]:
    """Emit the body of the `for` in loops over a group; yields what emits and where its vector is."""
    with code.loop(first_row, first_row + rows) as row, code.loop(code.index(0), code.index(LSTM_GATES)) as gate:
        for part, unit in code.vectors_of(units, one):
            yield part, _Place(fields, row, gate, first_unit + unit)


def _factor_of_group(
    one: VectorCode, format: GateGradientFormat, fields: GateGradientFields, size: Vector, random: Vector
) -> Vector:
    """What the elements of a group of this size are multiplied by."""
    threshold = one.load_broadcast(fields.thresholds, one.index(0))
    small = one.constant(0.0)
    if format.selection == "sample":
        small = (random * threshold).where("<", size, threshold / size, small)
    return size.where("<", threshold, small, one.constant(1.0))


def _hash_row(one: VectorCode, fields: GateGradientFields, row: Index) -> Integers:
    """The part of a random number that belongs to the row, see random.py."""
    seed = one.broadcast_low_bits(one.load_index(fields.seed, one.index(0), INT64))
    return _hash32((seed ^ one.broadcast_low_bits(row)) + one.integers(0x9E3779B9))


def _uniform(row: Integers, column: Integers) -> Vector:
    """A random number in (0, 1) for each lane."""
    return ((_hash32(row + column) >> 9).to_floats() + 0.5) * 2.0**-23


def _hash32(x: Integers) -> Integers:
    x = (x ^ (x >> 16)) * x.code.integers(0x7FEB352D)
    x = (x ^ (x >> 15)) * x.code.integers(0x846CA68B)
    return x ^ (x >> 16)


def make_go_back(fingerprint: str) -> Callable[..., None]:
    """Return the function, for numba to compile; see `layer.make_run_layer`."""

    def go_back(T, steps, step_kernel, step_fields, product_kernel, product_fields, gates, gates_bytes):
        """Go back through all steps, from the last to the first; the product of each is its gates W_hh.

        Args:
            T: steps.
            steps, step_kernel, step_fields: addresses of PlaceFields, of the kernel above and of its fields.
            product_kernel, product_fields: addresses of a kernel of sparse_products.py, by rows, and of its fields, of
                which the first is overwritten.
            gates, gates_bytes: address of the gates, and the distance between their rows.
        """
        close_over(fingerprint)
        for number in range(T - 1, -1, -1):
            call_kernel(step_kernel, step_fields, number, number + 1)
            first, rows = load_tuple(steps + number * STEP_BYTES, 2)
            store_tuple(product_fields, (gates + first * gates_bytes,))
            call_kernel(product_kernel, product_fields, 0, rows)

    return go_back
