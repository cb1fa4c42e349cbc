r"""Recurrent and linear layers in plain torch: every cell, dtype and device. All other backends are checked against it.

    RNN   h = act(p + W_hh h + b_hh)                                        with p = W_ih x + b_ih
    GRU   r = s(p_r + W_hr h + b_hr)   z = s(p_z + W_hz h + b_hz)
          n = tanh(p_n + r (W_hn h + b_hn))   h = n + z (h - n)
    LSTM  i, f, o = s(p + W_hh h + b_hh)   g = tanh(...)   c = f c + i g   h = W_hr (o tanh(c))

State, sums and gates are float32 (float64 for float64 inputs) whatever the dtype of inputs and weights.

With activation_dtype torch.int8 every product W v is one of integers. Weights are stored as W[j, i] = w[j] Q[j, i] with
an int8 Q and a scale w for each row. The input v, a row of x, of h or of o tanh(c), is quantised when it comes, in the
precision of the state:

    s = max |v| / 127       q[i] = v[i] (1 / s), rounded to an integer, the even one of two that are as near
    (W v)[j] = (s w[j]) sum over i of Q[j, i] q[i]                          where the sum is exact

    s < 1.2e-38, the least normal float32 (a row of zeros, for one): q = 0.
    NaN or infinity in v: s = NaN, so all of W v is NaN; a pruned block confines it no longer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from triton_sparse_rnn.ops.layer_weights import LayerWeights, RunLayer, StoredLayer
from triton_sparse_rnn.ops.stored_linear import RunLinear, StoredLinear
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix

Linear = Callable[[Tensor], Tensor]  # [n, columns] -> [n, rows]
MakeLinear = Callable[["BlockMatrix | Tensor", "Tensor | None", torch.dtype], Linear]
CHUNK_BYTES = 2**26  # of inputs and products that block_linear holds for every stored block at a time


def availability() -> str | None:
    """Return None: it runs everywhere."""
    return None


def unsupported_reason(layer: StoredLayer) -> str | None:
    """Return None: it runs every layer."""
    return None


def prepare_layer(layer: StoredLayer, num_threads: int) -> RunLayer:
    """Return `recurrent_layer` of these weights; torch takes the threads of torch.set_num_threads."""

    def run_layer(x: Tensor, states: list[Tensor], batch_sizes: Tensor | None) -> list[Tensor]:
        mode, directions, *_, activation_dtype = layer
        return recurrent_layer(x, states, directions, batch_sizes, mode, activation_dtype=activation_dtype)

    return run_layer


def unsupported_linear_reason(layer: StoredLinear) -> str | None:
    """Return None: it runs every linear layer."""
    return None


def prepare_linear(layer: StoredLinear, num_threads: int) -> RunLinear:
    """Return `linear_layer` of this weight; torch takes the threads of torch.set_num_threads."""
    weight, bias, *_, activation_dtype = layer
    return lambda x: linear_layer(x, weight, bias, activation_dtype=activation_dtype)


def linear_layer(
    x: Tensor, weight: BlockMatrix, bias: Tensor | None, *, activation_dtype: torch.dtype | None = None
) -> Tensor:
    """Return W x + b for each row of x, in float32 as those of `recurrent_layer`.

    Args:
        x: [..., columns].
        weight: [rows, columns].
        bias: [rows], dtype of x; or None.
        activation_dtype: as for `recurrent_layer`.
    Returns:
        y [..., rows], in the dtype of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide_x = x.to(dtype).reshape(-1, weight.shape[1]).contiguous()
    make = dense_linear if activation_dtype is None else quantized_linear
    with torch.autocast(x.device.type, enabled=False):
        y = make(weight, bias, dtype)(wide_x)
        if activation_dtype is None and not (wide_x.isfinite().all() and y.isfinite().all()):
            y = block_linear(weight, bias, dtype)(wide_x)
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def recurrent_layer(
    x: Tensor,
    states: list[Tensor],
    directions: list[LayerWeights],
    batch_sizes: Tensor | None,
    mode: str,
    *,
    activation_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Run one layer over a whole batch of sequences.

    Args:
        x: [N, I], the rows of a packed batch: those of step t are batch_sizes[t] consecutive rows.
        states: h0 [D, B, H or proj_size] and, for an LSTM, c0 [D, B, H].
        directions: the weights of each of D directions; the second one runs from the last step to the first.
        batch_sizes: [T], int64 on the CPU, never increasing; None for B rows at every step.
        mode: nn.RNNBase.mode.
        activation_dtype: torch.int8, with weights that are all stored in it, for quantised activations; or None.
    Returns:
        y [N, D * (H or proj_size)], h_n and, for an LSTM, c_n, in the dtype of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Products round in another order for other strides: contiguous, what is equal gives the same bits.
    wide_x, wide_states = x.to(dtype).contiguous(), [state.to(dtype).contiguous() for state in states]
    run = functools.partial(
        _run_directions, wide_x, wide_states, directions, row_ranges(x, states[0], batch_sizes), mode
    )
    outputs = run(dense_linear if activation_dtype is None else quantized_linear)
    if activation_dtype is None and not all(t.isfinite().all() for t in (wide_x, *wide_states, outputs[0])):
        # A dense product would take 0 * inf = NaN from pruned weights. What is pruned does not read its input.
        outputs = run(block_linear)
    return [output.to(x.dtype) for output in outputs]


def row_ranges(x: Tensor, h0: Tensor, batch_sizes: Tensor | None) -> list[tuple[int, int]]:
    """First row of x and number of rows, for each step."""
    if batch_sizes is None:
        B = h0.shape[1]
        return [(first, B) for first in range(0, len(x), B)] if B else []
    sizes = batch_sizes.tolist()
    starts = [0, *batch_sizes.cumsum(0).tolist()]
    return list(zip(starts, sizes))  # noqa: B905 - starts has one more


def _run_directions(
    x: Tensor,
    states: list[Tensor],
    directions: list[LayerWeights],
    steps: list[tuple[int, int]],
    mode: str,
    make_linear: MakeLinear,
) -> list[Tensor]:
    ends = []
    outputs = []
    for d, weights in enumerate(directions):
        projected = make_linear(weights.weight_ih, weights.bias_ih, x.dtype)(x)
        hidden_linear = make_linear(weights.weight_hh, weights.bias_hh, x.dtype)
        project = None if weights.weight_hr is None else make_linear(weights.weight_hr, None, x.dtype)
        h, *cell = (state[d].clone() for state in states)
        output = x.new_empty(len(x), h.shape[1])
        for first, size in reversed(steps) if d else steps:
            rows = slice(first, first + size)
            state = [part[:size] for part in (h, *cell)]
            state = CELLS[mode](projected[rows], hidden_linear(state[0]), *state)
            if project is not None:
                state = [project(state[0]), *state[1:]]
            for part, new in zip((h, *cell), state, strict=True):
                part[:size] = new
            output[rows] = state[0]
        outputs.append(output)
        ends.append([h, *cell])
    return [torch.cat(outputs, dim=1), *(torch.stack(parts) for parts in zip(*ends, strict=True))]


def _rnn_cell(activation: Callable[[Tensor], Tensor], projected: Tensor, recurrent: Tensor, h: Tensor) -> list[Tensor]:
    return [activation(projected + recurrent)]


def _gru_cell(projected: Tensor, recurrent: Tensor, h: Tensor) -> list[Tensor]:
    p_r, p_z, p_n = projected.chunk(3, dim=1)
    a_r, a_z, a_n = recurrent.chunk(3, dim=1)
    r, z = (p_r + a_r).sigmoid(), (p_z + a_z).sigmoid()
    n = (p_n + r * a_n).tanh()
    return [n + z * (h - n)]


def _lstm_cell(projected: Tensor, recurrent: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
    i, f, g, o = (projected + recurrent).chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return [o.sigmoid() * c.tanh(), c]


CELLS = {
    "RNN_TANH": functools.partial(_rnn_cell, torch.tanh),
    "RNN_RELU": functools.partial(_rnn_cell, torch.relu),
    "GRU": _gru_cell,
    "LSTM": _lstm_cell,
}


def dense_linear(weight: BlockMatrix | Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """Multiply by the weight as an ordinary matrix: right as long as all inputs are finite."""
    dense = (weight if isinstance(weight, Tensor) else weight.to_dense()).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return lambda x: F.linear(x, dense, bias)


def quantized_linear(weight: BlockMatrix | Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """Multiply integers by integers, as the top of the file says."""
    assert isinstance(weight, BlockMatrix), "a dense weight is not stored in int8"
    assert weight.scales is not None
    integers = dataclasses.replace(weight, scales=None).to_dense().double()  # float64 holds every sum exactly
    row_scales = weight.scales.to(dtype)

    def multiply(x: Tensor) -> Tensor:
        quantized, scales = quantize_activations(x)
        y = scales * row_scales * (quantized.double() @ integers.t()).to(dtype)
        return y if bias is None else y + bias.to(dtype)

    return multiply


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of x [n, columns] to integers -127..127 times one scale: returns q [n, columns], scales [n, 1].

    Both are in the dtype of x, float32 or float64. A row with NaN or infinity has the scale NaN.
    """
    scales = x.abs().amax(dim=1, keepdim=True) / 127
    scales = scales.where(scales.isfinite(), float("nan"))
    inverses = scales.reciprocal().where(~(scales < torch.finfo(torch.float32).tiny), 0)
    return (x * inverses).round(), scales


def block_linear(weight: BlockMatrix | Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """Multiply block by block: a pruned block does not read its input, so NaN and infinity stop there.

    Padded places of picks read the column that they repeat (sparse/picked_storage.py). Rows of the input are taken in
    chunks, as each one needs a number for each of `places`, and BR for each block.
    """
    if isinstance(weight, Tensor):
        return dense_linear(weight, bias, dtype)  # nothing is pruned: every output reads every input
    (gates, groups, _), BR = weight.block_grid, weight.block_size[0]
    blocks = weight.scaled_blocks().to(dtype)  # [NB, BR, BC]
    places = weight.input_places()  # [NB, BC], or with picks [NB, BC, BR]
    block_rows, equation = weight.block_rows, "nbc,brc->bnr" if places.dim() == 2 else "nbcr,brc->bnr"
    row_bytes = (places.numel() + len(blocks) * BR) * dtype.itemsize
    chunk_rows = max(1, CHUNK_BYTES // max(1, row_bytes))

    def multiply(x: Tensor) -> Tensor:
        inputs = F.pad(x, (0, weight.padded_columns - x.shape[1]))[:, places]
        products = torch.einsum(equation, inputs, blocks)
        sums = x.new_zeros(groups * gates, len(x), BR).index_add_(0, block_rows, products)
        rows = sums.view(groups, gates, len(x), BR).permute(2, 1, 0, 3).reshape(len(x), gates, groups * BR)
        y = rows[..., : weight.shape[0] // gates].flatten(1)
        return y if bias is None else y + bias.to(dtype)

    return lambda x: torch.cat([multiply(rows) for rows in x.split(chunk_rows)])
