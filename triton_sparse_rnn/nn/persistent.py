"""What `to_sparse()` returns: recurrent layers for inference, whose weights are stored in blocks without the zeros.

The call, and what it returns, are those of nn.RNN, nn.GRU and nn.LSTM. A weight such as weight_hh_l0 is held as the
tensors of a BlockMatrix in buffers weight_hh_l0_values, _columns, _starts and, for int8, _scales; biases, and each
weight_ih that was kept dense, are buffers under their own names. No other copy of a weight exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from triton_sparse_rnn.nn.independent_copy import copy_with_replacements
from triton_sparse_rnn.nn.instance_state import check_nothing_is_lost, own_tensors
from triton_sparse_rnn.nn.persistent_classes import PERSISTENT_CLASSES, shown_name
from triton_sparse_rnn.nn.persistent_repr import shown_options
from triton_sparse_rnn.nn.persistent_tools import PersistentTools
from triton_sparse_rnn.nn.plan import Plan, count_writes, make_plan
from triton_sparse_rnn.nn.weight_storage import (
    from_buffers,
    store_weights,
    stored_density,
    to_buffers,
    warn_if_slow,
    weight_names,
)
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
from triton_sparse_rnn.ops.dispatch import check_backend, choose_backend, unsupported_reason
from triton_sparse_rnn.ops.flop_counting import count_in_active_modes
from triton_sparse_rnn.ops.layer_weights import LayerWeights, RunLayer
from triton_sparse_rnn.ops.operators import is_observed, traced_layer
from triton_sparse_rnn.ops.validation import check_activation_dtype, check_num_threads
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix, check_storage_dtype
from triton_sparse_rnn.sparse.patterns import PatternLike, as_pattern

if TYPE_CHECKING:
    from typing_extensions import Self


class PersistentLayer(PersistentTools):
    """What the three persistent modules share; see `PersistentGRU`. Layers of `dense_class` are converted to it."""

    dense_class: ClassVar[type[nn.RNNBase]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "dense_class" in vars(cls):
            PERSISTENT_CLASSES[cls.dense_class] = cls

    def __init__(
        self,
        config: nn.RNNBase,
        weights: Mapping[str, BlockMatrix | Tensor],
        *,
        dtype: torch.dtype,
        backend: str | None = None,
        activation_dtype: torch.dtype | None = None,
        num_threads: int = 1,
    ) -> None:
        """Hold weights that are stored already; `from_dense` makes one from a dense layer.

        Args:
            config: a layer of the dense class; only its sizes and options are read.
            weights: one for each name of `weight_names(config)`: a BlockMatrix for weight_hh and weight_hr, that or a
                tensor of `dtype` for weight_ih, a tensor for biases.
            dtype: of inputs and outputs.
            backend, activation_dtype, num_threads: as for `from_dense`.
        Raises:
            TypeError, ValueError: an argument is wrong.
            BackendUnavailableError: `backend` is named and cannot run this layer.
        """
        super().__init__()
        self.mode = config.mode
        # torch.nn takes numpy's numbers too, and keeps them
        self.input_size = int(config.input_size)
        self.hidden_size = int(config.hidden_size)
        self.num_layers = int(config.num_layers)
        self.bias = bool(config.bias)
        self.batch_first = bool(config.batch_first)
        self.dropout = config.dropout
        self.bidirectional = bool(config.bidirectional)
        self.proj_size = int(config.proj_size)
        self.backend = check_backend(backend)
        self.activation_dtype = activation_dtype
        self.num_threads = check_num_threads(num_threads)
        self.training = config.training
        self._plan: Plan | None = None
        for name in weight_names(self):
            weight = weights[name]
            if isinstance(weight, BlockMatrix):
                check_activation_dtype(activation_dtype, weight.values.dtype)
            elif name.startswith(("weight_hh", "weight_hr")):
                raise TypeError(f"{name} must be a BlockMatrix, got {type(weight).__name__}")
            for buffer, tensor in to_buffers(name, weight).items():
                self.register_buffer(buffer, tensor)
        count_writes(self._buffers, self._buffers.keys())
        # Follows .to() like any buffer, and so tells the dtype and device of inputs even without biases.
        device = self._buffers["weight_hh_l0_values"].device  # type: ignore[union-attr]
        self.register_buffer("_marker", torch.empty(0, dtype=dtype, device=device), persistent=False)
        if backend is not None:
            self.chosen_backends()

    @classmethod
    def from_dense(
        cls,
        dense: nn.RNNBase,
        *,
        weight_dtype: torch.dtype | None = None,
        storage: PatternLike | None = None,
        backend: str | None = None,
        activation_dtype: torch.dtype | None = None,
        num_threads: int = 1,
    ) -> Self:
        """Convert a layer; it stays as it is and shares nothing with the result.

        What was added to it is taken over: hooks, and copies of parameters, buffers, modules and attributes. Put in the
        layer's place, as in `model.rnn = PersistentGRU.from_dense(model.rnn)`, it costs no copy of the rest of the
        model, as to_sparse(model) does.

        Args:
            dense: an instance of the dense class, on any device. What is zero in its weights is not stored, wherever
                the zeros come from. A weight_ih that was not pruned stays an ordinary matrix, multiplied by torch on
                its own threads, unless weight_dtype is another than its own or `storage` has blocks of 16 rows or more.
                weight_hr of an LSTM, which a Pruner prunes only on request, goes to blocks too.
            weight_dtype: how weights are stored: torch.float32, float64, float16, bfloat16 or int8 (symmetric, one
                scale per row); None for the dtype of `dense`. Inputs, outputs and biases keep that dtype. On "cpu" the
                scale of int8 is applied to a sum of integers times inputs: that must stay below 3.4e38, which it does
                while the absolute inputs of a step add up to less than 2.6e36.
            storage: the `Blocks` in which weights are stored, or a pair (BR, BC) for them; None takes, weight by
                weight, those with the fewest bytes of 16x1, 16x4, 16x16 and 16x32. Take the pruner's own pattern, or
                None. Blocks of 16 rows or more hold for dense weights too: on one thread of a CPU the kernel for
                blocks is faster than torch even where all of them are stored.
            backend: "triton" (NVIDIA GPUs; not int8, float64 or proj_size), "cpu" (not float64) or "reference", or None
                for the fastest that fits, decided at each call.
            activation_dtype: torch.int8, with weight_dtype=torch.int8, rounds the inputs of every product to 8 bits,
                one scale for each row of x and h at each step (ops/reference.py has the equations): faster, and less
                exact. NaN or infinity in a row then reaches every unit. None keeps activations as they are.
            num_threads: how many threads share the recurrence on backend "cpu"; "reference" takes those of torch, and
                "triton" has none. More than 1 pays for large H on cores that are free.
        Raises:
            TypeError, ValueError: an argument is wrong, a weight cannot be stored in weight_dtype, or what was added
                to the layer cannot be copied or taken over, such as a `forward` that was set on the layer itself.
            BackendUnavailableError: `backend` is named and cannot run this layer.
        """
        if not isinstance(dense, cls.dense_class):
            wanted = shown_name(cls.dense_class)
            raise TypeError(f"{cls.__name__}.from_dense takes a layer of class {wanted}, got {type(dense).__name__}")
        check_nothing_is_lost(dense, cls)
        check_backend(backend)
        check_num_threads(num_threads)
        sizes = None if storage is None else as_pattern(storage, "storage").block_size
        dtype: torch.dtype = dense.weight_ih_l0.dtype  # type: ignore[assignment]
        stored_dtype = check_storage_dtype(dtype if weight_dtype is None else weight_dtype, "weight_dtype")
        check_activation_dtype(activation_dtype, stored_dtype)
        weights = store_weights(dense, stored_dtype, sizes)
        options = {"backend": backend, "activation_dtype": activation_dtype, "num_threads": num_threads}
        persistent = cls(dense, weights, dtype=dtype, **options)
        if backend is None and "reference" in (backends := persistent.chosen_backends()):
            directions = persistent._layer_weights(backends.index("reference"))
            place = dense.mode, dtype, persistent.device
            wanted = "triton" if persistent.device.type == "cuda" else "cpu"
            warn_if_slow(wanted, unsupported_reason(wanted, *place, directions, activation_dtype))
        copy_with_replacements(dense, {"": persistent})
        return persistent

    def to_dense(self) -> nn.RNNBase:
        """Return a layer of the dense class with these weights: bit for bit the original ones for an unchanged dtype.

        The one exception is -0.0 in a block that is not stored: it comes back as 0.0. What was added to this layer is
        taken over as `from_dense` does.

        Raises:
            TypeError, ValueError: what was added cannot be copied or taken over, or indices of blocks are wrong.
        """
        check_nothing_is_lost(self, self.dense_class)
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
            dtype=self.dtype,
            **options,
        ).to_empty(device=self.device)
        dense.dropout = self.dropout
        with torch.no_grad():
            for name, weight in self.stored_weights().items():
                if isinstance(weight, BlockMatrix):
                    weight.check()  # somebody may have written into its indices
                    weight = weight.to_dense()
                getattr(dense, name).copy_(weight)
        copy_with_replacements(self, {"": dense.train(self.training)})
        return dense

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
        batch_axis = 0 if self.batch_first else 1
        if plan is None or (states := plan.plain_states(self, input, hx, 3, batch_axis)) is None:
            recorded = self._recorded("forward", input, hx)
            return self._run(read_call(input, hx, self._call_layout)) if recorded is None else recorded
        assert isinstance(input, Tensor)
        x = input.transpose(0, 1) if self.batch_first else input
        T, B, I = x.shape
        y, *ends = run_layers(plan.layers, x.reshape(T * B, I), states, None)
        y = y.view(T, B, y.shape[1])
        return y.transpose(0, 1) if self.batch_first else y, ends[0] if len(ends) == 1 else tuple(ends)

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
        if self.bidirectional:
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
        one; on a GPU other batch sizes may take other kernels, so call the layer once with each. For a whole model:

            for module in model.modules():
                if hasattr(module, "warm_up"):
                    module.warm_up()
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
        options: dict[str, Any] = {name: getattr(self, name) for name in ("backend", "activation_dtype", "num_threads")}
        return [
            traced_layer(self.mode, self.hidden_size, self._layer_weights(layer), **options)
            for layer in range(self.num_layers)
        ]

    def _eager_layers(self) -> list[RunLayer]:
        """Layers without the operator, which takes several microseconds, as much as a step of a small layer."""
        plan = self._plan
        if plan is None or not plan.holds(self):
            self._plan = plan = make_plan(self)
        return plan.layers

    def chosen_backends(self) -> list[str]:
        """The backend that runs each layer where it is now: the named one, or the fastest that fits."""
        place = self.mode, self.dtype, self.device
        layers = (self._layer_weights(layer) for layer in range(self.num_layers))
        return [choose_backend(self.backend, *place, directions, self.activation_dtype) for directions in layers]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast as any module does, but leave blocks that are stored in a dtype of their own in it."""
        dtype, names = self._marker.dtype, own_tensors(self)
        own = {
            name: tensor
            for name, tensor in self._buffers.items()
            if name in names and tensor is not None and (tensor.dtype != dtype or name.endswith("_scales"))
        }
        super()._apply(fn, recurse)
        for name, tensor in own.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        self._plan = None  # share_memory() moves what the same tensors hold
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load, and look at the weights anew: indices may have been written into the tensors that were checked."""
        before = dict(self._buffers)
        super()._load_from_state_dict(*args, **kwargs)
        self._follow_assigned(before)
        self._plan = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made again at the next call."""
        return self.__dict__ | {"_plan": None}

    @property
    def _call_layout(self) -> CallLayout:
        return layout_of(self, self.dense_class.__name__, self.dtype, self.device)

    def _layer_weights(self, layer: int) -> list[LayerWeights]:
        """The weights of each direction of a layer."""
        weights = self.stored_weights(layer)
        ends = ("", "_reverse") if self.bidirectional else ("",)
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        return [LayerWeights(*(weights.get(f"{kind}_l{layer}{end}") for kind in kinds)) for end in ends]  # type: ignore[arg-type]

    def stored_weights(self, layer: int | None = None) -> dict[str, BlockMatrix | Tensor]:
        """Return all weights, or one layer's, under their names in the dense class.

        weight_hh and weight_hr are BlockMatrix, and so is weight_ih unless it was kept dense; the others are tensors.
        The tensors in them are the buffers of this module, not copies.
        """
        return {name: from_buffers(self, name, self._buffers) for name in weight_names(self, layer)}

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs, outputs and biases; stored weights may be narrower."""
        return self._buffers["_marker"].dtype  # type: ignore[union-attr] - quicker than self._marker

    @property
    def device(self) -> torch.device:
        """Of all buffers, and so of inputs."""
        return self._buffers["weight_hh_l0_values"].device  # type: ignore[union-attr]

    @property
    def density(self) -> float:
        """Stored weights of all matrices, zeros inside stored blocks too, as a fraction of all."""
        return stored_density(self.stored_weights())

    @property
    def nbytes(self) -> int:
        """Bytes of all stored weights and indices."""
        return sum(weight.nbytes for weight in self.stored_weights().values())

    def extra_repr(self) -> str:
        """Show what nn.RNNBase shows, and how the weights are stored and run."""
        return shown_options(self)


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
    does not read its input, so NaN and infinity travel along stored weights only. On backend "triton" they travel along
    16 x 1 blocks: of stored blocks of fewer rows, the rest of the 16 units reads the same input, times zero.

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
