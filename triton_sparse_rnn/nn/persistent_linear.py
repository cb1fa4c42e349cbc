"""Linear layers for inference, whose weights are stored without the zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from triton_sparse_rnn.nn.conversion_options import ConversionOptions, shows_options
from triton_sparse_rnn.nn.linear_layers import is_linear
from triton_sparse_rnn.nn.linear_plan import LinearPlan, make_linear_plan
from triton_sparse_rnn.nn.linear_storage import store_linear
from triton_sparse_rnn.nn.persistent_module import PersistentModule, shown_name
from triton_sparse_rnn.nn.storage import describe_storage, from_buffers
from triton_sparse_rnn.ops.calls import cast
from triton_sparse_rnn.ops.dispatch import choose_linear_backend, linear_reason
from triton_sparse_rnn.ops.flop_counting import count_in_active_modes
from triton_sparse_rnn.ops.linear_calls import LinearLayout, check_channels, check_features, linear_result_dtype
from triton_sparse_rnn.ops.linear_operator import traced_linear
from triton_sparse_rnn.ops.operators import is_observed
from triton_sparse_rnn.ops.stored_linear import StoredLinear
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.linear_config import LinearConfig
from triton_sparse_rnn.sparse.patterns import Pattern

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class PersistentLinear(PersistentModule):
    """For inference, sparse in memory: nn.Linear from stored weights alone: what is zero is neither held nor computed.

    The call and the result are those of nn.Linear. It has no parameters and no backward; `weight` is a BlockMatrix, and
    `bias` a tensor or None. NaN and infinity travel along stored weights only, as `PersistentGRU` says.

    >>> linear = nn.Linear(4, 8)
    >>> with torch.no_grad():
    ...     _ = linear.weight[:, 1:].zero_()
    >>> fast = PersistentLinear.from_dense(linear)
    >>> x = torch.randn(5, 2, 4)
    >>> torch.allclose(fast(x), linear(x), atol=1e-6)
    True
    """

    dense_class: ClassVar[type[Any]] = nn.Linear
    _matrix: ClassVar[str] = "weight"
    _config: LinearConfig
    _plan: LinearPlan | None
    bias: Tensor | None

    def __init__(self, config: LinearConfig, weights: Any, *, dtype: torch.dtype, **options: Any) -> None:
        """Hold weights that are stored already; `from_dense` makes one from a dense layer.

        Args:
            config: of the dense layer.
            weights: a BlockMatrix as "weight", and a tensor of `dtype` as "bias" if the layer has one.
            dtype: of inputs and outputs.
            options: backend, activation_dtype and num_threads, as for `from_dense`.
        Raises:
            TypeError, ValueError: an argument is wrong.
            BackendUnavailableError: `backend` is named and cannot run this layer.
        """
        super().__init__(config, weights, dtype=dtype, **options)
        if not config.bias:
            self.register_buffer("bias", None)

    @classmethod
    @shows_options
    def from_dense(cls, dense: nn.Module, **options: Unpack[ConversionOptions]) -> Self:
        """Convert a layer; it stays as it is and shares nothing with the result.

        What was added to it is taken over, as by `PersistentGRU.from_dense`. The weight is stored in any case; whether
        that is faster is asked by `to_sparse`, for layers that it finds in a model.

        Args:
            dense: an nn.Linear, on any device. What is zero in its weight is not stored.
            weight_dtype: how the weight is stored: torch.float32, float64, float16, bfloat16 or int8 (symmetric, one
                scale per row); None for the dtype of `dense`. Inputs, outputs and bias keep that dtype.
            storage: the `Picks` or `Blocks` in which the weight is stored, or a pair (BR, BC) for blocks; None takes
                what is the fastest by an estimate (nn/storage_choice.py).
            backend: "triton" (NVIDIA GPUs; not int8 or float64), "cpu" (not float64) or "reference", or None
                for the fastest that fits, decided at each call.
            activation_dtype: torch.int8, with weight_dtype=torch.int8, rounds each vector x to 8 bits with one scale
                (equations: ops/backends/reference.py). None keeps activations as they are.
            num_threads: how many threads share a large product on backend "cpu".
        Raises:
            TypeError, ValueError: an argument is wrong, the weight cannot be stored in weight_dtype, or what was added
                to the layer cannot be copied or taken over.
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
        if not is_linear(dense):
            raise ValueError(
                f"a layer must compute W x + b of whole vectors x, with sizes of at least 1, to become a "
                f"{cls.__name__}, and this {shown_name(type(dense))} does not: {dense.extra_repr()}"
            )
        return store_linear(dense, dtype, pattern, backend=backend, activation_dtype=activation_dtype)

    @property
    def in_features(self) -> int:
        """The last axis of inputs."""
        return self._config.in_features

    @property
    def out_features(self) -> int:
        """The last axis of outputs."""
        return self._config.out_features

    @property
    def weight(self) -> BlockMatrix:
        """The weight [out_features, in_features]; its tensors are the buffers of this module, not copies."""
        return from_buffers(self._config, "weight", self._buffers)  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        """Compute W x + b for each vector of the last axis; errors are those of nn.Linear.

        Args:
            input: x [..., in_features].
        Returns:
            y [..., out_features].
        Raises:
            RuntimeError: in a backward pass: there is none.
        """
        plan = None if is_compiling() else self._plan
        if plan is not None and plan.takes(self, input):
            return plan.layers[0](input)
        recorded = self._recorded("forward", input)
        if recorded is not None:
            return recorded
        check_features(input, self._linear_layout)
        return self._run(input)

    def warm_up(self) -> None:
        """Do now what the first call would do besides: check and prepare the weight, and compile kernels.

        It is done for one row and for several; on a GPU other numbers of rows may take other kernels.
        """
        with torch.inference_mode():
            for rows in (1, 2):
                self._run(torch.zeros(rows, self._config.in_features, dtype=self.dtype, device=self.device))

    def _run(self, x: Tensor) -> Tensor:
        """Run a checked x [..., in_features]."""
        (wide,) = cast([x], self.dtype)
        if is_observed(wide, []):
            if not is_compiling():
                count_in_active_modes()
            run = traced_linear(self._layer(), backend=self.backend, num_threads=self.num_threads)
        else:
            plan = self._plan
            if plan is None or not plan.holds(self):
                self._plan = plan = make_linear_plan(self)
            (run,) = plan.layers
        return cast([run(wide)], linear_result_dtype(x, self.dtype))[0]

    def chosen_backends(self) -> list[str]:
        """The backend that runs it where it is now: the named one, or the fastest that fits."""
        return [choose_linear_backend(self.backend, self._layer())]

    def _reason_against(self, backend: str) -> str | None:
        return linear_reason(backend, self._layer())

    def _layer(self) -> StoredLinear:
        """The layer as backends are asked for it."""
        return StoredLinear(self.weight, self._buffers.get("bias"), self.dtype, self.device, self.activation_dtype)

    @property
    def _linear_layout(self) -> LinearLayout:
        return LinearLayout(self._config.in_features, self._config.out_features, self.dtype, self.device)

    def extra_repr(self) -> str:
        """Show what nn.Linear shows, and how the weight is stored and run."""
        return ", ".join([*self._shown_sizes(), *self._shown_storage()])

    def _shown_sizes(self) -> list[str]:
        config = self._config
        return [f"in_features={config.in_features}", f"out_features={config.out_features}", f"bias={config.bias}"]

    def _shown_storage(self) -> list[str]:
        shown = [] if self.activation_dtype is None else [f"activation_dtype={self.activation_dtype}"]
        shown += [] if self.num_threads == 1 else [f"num_threads={self.num_threads}"]
        return [*shown, *describe_storage(self.stored_weights()), f"backend={self.chosen_backends()[0]!r}"]


