"""How a module runs eagerly: checked and prepared once, for as long as nothing that this rests on changes."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from triton_sparse_rnn.nn.calls import CallLayout
from triton_sparse_rnn.nn.instance_state import own_tensors
from triton_sparse_rnn.ops.dispatch import PREPARE_LAYER, choose_backend
from triton_sparse_rnn.ops.layer_weights import LayerWeights, RunLayer
from triton_sparse_rnn.ops.operators import is_observed
from triton_sparse_rnn.ops.triton import PreparedLayer, PreparedStack, stack_layers
from triton_sparse_rnn.ops.validation import check_not_capturing, check_num_threads, check_weights

if TYPE_CHECKING:
    from triton_sparse_rnn.nn.persistent import PersistentLayer


class Plan(NamedTuple):
    """The layers of a module, prepared for what its settings and buffers were then."""

    settings: tuple[str | None, torch.dtype | None, int]  # backend, activation_dtype, num_threads
    layout: CallLayout
    device_type: str
    buffers: list[Tensor | None]
    tensors: list[Tensor]
    addresses: list[int]
    layers: list[RunLayer]

    def holds(self, module: PersistentLayer) -> bool:
        """Whether all is as it was, and every tensor lies where it lay: prepared layers keep addresses.

        A tensor moves when its `data` is assigned to, by share_memory_(), and when a queue sends it to a process.
        """
        buffers = module._buffers
        return (
            self.settings == (module.backend, module.activation_dtype, module.num_threads)
            and self.layout.dtype is buffers["_marker"].dtype  # type: ignore[union-attr]
            and len(self.buffers) <= len(buffers)  # what a user added comes behind
            and all(map(operator.is_, self.buffers, buffers.values()))
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )

    def plain_states(self, module: PersistentLayer, x: Any, hx: Any, axes: int, batch_axis: int) -> list[Tensor] | None:
        """Return the states of a plain call of this plan; None for others, which `read_call` or `read_step` looks into.

        Plain are most calls: an x of `axes` axes, none of them empty, hx of three axes or None, all of them ordinary
        tensors of the right dtype that nothing traces or differentiates, and no autocast. To see this takes four
        microseconds, and to read a call in all its forms fifteen.
        """
        _, input_size, state_sizes, layers, _, dtype, device = self.layout
        if type(x) is not Tensor or x.dtype is not dtype or x.device != device:
            return None
        shape = x.shape
        if len(shape) != axes or shape[-1] != input_size or 0 in shape:
            return None
        B = shape[batch_axis]
        if hx is None:
            states = [x.new_zeros(layers, B, size) for size in state_sizes]
        else:
            states = [hx] if type(hx) is Tensor else [*hx] if type(hx) is tuple else []
            if len(states) != len(state_sizes):
                return None
            for state, size in zip(states, state_sizes):  # noqa: B905 - it takes time, and lengths are the same
                if type(state) is not Tensor or state.dtype is not dtype or state.device != device:
                    return None
                if state.shape != (layers, B, size):
                    return None
        if is_observed(x, states) or torch.is_autocast_enabled(self.device_type) or not self.holds(module):
            return None
        return states

    def descriptions(self) -> list[str]:
        """How the layers run that say so: tile, programs, bytes on chip; each form once."""
        return list(
            dict.fromkeys(
                layer.describe() for layer in self.layers if isinstance(layer, (PreparedLayer, PreparedStack))
            )
        )


def make_plan(module: PersistentLayer, layout: CallLayout, layers: list[list[LayerWeights]]) -> Plan:
    """Check the weights of every layer and let its backend prepare it.

    Args:
        module: whose settings and buffers are taken.
        layout: of its calls.
        layers: for each layer the weights of its directions, in these buffers.
    Raises:
        ValueError: weights do not fit together, or a setting is wrong.
        BackendUnavailableError: the module names a backend that cannot run a layer.
        RuntimeError: a CUDA graph is being captured.
    """
    check_not_capturing(layout.device)
    backend, activation_dtype, num_threads = settings = module.backend, module.activation_dtype, module.num_threads
    names = own_tensors(module)
    buffers = [tensor for name, tensor in module._buffers.items() if name in names]
    tensors = [tensor for tensor in buffers if tensor is not None]
    addresses = [tensor.data_ptr() for tensor in tensors]
    num_threads = check_num_threads(num_threads)
    place, input_size = (layout.dtype, layout.device), layout.input_size
    for directions in layers:
        check_weights(directions, module.mode, input_size, *place, activation_dtype=activation_dtype)
        input_size = len(directions) * directions[0].weight_hh.shape[1]
    plan = Plan(settings, layout, layout.device.type, buffers, tensors, addresses, [])
    for directions in layers:
        chosen = choose_backend(backend, module.mode, *place, directions, activation_dtype)
        options = {"dtype": layout.dtype, "activation_dtype": activation_dtype, "num_threads": num_threads}
        plan.layers.append(PREPARE_LAYER[chosen](module.mode, directions, **options))
    plan.layers[:] = stack_layers(plan.layers)
    return plan
