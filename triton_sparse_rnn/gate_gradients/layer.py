"""A training module with a `gate_gradient`: torch.nn's forward layer by layer, and our backward."""

from __future__ import annotations

import inspect
import sys
from typing import Any, Literal
from typing import cast as cast_to

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn import LSTM, RNNBase
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from triton_sparse_rnn.gate_gradients.contract import Direction, Steps
from triton_sparse_rnn.gate_gradients.dispatch import choose_backward
from triton_sparse_rnn.gate_gradients.forward import Weights
from triton_sparse_rnn.gate_gradients.function import run_layer
from triton_sparse_rnn.gate_gradients.options import GateGradientSparsity
from triton_sparse_rnn.gate_gradients.stats import GateGradientStats
from triton_sparse_rnn.ops.calls import Call, cast, layout_of, read_call, result_dtype
from triton_sparse_rnn.ops.validation import check_memory
from triton_sparse_rnn.sparse.layer_config import LayerConfig

_CALL = inspect.signature(LSTM.forward)


class GateGradientLayer(RNNBase):
    """What SparseLSTM and SparseGRU add to nn.LSTM and nn.GRU, which stand behind it among their bases."""

    _gate_gradient: GateGradientSparsity | None = None  # a layer that `sparsify` took never ran __init__ below

    def __init__(self, *args: Any, gate_gradient: GateGradientSparsity | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate_gradient = gate_gradient

    @property
    def gate_gradient(self) -> GateGradientSparsity | None:
        """What becomes zero in backward, with its state. To set it makes a copy with a new state; None removes it."""
        return self._gate_gradient

    @gate_gradient.setter
    def gate_gradient(self, template: GateGradientSparsity | None) -> None:
        check_gate_gradient(template)
        if template is None:
            vars(self).pop("_gate_gradient", None)
        else:
            self._gate_gradient = template.copy_for(self)

    @property
    def gate_gradient_stats(self) -> GateGradientStats | None:
        """Zeros so far, and what they are worth; None without `gate_gradient` or before a backward with it.

        Reading it may wait for the device.
        """
        return None if self.gate_gradient is None else self.gate_gradient.stats

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return own if self.gate_gradient is None else f"{own}, gate_gradient={self.gate_gradient!r}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # as they come: torch.nn says what is missing
        """Run as torch.nn does; in training, with a `gate_gradient`, for a backward that zeroes small gate gradients.

        Arguments and results are those of nn.LSTM and nn.GRU, (input, hx=None).

        Raises:
            BackendUnavailableError: `gate_gradient` names a backend that cannot run this layer.
        """
        if self.gate_gradient is not None and self.training and torch.is_grad_enabled():
            given = _CALL.bind(self, *args, **kwargs).arguments
            return self._train_forward(self.gate_gradient, given["input"], given.get("hx"))
        return super().forward(*args, **kwargs)

    forward.__signature__ = _CALL  # pyright: ignore[reportFunctionMemberAccess]

    def _train_forward(self, gate_gradient: GateGradientSparsity, input: Any, hx: Any) -> Any:
        x = input.data if isinstance(input, PackedSequence) else input
        states = hx if isinstance(hx, (tuple, list)) else (hx,)
        tensors = (x, *states, *self.parameters(), *self._flat_weights)
        learns = any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)
        if not learns or not isinstance(x, Tensor) or _is_only_looked_at(x) or x.numel() == 0:
            return super().forward(input, hx)
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "the replicas of nn.DataParallel cannot share a gate_gradient: use DistributedDataParallel, or None"
            )
        # torch.compile leaves torch.nn's recurrent layers alone, and has to leave this one. While it is not loaded it
        # compiles nothing; a decorator would load it with this module.
        run: Any = torch.compiler.disable(_run) if "torch._dynamo" in sys.modules else _run
        return run(self, gate_gradient, input, hx)


def _is_only_looked_at(x: Tensor) -> bool:
    """Whether the call is for shapes or for the graph of its operators, and a state has nothing to learn from it."""
    traced = torch.jit.is_tracing()  # type: ignore[reportPrivateImportUsage] - it is documented
    return x.is_meta or traced or (type(x) is not Tensor and is_fake(x))


def check_gate_gradient(value: object) -> None:
    """Raise TypeError for what cannot be a layer's gate_gradient."""
    if value is not None and not isinstance(value, GateGradientSparsity):
        got = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise TypeError(f"gate_gradient must be a GateGradientSparsity or None, got {got}")


def _run(layer: RNNBase, gate_gradient: GateGradientSparsity, input: Tensor | PackedSequence, hx: Any) -> Any:
    weights = layer.all_weights  # read once: what parametrizes one may be random
    call = read_call(input, hx, layout_of(LayerConfig.of(layer), layer.mode, weights[0][0].dtype, weights[0][0].device))
    dtype = result_dtype(call, layer.mode, weights[0][0].dtype)
    x, *states = cast([call.x, *call.states], dtype)
    for weight in (weight for one in weights for weight in one):
        check_memory("a weight", weight)
    D, ends = 2 if layer.bidirectional else 1, []
    for k in range(layer.num_layers):
        if k > 0 and layer.dropout > 0:
            x = F.dropout(x, layer.dropout)
        own = slice(k * D, k * D + D)
        h0, c0 = states[0][own], states[1][own] if layer.mode == "LSTM" else None
        x, *end = _run_layer(layer, gate_gradient, call, own.start, x, h0, c0, [cast(w, dtype) for w in weights[own]])
        ends.append(end[: len(states)])
    return call.result(x, [torch.cat(parts) for parts in zip(*ends, strict=True)])


def _run_layer(
    layer: RNNBase,
    gate_gradient: GateGradientSparsity,
    call: Call,
    first_index: int,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[list[Tensor]],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run one layer of the stack, the directions from `first_index` on; see `run_layer`."""
    mode = cast_to("Literal['LSTM', 'GRU']", layer.mode)
    batch_sizes = (h0.shape[1],) * call.shape[0] if call.batch_sizes is None else tuple(call.batch_sizes.tolist())
    five = [_with_gaps(layer, one) for one in weights]
    result = run_layer(gate_gradient, first_index, mode, x, batch_sizes, call.packed is not None, h0, c0, five)
    if gate_gradient.backend is not None:  # a user should hear of it here, and not in the middle of backward
        y, state = result[0][:, : h0.shape[2]], None if c0 is None else c0[0]
        direction = Direction(mode, Steps(batch_sizes, False), x, y, h0[0], state, *five[0], workspace=None)
        choose_backward(gate_gradient.backend, direction, gate_gradient.sparse_rule)
    return result


def _with_gaps(layer: RNNBase, weights: list[Tensor]) -> Weights:
    """Make the weights of a direction w_ih, w_hh, b_ih, b_hh, w_hr, with None for what the layer does not have."""
    bias_ih, bias_hh = weights[2:4] if layer.bias else (None, None)
    return Weights(weights[0], weights[1], bias_ih, bias_hh, weights[-1] if layer.proj_size else None)
