"""A call of a module: checked as torch.nn checks it, brought to one form, the rows of a packed batch, and run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from triton_sparse_rnn.ops.layer_weights import RunLayer
from triton_sparse_rnn.ops.validation import check_batch_sizes, check_memory
from triton_sparse_rnn.sparse.layer_config import LayerConfig


class CallLayout(NamedTuple):
    """What a layer expects of its calls."""

    name: str  # of the dense class: it opens some messages
    input_size: int
    state_sizes: tuple[int, ...]  # last axis of h and, for an LSTM, of c
    layers: int  # L * D
    batch_first: bool
    dtype: torch.dtype
    device: torch.device


def layout_of(config: LayerConfig, name: str, dtype: torch.dtype, device: torch.device) -> CallLayout:
    """Describe the calls of a layer of some dtype on some device; `name` is that of its dense class."""
    return CallLayout(
        name=name,
        input_size=config.input_size,
        state_sizes=config.state_sizes,
        layers=config.num_layers * config.directions,
        batch_first=config.batch_first,
        dtype=dtype,
        device=device,
    )


class Call(NamedTuple):
    """A checked call. N rows: those of step t are consecutive, as in PackedSequence.data."""

    x: Tensor  # [N, I]
    states: list[Tensor]  # h and, for an LSTM, c: each [L * D, B, size]
    batch_sizes: Tensor | None  # [T], or None for B rows at every step
    packed: PackedSequence | None
    shape: tuple[int, ...]  # leading axes of the output, steps first
    transposed: bool  # the caller wants [B, T, features]
    unbatched: bool

    def result(
        self, y: Tensor, states: Sequence[Tensor]
    ) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, ...]]:
        """Give y [N, features] and states, each [L * D, B, size], the form in which the caller asked."""
        if self.packed is not None:
            output = PackedSequence(
                y, self.packed.batch_sizes, self.packed.sorted_indices, self.packed.unsorted_indices
            )
            states = _permute(states, self.packed.unsorted_indices)
        else:
            output = y if len(self.shape) == 1 else y.view(*self.shape, y.shape[1])
            output = output.transpose(0, 1) if self.transposed else output
            states = [state.squeeze(1) for state in states] if self.unbatched else states
        return output, (states[0] if len(states) == 1 else tuple(states))


def read_call(input: Tensor | PackedSequence, hx: Tensor | Sequence[Tensor] | None, layout: CallLayout) -> Call:
    """Check the arguments of a call. The errors are torch.nn's, of the same type and opening words."""
    states = None if hx is None else _state_list(hx, layout)
    if isinstance(input, PackedSequence):
        x, batch_sizes = input.data, input.batch_sizes
        _check_input(x, 2, layout)
        states = None if states is None else _permute(states, input.sorted_indices)
        # torch.export knows the length of an axis, but no number in a tensor.
        B = int(batch_sizes[0]) if input.sorted_indices is None else input.sorted_indices.shape[0]
        states = _check_states(states, x, B, layout)
        if type(batch_sizes) is Tensor and not torch.compiler.is_compiling():
            check_batch_sizes(batch_sizes, x.shape[0], B)
        return Call(x, states, batch_sizes, input, (), False, False)
    if input.dim() not in (2, 3):
        raise ValueError(f"{layout.name}: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
    if unbatched := input.dim() == 2:
        x, shape = input.unsqueeze(1), (input.shape[0],)
    else:
        x = input.transpose(0, 1) if layout.batch_first else input
        shape = (x.shape[0], x.shape[1])
    if states is not None:
        _check_axes(states, input.dim())
        states = [state.unsqueeze(1) for state in states] if unbatched else states
    _check_input(x, 3, layout)
    states = _check_states(states, x, x.shape[1], layout)
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    return Call(
        x.reshape(-1, layout.input_size), states, None, None, shape, layout.batch_first and not unbatched, unbatched
    )


def read_step(x: Tensor, hx: Tensor | Sequence[Tensor] | None, layout: CallLayout) -> Call:
    """Check the arguments of one step of a stream: x [B, I] or [I], states as in a call of the layer."""
    if x.dim() not in (1, 2):
        raise ValueError(f"{layout.name}: Expected input of step() to be 1D or 2D, got {x.dim()}D tensor instead")
    unbatched = x.dim() == 1
    states = None if hx is None else _state_list(hx, layout)
    if states is not None:
        _check_axes(states, x.dim() + 1)
        states = [state.unsqueeze(1) for state in states] if unbatched else states
    rows = x.unsqueeze(0) if unbatched else x
    _check_input(rows, 2, layout)
    states = _check_states(states, rows, rows.shape[0], layout)
    return Call(rows, states, None, None, tuple(x.shape[:-1]), False, unbatched)


def _state_list(hx: Tensor | Sequence[Tensor], layout: CallLayout) -> list[Tensor]:
    states = [hx] if isinstance(hx, Tensor) else list(hx) if isinstance(hx, (list, tuple)) else []
    wanted = "a tensor" if len(layout.state_sizes) == 1 else "a pair of tensors (h_0, c_0)"
    if len(states) != len(layout.state_sizes) or not all(isinstance(state, Tensor) for state in states):
        raise TypeError(f"hx must be {wanted}, got {type(hx).__name__}")
    for state in states:
        check_memory("hx", state)
    return states


def _check_axes(states: list[Tensor], input_axes: int) -> None:
    kind = "unbatched" if input_axes == 2 else "batched"
    if any(state.dim() != input_axes for state in states):
        if len(states) == 1:
            raise RuntimeError(
                f"For {kind} {input_axes}-D input, hx should also be {input_axes}-D but got {states[0].dim()}-D tensor"
            )
        raise RuntimeError(
            f"For {kind} {input_axes}-D input, hx and cx should also be {input_axes}-D "
            f"but got ({states[0].dim()}-D, {states[1].dim()}-D) tensors"
        )


def _check_input(x: Tensor, axes: int, layout: CallLayout) -> None:
    if not dtypes_match(x, layout.dtype):
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({layout.dtype}). "
            f"Convert input: input.to({layout.dtype}), or convert model: model.to({x.dtype})"
        )
    if x.dim() != axes:
        raise RuntimeError(f"input must have {axes} dimensions, got {x.dim()}")
    if x.shape[-1] != layout.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {layout.input_size}, got {x.shape[-1]}"
        )
    if x.device != layout.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, "
            f"found input tensor at {x.device} and parameter tensor at {layout.device}"
        )
    check_memory("input", x)


