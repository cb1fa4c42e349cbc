"""Recurrent and linear layers on a GPU by Triton kernels: twins of those of reference.py for what they support.

With TRITON_INTERPRET=1 in the environment, Triton interprets its kernels instead of compiling them, and this backend
takes tensors on the CPU: slow, but the same computation.
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from triton_sparse_rnn.ops.layer_weights import (
    LayerWeights,
    RunLayer,
    StoredLayer,
    pack_layer_weights,
    plain,
    unpack_layer_weights,
)
from triton_sparse_rnn.ops.stored_linear import RunLinear, StoredLinear
from triton_sparse_rnn.ops.validation import check_not_capturing
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import GATES
from triton_sparse_rnn.sparse.row_blocks import MOST_PICKED_COLUMNS

if TYPE_CHECKING:
    from triton_sparse_rnn.kernels.triton.recurrent_layer import RecurrentLayer, RecurrentStack

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST_CAPABILITY = (8, 0)  # the oldest GPU for which the machine code is looked through


@functools.cache
def availability() -> str | None:
    """Return why no Triton kernel can run in this process, or None where one can."""
    if torch.version.hip is not None:
        return (
            "this torch is built for AMD GPUs, where Triton makes plain loads of those that wait for what other "
            "programs write"
        )
    try:
        from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
    except Exception as error:  # a broken installation may raise anything, and this is only to be reported
        return f"Triton cannot be imported: {error}"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device that torch can use"
    reasons = [_too_old(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    return reasons[0] if all(reasons) else None


def unsupported_reason(layer: StoredLayer) -> str | None:
    """Why the kernels cannot run this layer, where `availability` is None; None if they can."""
    if (reason := _unsupported_place(layer)) is not None:
        return reason
    for direction in layer.directions:
        if direction.weight_hr is not None:
            return "the layer has proj_size, which would take two exchanges between programs at every step, not one"
        for name in ("weight_ih", "weight_hh"):
            weight = getattr(direction, name)
            if isinstance(weight, BlockMatrix) and (reason := _unreadable_reason(name, weight)) is not None:
                return reason
    return None


def unsupported_linear_reason(layer: StoredLinear) -> str | None:
    """Why the kernels cannot run this linear layer, where `availability` is None; None if they can."""
    return _unsupported_place(layer) or _unreadable_reason("weight", layer.weight)


def _unsupported_place(layer: StoredLayer | StoredLinear) -> str | None:
    from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED

    device = layer.device
    if INTERPRETED and device.type != "cpu":
        return f"TRITON_INTERPRET=1 is set, and then it needs tensors on the CPU; these are on {device}"
    if not INTERPRETED and device.type != "cuda":
        return f"it needs tensors on a CUDA device, these are on {device}: move the module there first, with .cuda()"
    if not INTERPRETED and (reason := _too_old(device)) is not None:
        return reason
    if layer.dtype == torch.float64:
        return "it computes in float32, the layer's dtype is torch.float64"
    if layer.activation_dtype is not None:
        return f"it does not quantise activations, and activation_dtype is {layer.activation_dtype}"
    return None


def _unreadable_reason(name: str, weight: BlockMatrix) -> str | None:
    dtype, columns = weight.values.dtype, weight.shape[1]
    if dtype not in WEIGHT_DTYPES:
        return f"{name} is stored as {dtype}, and only {', '.join(map(str, WEIGHT_DTYPES))} run here"
    if weight.is_picked and dtype != torch.float32 and columns > MOST_PICKED_COLUMNS:
        return f"{name} has {columns:,} columns, and picks of {dtype} run here with {MOST_PICKED_COLUMNS:,} at most"
    return None


def _too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return None
    wanted, found = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, capability))
    return f"it needs a GPU of compute capability {wanted} or newer, {device} has {found}"


class PreparedLayer:
    """A RecurrentLayer, and the tensors it was made from: after a write into one of them it is made again.

    The kernels read weights in an order of their own, so most of what they read is a copy. Writes show in the version
    counters of the tensors; a CUDA graph goes on with the weights of its capture. Not seen are writes that do not
    count, as through `data`, and those into inference tensors, which have no counter; `load_state_dict` of a module
    counts in any case, as it prepares its layers anew.
    """

    def __init__(self, mode: str, directions: list[LayerWeights]) -> None:
        """Read the weights, which waits for the GPU.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        G, (rows, hidden) = GATES[mode], directions[0].weight_hh.shape
        # Aliases share memory and counters with the tensors, but do not keep _PREPARED from seeing those die.
        self._tensors = [None if tensor is None else tensor.detach() for tensor in pack_layer_weights(directions)]
        sizes = rows // G, hidden
        self._directions = unpack_layer_weights(self._tensors, mode, directions[0].weight_ih.shape[1], sizes)
        self._mode = mode
        self._captured: list[object] = []
        self._counted = [tensor for tensor in self._tensors if tensor is not None and not tensor.is_inference()]
        self._make()

    def __call__(self, x: Tensor, states: list[Tensor], batch_sizes: Tensor | None) -> list[Tensor]:
        """Arguments and results are those of `reference.recurrent_layer`."""
        return _call(self.kernels(), x, states, batch_sizes)

    def kernels(self) -> RecurrentLayer:
        """Return the layer as its weights are now."""
        if self._versions != [tensor._version for tensor in self._counted]:
            self._make()
        _keep_for_capture(self._captured, self._layer)
        return self._layer

    def describe(self, batch_size: int = 1) -> str:
        """Tell which tile the kernels use, in how many programs, and what they hold on the chip."""
        return self._layer.describe(batch_size)

    def is_made_from(self, mode: str, directions: list[LayerWeights]) -> bool:
        """Whether these are the tensors; whether they were written to is another question."""
        tensors = pack_layer_weights(directions)
        return (
            mode == self._mode
            and len(tensors) == len(self._tensors)
            and all(map(_is_alias, self._tensors, tensors))
            and not any(tensor is not None and tensor.is_inference() for tensor in tensors)
        )

    def _make(self) -> None:
        from triton_sparse_rnn.kernels.triton.recurrent_layer import RecurrentLayer

        device = self._directions[0].weight_hh.values.device
        check_not_capturing(device)
        versions = [tensor._version for tensor in self._counted]
        with torch.inference_mode(False), torch.no_grad():  # for calls in any mode, whichever is the first
            self._layer = RecurrentLayer(self._mode, self._directions, device=device)
        self._versions = versions


