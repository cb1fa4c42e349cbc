"""How a linear module runs eagerly: checked and prepared once, as a recurrent one is (plan.py)."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from triton_sparse_rnn.nn.plan import Plan, Planned, watched
from triton_sparse_rnn.ops.dispatch import BACKENDS, choose_linear_backend
from triton_sparse_rnn.ops.linear_calls import LinearLayout
from triton_sparse_rnn.ops.operators import is_watched
from triton_sparse_rnn.ops.stored_linear import StoredLinear
from triton_sparse_rnn.ops.validation import check_linear, check_not_capturing, check_num_threads


class PlannedLinear(Planned, Protocol):
    """What a plan of a linear module reads besides."""

    @property
    def _linear_layout(self) -> LinearLayout: ...

    def _layer(self) -> StoredLinear: ...


class LinearPlan(Plan):
    """The one layer of a module, prepared for what its settings and buffers were then."""

    __slots__ = ()

    def takes(self, module: PlannedLinear, x: Any) -> bool:
        """Whether this is a plain call of this plan; others are looked into by `check_features`.

        Plain are most calls: x is an ordinary tensor of the right dtype, its last axis of the right size, with its
        numbers in memory, that nothing traces or differentiates, and no autocast.
        """
        columns, _, dtype, device = self.layout
        if is_watched() or _is_any_autocast_enabled():
            return False
        if type(x) is not Tensor or x.dtype is not dtype or x.layout is not torch.strided:
            return False
        if not (x.is_cpu if self.on_cpu else x.device == device):
            return False
        if x.shape[-1:] != (columns,):
            return False
        # As `check_memory` does; a tensor with other strides is copied by torch before a kernel reads it.
        if x.untyped_storage().nbytes() < x.nbytes + x.storage_offset() * dtype.itemsize:
            return False
        if x.requires_grad and torch.is_grad_enabled():
            return False
        return self.holds(module)


def make_linear_plan(module: PlannedLinear) -> LinearPlan:
    """Check the weight of a module, and let its backend prepare it.

    Raises:
        ValueError: weights do not fit together, or a setting is wrong.
        BackendUnavailableError: the module names a backend that cannot run it.
        RuntimeError: the memory of a weight was freed, or a CUDA graph is being captured.
    """
    layout = module._linear_layout
    check_not_capturing(layout.device)
    settings = module.backend, module.activation_dtype, module.num_threads
    num_threads = check_num_threads(module.num_threads)
    plan = LinearPlan(settings, module._config, layout, layout.device.type == "cpu", *watched(module), [])
    layer = module._layer()
    check_linear(layer)
    plan.layers.append(BACKENDS[choose_linear_backend(module.backend, layer)].prepare_linear(layer, num_threads))
    return plan