def _check_states(states: list[Tensor] | None, x: Tensor, B: int, layout: CallLayout) -> list[Tensor]:
    """Return the states, zeros where none were given."""
    shapes = [(layout.layers, B, size) for size in layout.state_sizes]
    if states is None:
        return [x.new_zeros(shape) for shape in shapes]
    for i, (state, shape) in enumerate(zip(states, shapes, strict=True)):
        name = "hidden" if len(states) == 1 else f"hidden[{i}]"
        if state.shape != shape:
            raise RuntimeError(f"Expected {name} size {shape}, got {list(state.shape)}")
        if state.device != x.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, "
                f"found input tensor at {x.device} and hidden tensor at {state.device}"
            )
        if not dtypes_match(state, x.dtype):
            raise RuntimeError(
                "Input and hidden tensors are not the same dtype, "
                f"found input tensor with {x.dtype} and hidden tensor with {state.dtype}"
            )
    return states


def run_layers(layers: list[RunLayer], x: Tensor, states: list[Tensor], batch_sizes: Tensor | None) -> list[Tensor]:
    """Run each layer on what the one below gives; what goes in and comes out is that of a `RunLayer`."""
    if len(layers) == 1:
        return layers[0](x, states, batch_sizes)
    D = states[0].shape[0] // len(layers)
    ends = []
    for k, run_layer in enumerate(layers):
        # A slice of a fake CUDA tensor, as in an export on a machine without a GPU, would need torch built for CUDA.
        x, *end = run_layer(x, [state.narrow(0, k * D, D) for state in states], batch_sizes)
        ends.append(end)
    return [x, *(torch.cat(parts) for parts in zip(*ends, strict=True))]


def result_dtype(call: Call, mode: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of results as torch.nn has it: under autocast a GRU on the CPU keeps that of its state.

    Args:
        call: with x and states as they came.
        mode: nn.RNNBase.mode.
        dtype: of the layer.
    """
    device_type = call.x.device.type
    if call.x.is_meta or not torch.is_autocast_enabled(device_type) or dtype == torch.float64:
        return dtype
    if device_type == "cpu" and mode == "GRU":
        return torch.promote_types(call.states[0].dtype, torch.get_autocast_dtype(device_type))
    return torch.get_autocast_dtype(device_type)


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]  # to() alone takes its time


def dtypes_match(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether they are the same, or autocast makes them the same; it leaves float64 and integers alone."""
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    if tensor.dtype == dtype or tensor.is_meta:  # torch knows no autocast on the meta device
        return tensor.dtype == dtype
    return torch.is_autocast_enabled(tensor.device.type) and tensor.dtype in narrow and dtype in narrow


def _permute(states: Sequence[Tensor], permutation: Tensor | None) -> list[Tensor]:
    return list(states) if permutation is None else [state.index_select(1, permutation) for state in states]