class PersistentConv1d(PersistentLinear):
    """For inference, sparse in memory: an nn.Conv1d of kernel size 1, which is an nn.Linear of each step.

    Of stride 1, without padding and groups. See `PersistentLinear`, whose sizes are in_channels and out_channels here.

    >>> conv = nn.Conv1d(4, 8, 1)
    >>> with torch.no_grad():
    ...     _ = conv.weight[:, 1:].zero_()
    >>> PersistentConv1d.from_dense(conv)(torch.zeros(2, 4, 5)).shape
    torch.Size([2, 8, 5])
    """

    dense_class: ClassVar[type[Any]] = nn.Conv1d

    @property
    def in_channels(self) -> int:
        """Channels of inputs."""
        return self._config.in_features

    @property
    def out_channels(self) -> int:
        """Channels of outputs."""
        return self._config.out_features

    def forward(self, input: Tensor) -> Tensor:
        """Compute W x + b for the channels x of each step; errors are those of nn.Conv1d.

        Args:
            input: [B, in_channels, T], or [in_channels, T] unbatched.
        Returns:
            [B, out_channels, T], or [out_channels, T].
        Raises:
            RuntimeError: in a backward pass: there is none.
        """
        recorded = self._recorded("forward", input)
        if recorded is not None:
            return recorded
        check_channels(input, self._linear_layout)
        return self._run(input.transpose(-1, -2)).transpose(-1, -2).contiguous()

    def _shown_sizes(self) -> list[str]:
        config = self._config
        shown = [str(config.in_features), str(config.out_features), "kernel_size=(1,)", "stride=(1,)"]
        return shown if config.bias else [*shown, "bias=False"]
