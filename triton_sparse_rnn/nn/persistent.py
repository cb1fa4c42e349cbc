"""What `to_sparse()` returns: recurrent layers for inference, whose weights are stored in blocks without the zeros.

The call, and what it returns, are those of nn.RNN, nn.GRU and nn.LSTM. A weight such as weight_hh_l0 is held as the
tensors of a BlockMatrix in buffers weight_hh_l0_values, _columns, _starts and, for int8, _scales; biases and weight_hr
are buffers under their own names. No other copy of a weight exists.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from triton_sparse_rnn.nn.calls import Call, CallLayout, read_call, read_step
from triton_sparse_rnn.nn.weight_storage import store_weights, warn_if_slow, weight_names
from triton_sparse_rnn.ops.dispatch import RUN_LAYER, check_backend, choose_backend, unsupported_reason
from triton_sparse_rnn.ops.layer_weights import GATES, LayerWeights, pack_layer_weights
from triton_sparse_rnn.ops.operators import is_observed, recurrent_layer, refuse_tangents
from triton_sparse_rnn.ops.validation import check_weights
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix, check_storage_dtype
from triton_sparse_rnn.sparse.blocks import check_block_size

if TYPE_CHECKING:
    from typing_extensions import Self

MATRIX_PARTS = ("values", "columns", "starts", "scales")


class _Plan(NamedTuple):
    """How layers run eagerly, until a buffer or the wanted backend is replaced."""

    asked: str | None
    dtype: torch.dtype
    buffers: list[Tensor | None]
    layers: list[list[LayerWeights]]
    backends: list[str]


class PersistentLayer(nn.Module):
    """What the three persistent modules share; see `PersistentGRU`."""

    dense_class: ClassVar[type[nn.RNNBase]]
    _said_train_changes_nothing: ClassVar[bool] = False
    _marker: Tensor

    def __init__(
        self,
        config: nn.RNNBase,
        weights: Mapping[str, BlockMatrix | Tensor],
        *,
        dtype: torch.dtype,
        backend: str | None = None,
    ) -> None:
        """Hold weights that are stored already; `from_dense` makes one from a dense layer.

        Args:
            config: a layer of the dense class; only its sizes and options are read.
            weights: one for each name of `weight_names(config)`: a BlockMatrix for weight_ih and weight_hh, a tensor
                for all others.
            dtype: of inputs and outputs.
            backend: "triton", "cpu" or "reference", or None for the fastest that fits, decided at each call.
        Raises:
            BackendUnavailableError: `backend` is named and cannot run this layer.
        """
        super().__init__()
        self.mode = config.mode
        self.input_size = config.input_size
        self.hidden_size = config.hidden_size
        self.num_layers = config.num_layers
        self.bias = config.bias
        self.batch_first = config.batch_first
        self.dropout = config.dropout
        self.bidirectional = config.bidirectional
        self.proj_size = config.proj_size
        self.backend = check_backend(backend)
        self.training = config.training
        self._plan: _Plan | None = None
        for name in weight_names(self):
            weight = weights[name]
            if isinstance(weight, BlockMatrix):
                for part in MATRIX_PARTS:
                    if (tensor := getattr(weight, part)) is not None:  # torch.export stumbles over a buffer of None
                        self.register_buffer(f"{name}_{part}", tensor)
            else:
                self.register_buffer(name, weight)
        # Follows .to() like any buffer, and so tells the dtype and device of inputs even without biases.
        marker = torch.empty(0, dtype=dtype, device=self._buffers["weight_ih_l0_values"].device)  # type: ignore[union-attr]
        self.register_buffer("_marker", marker, persistent=False)
        if backend is not None:
            self.chosen_backends()

    @classmethod
    def from_dense(
        cls,
        dense: nn.RNNBase,
        *,
        weight_dtype: torch.dtype | None = None,
        block_size: tuple[int, int] | None = None,
        backend: str | None = None,
    ) -> Self:
        """Convert a layer; it stays as it is and shares nothing with the result.

        Args:
            dense: an instance of the dense class, on any device. What is zero in its weights is not stored, wherever
                the zeros come from.
            weight_dtype: how weights are stored: torch.float32, float64, float16, bfloat16 or int8 (symmetric, one
                scale per row); None for the dtype of `dense`. Inputs, outputs and biases keep that dtype.
            block_size: (BR, BC); None takes, weight by weight, the one with the fewest bytes of 16x1, 16x4, 16x16 and
                16x32. Take the pruner's own size, or None.
            backend: "triton", "cpu" or "reference", or None for the fastest that fits, decided at each call.
        Raises:
            TypeError, ValueError: an argument is wrong, or a weight cannot be stored in weight_dtype.
            BackendUnavailableError: `backend` is named and cannot run this layer.
        """
        if not isinstance(dense, cls.dense_class):
            raise TypeError(
                f"{cls.__name__}.from_dense takes an nn.{cls.dense_class.__name__}, got {type(dense).__name__}"
            )
        check_backend(backend)
        sizes = None if block_size is None else check_block_size(block_size)
        dtype: torch.dtype = dense.weight_ih_l0.dtype  # type: ignore[assignment]
        storage = check_storage_dtype(dtype if weight_dtype is None else weight_dtype, "weight_dtype")
        persistent = cls(dense, store_weights(dense, storage, sizes), dtype=dtype, backend=backend)
        if backend is None and "reference" in (backends := persistent.chosen_backends()):
            directions = persistent._layer_weights(backends.index("reference"))
            warn_if_slow(unsupported_reason("cpu", dense.mode, dtype, persistent.device, directions))
        return persistent

    def to_dense(self) -> nn.RNNBase:
        """Return a layer of the dense class with these weights: bit for bit the original ones for an unchanged dtype.

        The one exception is -0.0 in a block that is not stored: it comes back as 0.0.
        """
        options: dict[str, Any] = {"proj_size": self.proj_size} if self.proj_size else {}
        if self.mode.startswith("RNN_"):
            options["nonlinearity"] = self.mode.removeprefix("RNN_").lower()
        dense_class: Any = self.dense_class  # its subclasses take no mode
        dense = dense_class(
            self.input_size,
            self.hidden_size,
            num_layers=self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.bidirectional,
            device="meta",
            dtype=self._marker.dtype,
            **options,
        ).to_empty(device=self._marker.device)
        dense.dropout = self.dropout
        with torch.no_grad():
            for name, weight in self.stored_weights().items():
                getattr(dense, name).copy_(weight.to_dense() if isinstance(weight, BlockMatrix) else weight)
        return dense.train(self.training)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Run over whole sequences; arguments, results and errors are those of the dense class.

        Args:
            input: x [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
            hx: h [L * D, B, H] ([L * D, H] unbatched), for an LSTM the pair (h, c); None for zeros.
        Returns:
            y [T, B, D * H] in the form of the input, and hx after the last step.
        Raises:
            RuntimeError: in a backward pass: there is none.
        """
        return self._run(read_call(input, hx, self._call_layout))

    def step(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """Advance a stream by one step.

        Args:
            x: [B, I], or [I] unbatched.
            hx: as in a call: h [L, B, H], for an LSTM the pair (h, c); None for zeros, to begin a stream.
        Returns:
            y [B, H] ([H] unbatched) and the new hx; the one that was passed in is not changed.
        Raises:
            RuntimeError: the layer is bidirectional: its second direction begins at the end of a sequence.
        """
        if self.bidirectional:
            raise RuntimeError("step() needs one direction, but this layer is bidirectional: it needs whole sequences")
        return self._run(read_step(x, hx, self._call_layout))

    def _run(self, call: Call) -> tuple[Any, Any]:
        dtype, result_dtype = self._marker.dtype, self._result_dtype(call)
        x, *states = _cast([call.x, *call.states], dtype)
        D = 2 if self.bidirectional else 1
        run_layer = self._traced_layer if is_observed(x, states) else self._eager_layer
        ends = []
        for layer in range(self.num_layers):
            layer_states = states if self.num_layers == 1 else [s[layer * D : (layer + 1) * D] for s in states]
            x, *end = run_layer(layer, x, layer_states, call.batch_sizes)
            ends.append(end)
        states = ends[0] if len(ends) == 1 else [torch.cat(parts) for parts in zip(*ends, strict=True)]
        x, *states = _cast([x, *states], result_dtype)
        return call.result(x, states)

    def _traced_layer(self, layer: int, x: Tensor, states: list[Tensor], batch_sizes: Tensor | None) -> list[Tensor]:
        """Run a layer as one operator, which whoever traces or differentiates this call sees."""
        refuse_tangents([x, *states])
        tensors = [tensor for weights in self._layer_weights(layer) for tensor in pack_layer_weights(weights)]
        return recurrent_layer(x, states, tensors, batch_sizes, self.mode, self.hidden_size, self.backend)

    def _eager_layer(self, layer: int, x: Tensor, states: list[Tensor], batch_sizes: Tensor | None) -> list[Tensor]:
        """Run a layer past the operator: its overhead is several microseconds, as much as a step of a small layer."""
        plan = self._plan
        held = self._buffers.values()
        if (
            plan is None
            or plan.asked != self.backend
            or plan.dtype != x.dtype
            or len(plan.buffers) != len(held)
            or not all(map(operator.is_, plan.buffers, held))
        ):
            layers = [self._layer_weights(layer) for layer in range(self.num_layers)]
            place = x.dtype, x.device
            for directions in layers:
                check_weights(directions, self.mode, *place)
            backends = [choose_backend(self.backend, self.mode, *place, directions) for directions in layers]
            self._plan = plan = _Plan(self.backend, x.dtype, list(held), layers, backends)
        return RUN_LAYER[plan.backends[layer]](x, states, plan.layers[layer], batch_sizes, self.mode)

    def chosen_backends(self) -> list[str]:
        """The backend that runs each layer where it is now: the named one, or the fastest that fits."""
        place = self._marker.dtype, self._marker.device
        layers = (self._layer_weights(layer) for layer in range(self.num_layers))
        return [choose_backend(self.backend, self.mode, *place, directions) for directions in layers]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast as any module does, but leave weights that are stored in a dtype of their own in it."""
        dtype = self._marker.dtype
        own = {
            name: tensor
            for name, tensor in self._buffers.items()
            if tensor is not None and (tensor.dtype != dtype or name.endswith("_scales"))
        }
        super()._apply(fn, recurse)
        for name, tensor in own.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made again at the next call."""
        return self.__dict__ | {"_plan": None}

    def _result_dtype(self, call: Call) -> torch.dtype:
        """As torch.nn under autocast: a GRU on the CPU keeps the dtype of its state, all else takes autocast's."""
        device_type = call.x.device.type
        if call.x.is_meta or not torch.is_autocast_enabled(device_type) or self._marker.dtype == torch.float64:
            return self._marker.dtype
        if device_type == "cpu" and self.mode == "GRU":
            return torch.promote_types(call.states[0].dtype, torch.get_autocast_dtype(device_type))
        return torch.get_autocast_dtype(device_type)

    @property
    def _call_layout(self) -> CallLayout:
        H, D = self.hidden_size, 2 if self.bidirectional else 1
        return CallLayout(
            name=self.dense_class.__name__,
            input_size=self.input_size,
            state_sizes=(self.proj_size or H, H) if self.mode == "LSTM" else (H,),
            layers=self.num_layers * D,
            batch_first=self.batch_first,
            dtype=self._marker.dtype,
            device=self._marker.device,
        )

    def _layer_weights(self, layer: int) -> list[LayerWeights]:
        """The weights of each direction of a layer."""
        weights = self.stored_weights(layer)
        ends = ("", "_reverse") if self.bidirectional else ("",)
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        return [LayerWeights(*(weights.get(f"{kind}_l{layer}{end}") for kind in kinds)) for end in ends]  # type: ignore[arg-type]

    def stored_weights(self, layer: int | None = None) -> dict[str, BlockMatrix | Tensor]:
        """Return all weights, or one layer's, under their names in the dense class.

        weight_ih and weight_hh are BlockMatrix, all others tensors. The tensors in them are the buffers of this module,
        not copies.
        """
        rows, hidden = GATES[self.mode] * self.hidden_size, self.proj_size or self.hidden_size
        below = hidden * (2 if self.bidirectional else 1)  # features of the layer below
        weights: dict[str, BlockMatrix | Tensor] = {}
        for name in weight_names(self, layer):
            if not name.startswith(("weight_ih", "weight_hh")):
                weights[name] = self._buffers[name]  # type: ignore[assignment]
                continue
            columns = hidden if name.startswith("weight_hh") else below
            columns = self.input_size if name.startswith("weight_ih_l0") else columns
            values, block_columns, starts, scales = (self._buffers.get(f"{name}_{part}") for part in MATRIX_PARTS)
            weights[name] = BlockMatrix(values, block_columns, starts, (rows, columns), GATES[self.mode], scales)  # type: ignore[arg-type]
        return weights

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs, outputs and biases; stored weights may be narrower."""
        return self._marker.dtype

    @property
    def device(self) -> torch.device:
        """Of all buffers, and so of inputs."""
        return self._marker.device

    @property
    def density(self) -> float:
        """Stored weights of weight_ih and weight_hh, zeros inside stored blocks too, as a fraction of all."""
        matrices = [weight for weight in self.stored_weights().values() if isinstance(weight, BlockMatrix)]
        return sum(m.density * math.prod(m.shape) for m in matrices) / sum(math.prod(m.shape) for m in matrices)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored weights and indices."""
        return sum(weight.nbytes for weight in self.stored_weights().values())

    def flatten_parameters(self) -> None:
        """Do nothing: there is nothing to flatten. Here because code written for nn.RNN calls it."""

    def train(self, mode: bool = True) -> Self:
        """Set the flag that nn.Module.train sets; it changes nothing here, and a warning says so, once."""
        if mode and not PersistentLayer._said_train_changes_nothing:
            PersistentLayer._said_train_changes_nothing = True
            warnings.warn(
                f"{type(self).__name__} is for inference: train() changes nothing, dropout stays off and there is no "
                "backward",
                stacklevel=2,
            )
        return super().train(mode)

    def extra_repr(self) -> str:
        """Show what nn.RNNBase shows, and how the weights are stored."""
        matrices = [weight for weight in self.stored_weights().values() if isinstance(weight, BlockMatrix)]
        sizes = sorted({matrix.block_size for matrix in matrices})
        options = {
            "proj_size": (self.proj_size, 0),
            "num_layers": (self.num_layers, 1),
            "bias": (self.bias, True),
            "batch_first": (self.batch_first, False),
            "dropout": (self.dropout, 0),
            "bidirectional": (self.bidirectional, False),
        }
        changed = [f"{name}={value}" for name, (value, default) in options.items() if value != default]
        stored = [
            f"density={self.density:.3f}",
            f"block_size={sizes[0] if len(sizes) == 1 else sizes}",
            f"weight_dtype={matrices[0].values.dtype}",
            f"nbytes={self.nbytes}",
            f"backend={'/'.join(sorted(set(self.chosen_backends())))!r}",
        ]
        return ", ".join([str(self.input_size), str(self.hidden_size), *changed, *stored])


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]  # to() alone takes its time


