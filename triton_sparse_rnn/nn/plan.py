"""How a module runs eagerly: checked and prepared once, for as long as nothing that this rests on changes."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from triton_sparse_rnn.nn.storage import buffer_names
from triton_sparse_rnn.ops.backends.triton import PreparedLayer, PreparedStack, stack_layers
from triton_sparse_rnn.ops.calls import CallLayout
from triton_sparse_rnn.ops.dispatch import BACKENDS, choose_backend
from triton_sparse_rnn.ops.layer_weights import StoredLayer
from triton_sparse_rnn.ops.operators import is_watched
from triton_sparse_rnn.ops.validation import check_not_capturing, check_num_threads, check_weights
from triton_sparse_rnn.sparse.block_matrix import INDEX_DTYPES


class Planned(Protocol):
    """What a plan reads of a persistent module."""

    backend: str | None
    activation_dtype: torch.dtype | None
    num_threads: int
    _config: Any  # LayerConfig; of a linear layer LinearConfig
    _buffers: dict[str, Tensor | None]


class PlannedLayer(Planned, Protocol):
    """What a plan of a recurrent module reads besides."""

    @property
    def _call_layout(self) -> CallLayout: ...

    def _layers(self) -> list[StoredLayer]: ...


class Plan(NamedTuple):
    """The layers of a module, prepared for what its settings and buffers were then."""

    settings: tuple[str | None, torch.dtype | None, int]  # backend, activation_dtype, num_threads
    config: Any  # LayerConfig; of a linear layer LinearConfig
    layout: Any  # CallLayout; of a linear layer LinearLayout
    on_cpu: bool
    buffers: list[Tensor | None]
    tensors: list[Tensor]  # those that hold anything
    addresses: list[int]
    indices: list[Tensor]  # BlockMatrix.INDICES
    versions: list[int]  # torch counts in them what is written into an index in place
    layers: list[Any]  # RunLayer; of a linear layer one RunLinear

    def holds(self, module: Planned) -> bool:
        """Whether all is as it was, every tensor lies where it lay, and nothing was written into an index.

        Prepared layers keep addresses, and read as far as indices say. A tensor moves when its `data` is assigned to,
        by share_memory_(), when a queue sends it to a process, and when its storage is resized or freed. What is
        written into weights and biases counts without more ado.
        """
        buffers = module._buffers
        return (
            self.settings == (module.backend, module.activation_dtype, module.num_threads)
            and self.config is module._config
            and self.layout.dtype is buffers["_marker"].dtype  # type: ignore[union-attr]
            and len(self.buffers) <= len(buffers)  # what a user added comes behind
            and all(map(operator.is_, self.buffers, buffers.values()))
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
            and [tensor._version for tensor in self.indices] == self.versions
        )

    def plain_states(self, module: Planned, x: Any, hx: Any, axes: int, batch_axis: int) -> list[Tensor] | None:
        """Return the states of a plain call of this plan; None for others, which `read_call` or `read_step` looks into.

        Plain are most calls: an x of `axes` axes, none of them empty, hx of three axes or None, all of them ordinary
        tensors of the right dtype, with their numbers in memory, that nothing traces or differentiates, and no
        autocast. To see this takes four microseconds, and to read a call in all its forms fifteen.
        """
        _, input_size, state_sizes, layers, _, dtype, device = self.layout
        on_cpu, itemsize = self.on_cpu, dtype.itemsize
        if is_watched() or _is_any_autocast_enabled():
            return None
        if type(x) is not Tensor or x.dtype is not dtype or not (x.is_cpu if on_cpu else x.device == device):
            return None
        shape = x.shape
        if len(shape) != axes or shape[-1] != input_size or 0 in shape:
            return None
        # As `check_memory` does; a tensor with other strides is copied by torch before a kernel reads it.
        if x.untyped_storage().nbytes() < x.nbytes + x.storage_offset() * itemsize:
            return None
        B = shape[batch_axis]
        records_gradients = torch.is_grad_enabled()
        if records_gradients and x.requires_grad:
            return None
        if hx is None:
            states = [x.new_zeros(layers, B, size) for size in state_sizes]
        else:
            states = [hx] if type(hx) is Tensor else [*hx] if type(hx) is tuple else []
            if len(states) != len(state_sizes):
                return None
            for state, size in zip(states, state_sizes):  # noqa: B905 - it takes time, and lengths are the same
                if type(state) is not Tensor or state.dtype is not dtype:
                    return None
                if not (state.is_cpu if on_cpu else state.device == device):
                    return None
                if state.shape != (layers, B, size) or (records_gradients and state.requires_grad):
                    return None
                needed_bytes = (layers * B * size + state.storage_offset()) * itemsize
                if state.untyped_storage().nbytes() < needed_bytes:
                    return None
        return states if self.holds(module) else None

    def descriptions(self) -> list[str]:
        """How the layers run that say so: tile, programs, bytes on chip; each form once."""
        return list(
            dict.fromkeys(
                layer.describe() for layer in self.layers if isinstance(layer, (PreparedLayer, PreparedStack))
            )
        )


def make_plan(module: PlannedLayer) -> Plan:
    """Check the weights of every layer of a module, and let its backend prepare it.

    Raises:
        ValueError: weights do not fit together, or a setting is wrong.
        BackendUnavailableError: the module names a backend that cannot run a layer.
        RuntimeError: the memory of a weight was freed, or a CUDA graph is being captured.
    """
    config, layout = module._config, module._call_layout
    check_not_capturing(layout.device)
    backend, _, num_threads = settings = module.backend, module.activation_dtype, module.num_threads
    num_threads = check_num_threads(num_threads)
    plan = Plan(settings, config, layout, layout.device.type == "cpu", *watched(module), [])
    layers, input_size = module._layers(), layout.input_size
    for mode, directions, dtype, device, activation_dtype in layers:
        check_weights(directions, mode, input_size, dtype, device, activation_dtype=activation_dtype)
        input_size = len(directions) * directions[0].weight_hh.shape[1]
    for layer in layers:
        plan.layers.append(BACKENDS[choose_backend(backend, layer)].prepare_layer(layer, num_threads))
    plan.layers[:] = stack_layers(plan.layers)
    return plan


def watched(
    module: Planned,
) -> tuple[list[Tensor | None], list[Tensor], list[int], list[Tensor], list[int]]:
    """Return of a Plan all fields from `buffers` to `versions`."""
    names = {*buffer_names(module._config), "_marker"}
    count_writes(module._buffers, names)
    buffers = [tensor for name, tensor in module._buffers.items() if name in names]
    tensors = [tensor for tensor in buffers if tensor is not None and tensor.numel() > 0]
    indices = [tensor for tensor in tensors if tensor.dtype in INDEX_DTYPES]
    addresses = [tensor.data_ptr() for tensor in tensors]
    return buffers, tensors, addresses, indices, [tensor._version for tensor in indices]


def count_writes(buffers: dict[str, Tensor | None], names: Collection[str]) -> None:
    """Put a copy in the place of each index that was made in inference mode: torch counts no writes into those."""
    for name, tensor in buffers.items():
        if name in names and tensor is not None and tensor.dtype in INDEX_DTYPES and tensor.is_inference():
            with torch.inference_mode(False):
                buffers[name] = tensor.clone()
