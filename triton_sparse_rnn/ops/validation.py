"""What must hold before a kernel is handed the addresses of tensors. Whoever calls a layer has checked it by then."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor
from torch._C import _has_storage
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from triton_sparse_rnn.kernels.cpu.addresses import reached_bytes
from triton_sparse_rnn.ops.layer_weights import LayerWeights
from triton_sparse_rnn.ops.stored_linear import StoredLinear
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import GATES


def check_memory(name: str, tensor: Tensor) -> None:
    """Raise RuntimeError unless the memory of a tensor holds all of its numbers.

    Whoever frees memory by `untyped_storage().resize_(0)` leaves the tensor with its shape, and with an address that is
    0 or behind the end of what there is. torch.nn's layers raise for most of these, and end the process for others.
    """
    if is_compiling() or type(tensor) not in (Tensor, Parameter) or tensor.is_meta or not _has_storage(tensor):
        return  # there are no addresses: tensors of a trace, of torch.func, sparse ones
    if tensor.numel() == 0:
        return
    needed, found = reached_bytes(tensor), tensor.untyped_storage().nbytes()
    if found < needed or tensor._is_zerotensor():
        raise RuntimeError(
            f"{name} has no memory for its numbers: sizes {list(tensor.shape)}, strides {list(tensor.stride())}, "
            f"storage offset {tensor.storage_offset()}, and itemsize {tensor.itemsize} require a storage of {needed} "
            f"bytes, and its storage has {found}; was it freed by untyped_storage().resize_()? Give a tensor that "
            "holds its numbers"
        )


def check_batch_sizes(batch_sizes: Tensor, rows: int, batch_size: int) -> None:
    """Raise RuntimeError unless these can be the batch sizes of a PackedSequence of `rows` rows.

    `nn.utils.rnn` makes no others, but anybody can write a PackedSequence by hand.
    """
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or not batch_sizes.is_cpu:
        raise RuntimeError(
            f"batch_sizes must be a vector of int64 on the CPU, got {batch_sizes.dtype} of shape "
            f"{tuple(batch_sizes.shape)} on {batch_sizes.device}"
        )
    check_memory("batch_sizes", batch_sizes)
    sizes = batch_sizes.tolist()
    if not sizes:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if sizes[0] != batch_size or min(sizes) < 1 or sum(sizes) != rows or sorted(sizes, reverse=True) != sizes:
        shown = f"{sizes[:8]}{' and so on' if len(sizes) > 8 else ''}"
        raise RuntimeError(
            f"batch_sizes must begin with the batch size {batch_size}, never increase, stay positive and add up to the "
            f"{rows} rows of data, got {shown}"
        )


def check_num_threads(num_threads: int) -> int:
    """Return num_threads as a plain int, or raise TypeError or ValueError unless it is a positive integer."""
    if isinstance(num_threads, bool) or not isinstance(num_threads, numbers.Integral):
        raise TypeError(f"num_threads must be an integer, got {num_threads!r}")
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")
    return int(num_threads)


def check_not_capturing(device: torch.device) -> None:
    """Raise RuntimeError while a CUDA graph is captured: weights are prepared for kernels by operations that wait."""
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        capturing = torch.cuda.is_current_stream_capturing()
    if capturing:
        raise RuntimeError(
            "a CUDA graph is being captured, and a converted layer cannot prepare its weights meanwhile: call it once, "
            "with an input of that size, before the capture"
        )


def check_activation_dtype(activation_dtype: torch.dtype | None, weight_dtype: torch.dtype) -> torch.dtype | None:
    """Return activation_dtype, or raise ValueError unless activations can have it where weights have weight_dtype."""
    if activation_dtype not in (None, torch.int8):
        raise ValueError(f"activation_dtype must be None or torch.int8, got {activation_dtype}")
    if activation_dtype == torch.int8 and weight_dtype != torch.int8:
        raise ValueError(
            f"activation_dtype=torch.int8 needs weights in torch.int8, got {weight_dtype}; give "
            "weight_dtype=torch.int8 too, or leave activation_dtype out"
        )
    return activation_dtype


def check_weights(
    directions: list[LayerWeights],
    mode: str,
    input_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    activation_dtype: torch.dtype | None = None,
    indices: bool = True,
) -> None:
    """Raise ValueError unless the weights of a layer fit together.

    Args:
        directions: of the layer.
        mode: nn.RNNBase.mode.
        input_size: features of its inputs.
        dtype, device: of its inputs, and so of all that is not in blocks.
        activation_dtype: torch.int8 for quantised activations, or None.
        indices: also look at what the blocks' indices hold, which takes as long as a small layer; False: only if they
            are others than those looked at before, or torch has counted a write into them since.
    """
    for weights in directions:
        rows, hidden = weights.weight_hh.shape
        shapes = {
            "weight_ih": (rows, input_size),
            "weight_hh": (rows, hidden),
            "weight_hr": (hidden, rows // GATES[mode]),
        }
        for name, shape in shapes.items():
            weight = getattr(weights, name)
            if isinstance(weight, BlockMatrix):
                _check_blocks(name, weight, shape, device, indices)
                check_activation_dtype(activation_dtype, weight.values.dtype)
            elif weight is not None:
                if name != "weight_ih":
                    raise ValueError(f"{name} must be stored in blocks or picks, got an ordinary tensor")
                _check_tensor(name, weight, shape, dtype, device)
                check_activation_dtype(activation_dtype, weight.dtype)
        for name, bias in (("bias_ih", weights.bias_ih), ("bias_hh", weights.bias_hh)):
            if bias is not None:
                _check_tensor(name, bias, (rows,), dtype, device)


def check_call(
    x: Tensor,
    states: list[Tensor],
    directions: list[LayerWeights],
    batch_sizes: Tensor | None,
    mode: str,
    activation_dtype: torch.dtype | None = None,
) -> None:
    """Raise ValueError or RuntimeError unless the arguments of the operator fit together."""
    H, hidden = directions[0].weight_hh.shape[0] // GATES[mode], directions[0].weight_hh.shape[1]
    B = states[0].shape[1] if states[0].dim() == 3 else -1
    sizes = (hidden, H) if mode == "LSTM" else (hidden,)
    if hidden != H and directions[0].weight_hr is None:
        raise ValueError(f"states must end in hidden_size {H}, got {hidden}; other sizes need weight_hr")
    if len(states) != len(sizes):
        raise ValueError(f"states must be {len(sizes)} tensors for {mode}, got {len(states)}")
    for state, size in zip(states, sizes, strict=True):
        _check_tensor("states", state, (len(directions), B, size), x.dtype, x.device, contiguous=False)
    columns = directions[0].weight_ih.shape[1:]
    if x.dim() != 2 or x.shape[1:] != columns:
        raise ValueError(f"x must be [N, {', '.join(map(str, columns))}], got {tuple(x.shape)}")
    check_memory("x", x)
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, x.shape[0], B)
    elif x.shape[0] % B if B else x.shape[0]:
        raise ValueError(f"x must hold whole steps of {B} rows, got {x.shape[0]} rows")
    check_weights(directions, mode, x.shape[1], x.dtype, x.device, activation_dtype=activation_dtype, indices=False)


def check_linear(layer: StoredLinear, *, indices: bool = True) -> None:
    """Raise ValueError unless weight and bias of a linear layer fit together; `indices` as for `check_weights`."""
    weight, bias, dtype, device, activation_dtype = layer
    _check_blocks("weight", weight, weight.shape, device, indices)
    check_activation_dtype(activation_dtype, weight.values.dtype)
    if weight.gates != 1:
        raise ValueError(f"weight must be of one gate, got {weight.gates}")
    if bias is not None:
        _check_tensor("bias", bias, weight.shape[:1], dtype, device)


def _check_blocks(name: str, matrix: BlockMatrix, shape: tuple[int, int], device: torch.device, indices: bool) -> None:
    if matrix.shape != shape:
        raise ValueError(f"{name} must be of shape {shape}, got {matrix.shape}")
    if matrix.values.device != device:
        raise ValueError(f"{name} must be on {device}, got {matrix.values.device}")
    for part, tensor in matrix.parts().items():
        if tensor is not None:
            check_memory(f"{name}_{part}", tensor)
    now = _indices_as_they_are(matrix)
    known = now is not None and _CHECKED.get(matrix.columns) == now
    matrix.check(indices=indices or not known)
    if now is not None and not known:
        _CHECKED[matrix.columns] = now


# By `columns`, for as long as that lives: what `_indices_as_they_are` gave when the indices were found to be right.
_CHECKED = WeakTensorKeyDictionary()


def _indices_as_they_are(matrix: BlockMatrix) -> tuple[object, ...] | None:
    """What changes with the indices of a matrix, or with what they must fit.

    None where torch counts no writes, and where somebody has taken an index away.
    """
    if matrix.columns is None or matrix.starts is None:
        return None
    indices = [tensor for name in BlockMatrix.INDICES if (tensor := getattr(matrix, name)) is not None]
    if any(tensor.is_inference() for tensor in indices):
        return None
    # The tensors themselves: when one is freed, another may get its address.
    tensors = [(WeakIdRef(tensor), tensor.data_ptr(), tensor._version) for tensor in indices]
    return *tensors, matrix.shape, matrix.gates, matrix.values.shape


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, contiguous: bool = True
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} must be {dtype} of shape {shape} on {device}, got {tensor.dtype} of shape {tuple(tensor.shape)} "
            f"on {tensor.device}"
        )
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    check_memory(name, tensor)