class PreparedStack:
    """Layers one above the other that run in one launch where they can, a RecurrentStack."""

    def __init__(self, layers: list[PreparedLayer]) -> None:
        """Take layers that `stack_layers` found to fit together."""
        self._layers = layers
        self._captured: list[object] = []
        self._make([layer.kernels() for layer in layers])

    def __call__(self, x: Tensor, states: list[Tensor], batch_sizes: Tensor | None) -> list[Tensor]:
        """As a layer, with the states of all layers [L, B, H]."""
        kernels = [layer.kernels() for layer in self._layers]
        if not all(map(operator.is_, kernels, self._made_from)):
            self._make(kernels)
        _keep_for_capture(self._captured, self._stack)
        return _call(self._stack, x, states, batch_sizes)

    def describe(self, batch_size: int = 1) -> str:
        """Tell how all layers run."""
        return self._stack.describe(batch_size)

    def _make(self, kernels: list[RecurrentLayer]) -> None:
        from triton_sparse_rnn.kernels.triton.recurrent_layer import RecurrentStack

        check_not_capturing(kernels[0].device)
        with torch.inference_mode(False), torch.no_grad():
            self._stack = RecurrentStack(kernels)
        self._made_from = kernels


def stack_layers(layers: list[RunLayer]) -> list[RunLayer]:
    """Return a PreparedStack in place of all layers of a module if they can be one, or else the layers."""
    prepared = [layer for layer in layers if isinstance(layer, PreparedLayer)]
    if len(prepared) < max(2, len(layers)):
        return layers
    from triton_sparse_rnn.kernels.triton.recurrent_layer import can_be_stacked

    return [PreparedStack(prepared)] if can_be_stacked([layer.kernels() for layer in prepared]) else layers


