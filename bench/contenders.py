"""Who is timed: PyTorch's own layer and ours. What users would pick instead is in peers.py."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bench.budgets import assert_within_budget
from bench.workloads import Workload, pattern_name
from triton_sparse_rnn import PersistentGRU, PersistentLSTM, PersistentRNN
from triton_sparse_rnn.sparse.patterns import Pattern

PERSISTENT = {"GRU": PersistentGRU, "LSTM": PersistentLSTM, "RNN": PersistentRNN}


class Contender(Protocol):
    """A way to run a layer; `str` of it names the benchmark."""

    @property
    def precision(self) -> str:
        """The arithmetic that its result is held to: float32 or a key of budgets.ROUNDINGS."""
        ...

    def name(self, work: Workload) -> str:
        """Its name in the table."""
        ...

    def prepare(self, work: Workload) -> tuple[Workload, Callable[[], Any]]:
        """Do all that a user does once. Returns the workload whose result is expected and the call that is timed.

        The call returns y [T, B, H] as a tensor or a numpy array.
        """
        ...


def measure(benchmark, work: Workload, contender: Contender) -> None:
    """Check the result, then time it."""
    expected, run = contender.prepare(work)
    with torch.inference_mode():
        error = assert_within_budget(torch.as_tensor(run()), expected, contender.precision)
        benchmark.group = str(work)
        facts = {"contender": contender.name(work), "precision": contender.precision, "max_error": error.largest}
        benchmark.extra_info.update(expected.facts(), **facts)
        benchmark(run)


class Dense:
    """PyTorch's own layer, which multiplies by the zeros too."""

    precision = "float32"

    def __str__(self) -> str:
        return "nn"

    def name(self, work: Workload) -> str:
        return f"nn.{work.layer_name}"

    def prepare(self, work: Workload) -> tuple[Workload, Callable[[], Any]]:
        layer, x = work.layer, work.x
        return work, lambda: layer(x)[0]


@dataclasses.dataclass(frozen=True)
class Ours:
    """The converted layer on the numba kernels.

    Attributes:
        weight_dtype, activation_dtype: as of `from_dense`.
        zeros: False converts the layer before pruning.
        pattern: in which the layer is pruned, None for that of the workload.
        chooses: whether storage is left to the conversion; it is the pattern else.
        steps: whether a single time step is a call of `step`, or one of the layer as longer sequences are.
    """

    weight_dtype: torch.dtype | None = None
    activation_dtype: torch.dtype | None = None
    zeros: bool = True
    pattern: Pattern | None = None
    chooses: bool = False
    steps: bool = True

    @property
    def precision(self) -> str:
        if self.activation_dtype is not None:
            return _name(self.activation_dtype)
        if self.weight_dtype in (None, torch.float32):
            return "float32"
        return f"{_name(self.weight_dtype)} weights"

    def __str__(self) -> str:
        return "ours" + self._differences()

    def name(self, work: Workload) -> str:
        return f"Persistent{work.layer_name}" + self._differences()

    def _differences(self) -> str:
        differences = [
            "" if self.pattern is None else pattern_name(self.pattern),
            "storage=None" if self.chooses else "",
            "" if self.precision == "float32" else self.precision,
            "" if self.steps else "no step()",
            "" if self.zeros else "0 % zeros",
        ]
        return "".join(f", {difference}" for difference in differences if difference)

    def prepare(self, work: Workload) -> tuple[Workload, Callable[[], Any]]:
        converted = work if self.pattern is None else work.pruned_in(self.pattern)
        converted = converted if self.zeros else converted.without_zeros
        options: dict[str, Any] = {"weight_dtype": self.weight_dtype, "activation_dtype": self.activation_dtype}
        if self.chooses:
            options["storage"] = None
        fast = persistent_layer(converted.layer, converted, backend="cpu", **options)
        return converted, call_of(fast, work, steps=self.steps)


def persistent_layer(dense: nn.RNNBase, work: Workload, **options: Any) -> Any:
    """Convert a layer of a workload to its pattern, without a warning: some are dense on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*little to skip")
        return PERSISTENT[work.layer_name].from_dense(dense, **{"storage": work.pattern, **options})


def call_of(fast: Any, work: Workload, *, steps: bool = True) -> Callable[[], Tensor]:
    """Return what runs a converted layer from states of zeros: `step` for one time step, else whole sequences.

    `steps` False runs one time step as a sequence too.
    """
    x = work.x.to(work.device)
    if work.T > 1 or not steps:
        return lambda: fast(x)[0]
    x_t, hx = x[0], torch.zeros(1, work.B, work.H, dtype=work.dtype, device=work.device)
    state = (hx, hx) if work.cell == "LSTM" else hx
    return lambda: fast.step(x_t, state)[0].unsqueeze(0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