class PersistentRNN(PersistentLayer):
    """nn.RNN for inference with block-sparse weights, tanh or relu; see `PersistentGRU`."""

    dense_class = nn.RNN

    @property
    def nonlinearity(self) -> str:
        """'tanh' or 'relu'."""
        return self.mode.removeprefix("RNN_").lower()


class PersistentGRU(PersistentLayer):
    """nn.GRU for inference with block-sparse weights: the same call, the same results, what is zero is not computed.

    It has the sizes and options of nn.GRU as attributes, but no parameters and no backward. A block that is not stored
    does not read its input, so NaN and infinity travel along stored weights only.

    >>> gru = nn.GRU(4, 8)
    >>> with torch.no_grad():
    ...     _ = gru.weight_ih_l0.zero_(), gru.weight_hh_l0[:, 2:].zero_()
    >>> fast = PersistentGRU.from_dense(gru)
    >>> x = torch.randn(5, 2, 4)
    >>> torch.allclose(fast(x)[0], gru(x)[0], atol=1e-6)
    True
    >>> y_t, h = fast.step(x[0])  # one step of a stream: x_t [B, I]
    """

    dense_class = nn.GRU


class PersistentLSTM(PersistentLayer):
    """nn.LSTM for inference with block-sparse weights; states are pairs (h, c). See `PersistentGRU`."""

    dense_class = nn.LSTM


PERSISTENT_CLASSES: dict[type[nn.RNNBase], type[PersistentLayer]] = {
    cls.dense_class: cls for cls in (PersistentRNN, PersistentGRU, PersistentLSTM)
}