# By weight_hh.values of the first direction, for as long as that lives: the operator, which is handed tensors alone,
# finds here what a module or an earlier call has prepared.
_PREPARED = WeakTensorKeyDictionary()


def prepare_layer(layer: StoredLayer, num_threads: int) -> RunLayer:
    """Arguments and results of the callable are those of `reference.recurrent_layer`."""
    key = layer.directions[0].weight_hh.values
    prepared = _PREPARED.get(key)
    if prepared is None or not prepared.is_made_from(layer.mode, layer.directions):
        _PREPARED[key] = prepared = PreparedLayer(layer.mode, layer.directions)
    return prepared


class PreparedLinear:
    """A LinearLayer, and the tensors it was made from; after a write into one of them it is made again.

    What is said of `PreparedLayer` holds for it.
    """

    def __init__(self, weight: BlockMatrix, bias: Tensor | None) -> None:
        """Read the weight, which waits for the GPU.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        parts = {name: None if part is None else part.detach() for name, part in weight.parts().items()}
        self._weight = BlockMatrix.from_parts(parts, shape=weight.shape, gates=weight.gates)
        self._bias = None if bias is None else bias.detach()
        self._tensors = [*parts.values(), self._bias]
        self._captured: list[object] = []
        self._counted = [tensor for tensor in self._tensors if tensor is not None and not tensor.is_inference()]
        self._make()

    def __call__(self, x: Tensor) -> Tensor:
        """Argument and result are those of `reference.linear_layer`."""
        if self._versions != [tensor._version for tensor in self._counted]:
            self._make()
        _keep_for_capture(self._captured, self._layer)
        return self._layer(x.resolve_neg() if x.is_neg() else x)

    def is_made_from(self, weight: BlockMatrix, bias: Tensor | None) -> bool:
        """Whether these are the tensors; whether they were written to is another question."""
        tensors = [*weight.parts().values(), bias]
        return (
            weight.shape == self._weight.shape
            and all(map(_is_alias, self._tensors, tensors))
            and not any(tensor is not None and tensor.is_inference() for tensor in tensors)
        )

    def _make(self) -> None:
        from triton_sparse_rnn.kernels.triton.linear_layer import LinearLayer

        check_not_capturing(self._weight.values.device)
        versions = [tensor._version for tensor in self._counted]
        with torch.inference_mode(False), torch.no_grad():
            self._layer = LinearLayer(self._weight, self._bias)
        self._versions = versions


_PREPARED_LINEAR = WeakTensorKeyDictionary()  # by the values of the weight, as _PREPARED


def prepare_linear(layer: StoredLinear, num_threads: int) -> RunLinear:
    """Argument and result of the callable are those of `reference.linear_layer`."""
    key = layer.weight.values
    prepared = _PREPARED_LINEAR.get(key)
    if prepared is None or not prepared.is_made_from(layer.weight, layer.bias):
        _PREPARED_LINEAR[key] = prepared = PreparedLinear(layer.weight, layer.bias)
    return prepared


def _keep_for_capture(kept: list[object], layer: object) -> None:
    """Keep what a CUDA graph that is being captured will read at every replay, also after weights were written to."""
    device_is_there = torch.cuda.is_initialized()
    if device_is_there and torch.cuda.is_current_stream_capturing() and not any(layer is other for other in kept):
        kept.append(layer)


def _call(
    run: RecurrentLayer | RecurrentStack, x: Tensor, states: list[Tensor], batch_sizes: Tensor | None
) -> list[Tensor]:
    batch_sizes = None if batch_sizes is None else batch_sizes.contiguous()
    return run(plain(x), [plain(state) for state in states], batch_sizes)


def _is_alias(kept: Tensor | None, given: Tensor | None) -> bool:
    if kept is None or given is None:
        return kept is given
    return (kept.data_ptr(), kept.dtype, kept.shape) == (given.data_ptr(), given.dtype, given.shape)
