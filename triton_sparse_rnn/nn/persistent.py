"""What `to_sparse()` returns: recurrent layers for inference, whose weights are stored without the zeros.

The call, and what it returns, are those of nn.RNN, nn.GRU and nn.LSTM. No other copy of a weight exists than the
stored one (persistent_weights.py); what kernels derive from indices lies beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from triton_sparse_rnn.nn.conversion_options import ConversionOptions, shows_options
from triton_sparse_rnn.nn.plan import Plan, make_plan
from triton_sparse_rnn.nn.recurrent_tools import RecurrentTools
from triton_sparse_rnn.nn.storage import describe_storage, layer_weights, store_weights
from triton_sparse_rnn.notices import warn
from triton_sparse_rnn.ops.calls import (
    Call,
    CallLayout,
    cast,
    layout_of,
    read_call,
    read_step,
    result_dtype,
    run_layers,
)
from triton_sparse_rnn.ops.dispatch import choose_backend, unsupported_reason
from triton_sparse_rnn.ops.flop_counting import count_in_active_modes
from triton_sparse_rnn.ops.layer_weights import RunLayer, StoredLayer
from triton_sparse_rnn.ops.operators import is_observed, traced_layer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.patterns import Pattern

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class PersistentLayer(RecurrentTools):
    """What the three recurrent modules share; see `PersistentGRU`."""

    dense_class: ClassVar[type[nn.RNNBase]]
    _plan: Plan | None

    @classmethod
    @shows_options
    def from_dense(cls, dense: nn.RNNBase, **options: Unpack[ConversionOptions]) -> Self:
        """Convert a layer; it stays as it is and shares nothing with the result.

        What was added to it is taken over: hooks, and copies of parameters, buffers, modules and attributes. Put in the
        layer's place, as in `model.rnn = PersistentGRU.from_dense(model.rnn)`, it costs no copy of the rest of the
        model, as to_sparse(model) does.

        Args:
            dense: an instance of the dense class, on any device. What is zero in its weights is not stored, wherever
                the zeros come from. A weight_ih that was not pruned stays an ordinary matrix, multiplied by torch on
                its own threads, unless weight_dtype is another than its own or `storage` names a pattern of 16 rows or
                more. weight_hr of an LSTM, which a Pruner prunes only on request, is stored like weight_hh.
            weight_dtype: how weights are stored: torch.float32, float64, float16, bfloat16 or int8 (symmetric, one
                scale per row); None for the dtype of `dense`. Inputs, outputs and biases keep that dtype. On "cpu" the
                scale of int8 is applied to a sum of integers times inputs: that must stay below 3.4e38, which it does
                while the absolute inputs of a step add up to less than 2.6e36.
            storage: the `Picks` or `Blocks` in which weights are stored, or a pair (BR, BC) for blocks; None takes,
                weight by weight, what is the fastest by an estimate (nn/storage_choice.py): picks, blocks or, for
                weight_ih, an ordinary matrix. Picks hold any zeros, blocks only skip those that fill one. A pattern
                of 16 rows or more that is named holds for dense weights too: on one thread of a CPU the kernel for
                blocks is faster than torch even where all of them are stored.
            backend: "triton" (NVIDIA GPUs; not int8, float64 or proj_size), "cpu" (not float64) or "reference", or None
                for the fastest that fits, decided at each call.
            activation_dtype: torch.int8, with weight_dtype=torch.int8, rounds the inputs of every product to 8 bits,
                one scale for each row of x and h at each step (equations: ops/backends/reference.py): faster, and less
                exact. NaN or infinity in a row then reaches every unit. None keeps activations as they are.
            num_threads: how many threads share the recurrence on backend "cpu"; "reference" takes those of torch, and
                "triton" has none. More than 1 pays for large H on cores that are free.
        Raises:
            TypeError, ValueError: an argument is wrong, a weight cannot be stored in weight_dtype, or what was added
                to the layer cannot be copied or taken over, such as a `forward` that was set on the layer itself.
            BackendUnavailableError: `backend` is named and cannot run this layer.
        """
        return cls._converted(dense, options)

    @classmethod
    def _store(
        cls,
        dense: Any,
        dtype: torch.dtype,
        pattern: Pattern | None,
        *,
        backend: str | None,
        activation_dtype: torch.dtype | None,
    ) -> dict[str, BlockMatrix | Tensor]:
        return store_weights(dense, dtype, pattern, backend=backend, activation_dtype=activation_dtype)

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
        plan = None if is_compiling() else self._plan
        batch_first = self._config.batch_first
        if plan is None or (states := plan.plain_states(self, input, hx, 3, 0 if batch_first else 1)) is None:
            recorded = self._recorded("forward", input, hx)
            return self._run(read_call(input, hx, self._call_layout)) if recorded is None else recorded
        assert isinstance(input, Tensor)
        x = input.transpose(0, 1) if batch_first else input
        T, B, I = x.shape
        y, *ends = run_layers(plan.layers, x.reshape(T * B, I), states, None)
        y = y.view(T, B, y.shape[1])
        return y.transpose(0, 1) if batch_first else y, ends[0] if len(ends) == 1 else tuple(ends)

    def step(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """Advance a stream by one step.

        Args:
            x: [B, I], or [I] unbatched.
            hx: as in a call: h [L, B, H], for an LSTM the pair (h, c); None for zeros, to begin a stream.
        Returns:
            y [B, H] ([H] unbatched) and the new hx; the one that was passed in is not changed.
        Raises:
            RuntimeError: the layer is bidirectional: its second direction begins at the end of a sequence.
        Warns:
            UserWarning: the layer has forward hooks. They belong to calls; here they do not run.
        """
        if self._config.bidirectional:
            raise RuntimeError("step() needs one direction, but this layer is bidirectional: it needs whole sequences")
        if (self._forward_pre_hooks or self._forward_hooks) and not is_compiling():
            warn(
                f"step() of this {type(self).__name__} does not run its forward hooks, as a call does: do what they do "
                "in the loop that calls step(), or take them off"
            )
        plan = None if is_compiling() else self._plan
        if plan is None or (states := plan.plain_states(self, x, hx, 2, 0)) is None:
            recorded = self._recorded("step", x, hx)
            return self._run(read_step(x, hx, self._call_layout)) if recorded is None else recorded
        y, *ends = run_layers(plan.layers, x, states, None)
        return y, ends[0] if len(ends) == 1 else tuple(ends)

    def warm_up(self) -> None:
        """Do now what the first call would do besides: check and prepare the weights, and compile kernels.

        Compiling takes up to seconds, which a service should not spend on its first request. It is done for batches of
        one; on a GPU other batch sizes may take other kernels, so call the layer once with each. For a whole model
        there is `triton_sparse_rnn.warm_up`.
        """
        with torch.inference_mode():
            for steps in (1, 2):  # on a GPU these are different kernels
                shape = (1, steps, self.input_size) if self.batch_first else (steps, 1, self.input_size)
                self.forward(torch.zeros(shape, dtype=self.dtype, device=self.device))

    def _run(self, call: Call) -> tuple[Any, Any]:
        x, *states = cast([call.x, *call.states], self.dtype)
        layers = self._traced_layers() if is_observed(x, states) else self._eager_layers()
        results = run_layers(layers, x, states, call.batch_sizes)
        y, *ends = cast(results, result_dtype(call, self.mode, self.dtype))
        return call.result(y, ends)

    def _traced_layers(self) -> list[RunLayer]:
        if not is_compiling():
            count_in_active_modes()
        options: dict[str, Any] = {"backend": self.backend, "num_threads": self.num_threads}
        return [traced_layer(layer, self._config.hidden_size, **options) for layer in self._layers()]

    def _eager_layers(self) -> list[RunLayer]:
        """Layers without the operator, which takes several microseconds, as much as a step of a small layer."""
        plan = self._plan
        if plan is None or not plan.holds(self):
            self._plan = plan = make_plan(self)
        return plan.layers

    def chosen_backends(self) -> list[str]:
        """The backend that runs each layer where it is now: the named one, or the fastest that fits."""
        return [choose_backend(self.backend, layer) for layer in self._layers()]

    def _reason_against(self, backend: str) -> str | None:
        return next(filter(None, (unsupported_reason(backend, layer) for layer in self._layers())), None)

    def _layers(self) -> list[StoredLayer]:
        """Each layer, as backends are asked for it."""
        config, place = self._config, (self.dtype, self.device, self.activation_dtype)
        weights = (layer_weights(config, self._buffers, layer) for layer in range(config.num_layers))
        return [StoredLayer(config.mode, directions, *place) for directions in weights]

    @property
    def _call_layout(self) -> CallLayout:
        return layout_of(self._config, self.dense_class.__name__, self.dtype, self.device)

    def extra_repr(self) -> str:
        """Show what nn.RNNBase shows, and how the weights are stored and run."""
        shown = self._config.shown()
        shown += [] if self.activation_dtype is None else [f"activation_dtype={self.activation_dtype}"]
        shown += [] if self.num_threads == 1 else [f"num_threads={self.num_threads}"]
        shown += describe_storage(self.stored_weights())
        shown.append(f"backend={self.backend or '/'.join(sorted(set(self.chosen_backends())))!r}")
        if self._plan is not None and self._plan.holds(self):
            shown += [f"kernels={text!r}" for text in self._plan.descriptions()]
        return ", ".join(shown)


class PersistentRNN(PersistentLayer):
    """For inference, sparse in memory: nn.RNN from stored weights, tanh or relu. See `PersistentGRU`."""

    dense_class = nn.RNN

    @property
    def nonlinearity(self) -> str:
        """'tanh' or 'relu'."""
        return self.mode.removeprefix("RNN_").lower()


class PersistentGRU(PersistentLayer):
    """For inference, sparse in memory: nn.GRU from stored weights alone: what is zero is neither held nor computed.

    The call and the results are those of nn.GRU. It has its sizes and options as attributes, but no parameters and no
    backward. What is not stored does not read its input, so NaN and infinity travel along stored weights only, with two
    exceptions. Picks are filled up with zeros where hidden units of a unit group have fewer weights in a bank than
    others, which the picks of a `Pruner` hardly ever need. Such a zero reads an input that its unit reads anyway, so
    that infinity there gives NaN; or, if the unit has no weight in this bank, one that another unit reads. On backend
    "triton" NaN and infinity travel along 16 x 1 blocks: of stored blocks of fewer rows, the rest of the 16 units reads
    the same input, times zero.

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
    """For inference, sparse in memory: nn.LSTM from stored weights; states are pairs (h, c). See `PersistentGRU`."""

    dense_class = nn.LSTM
