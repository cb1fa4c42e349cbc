"""A pruned linear layer at inference, and who runs it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.workloads import MASKS, Workload, pattern_name
from triton_sparse_rnn import PersistentLinear
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern

BASELINE = "F.linear"
_BLOCKS = Blocks(16, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearWork:
    """A layer of `size` inputs and outputs, pruned at random in a pattern, and a batch of B rows."""

    size: int
    sparsity: float
    B: int = 1
    pattern: Pattern = _BLOCKS

    def __str__(self) -> str:
        return f"linear {self.size:4} B={self.B:2} {self.sparsity:.0%} zeros"

    @property
    def layer(self) -> nn.Linear:
        return _layer(self.size, self.sparsity, self.pattern)

    @functools.cached_property
    def x(self) -> Tensor:
        """[B, size]."""
        return torch.randn(self.B, self.size, generator=torch.Generator().manual_seed(1))

    def pruned_in(self, pattern: Pattern) -> LinearWork:
        """A layer of the same size and sparsity, pruned in another pattern."""
        return dataclasses.replace(self, pattern=pattern)

    def facts(self) -> dict[str, Any]:
        """Everything that belongs beside a time."""
        facts = Workload(H=self.size, sparsity=self.sparsity, pattern=self.pattern, T=1, B=self.B).facts()
        return facts | {"cell": "linear"}


@functools.lru_cache(maxsize=4)
def _layer(size: int, sparsity: float, pattern: Pattern) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(size, size).eval().requires_grad_(False)
    scores = torch.rand(pattern.mask_shape(1, size, size), generator=generator)
    kept = MASKS["balanced" if pattern.balanced else "random"](pattern, scores, sparsity)
    layer.weight.uniform_(-1, 1, generator=generator)
    layer.weight *= pattern.spread(kept, torch.rand(1, size, size, generator=generator))[0]
    layer.weight /= (size * (1 - sparsity)) ** 0.5
    layer.bias.uniform_(-0.1, 0.1, generator=generator)
    return layer


@dataclasses.dataclass(frozen=True)
class TorchLinear:
    """The dense product of torch, which multiplies by the zeros too."""

    def __str__(self) -> str:
        return BASELINE

    def prepare(self, work: LinearWork) -> tuple[Callable[[], Tensor], Tensor]:
        """Return the call that is timed, and the result that is expected of it, in float64."""
        weight, bias, x = work.layer.weight, work.layer.bias, work.x
        return lambda: F.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double())


@dataclasses.dataclass(frozen=True)
class OurLinear:
    """The converted layer on the numba kernels.

    Attributes:
        pattern: in which the layer is pruned, and stored if it is float32.
        weight_dtype, activation_dtype: as of `from_dense`, which then chooses the storage too.
    """

    pattern: Pattern = _BLOCKS
    weight_dtype: torch.dtype | None = None
    activation_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        dtypes = (self.weight_dtype, self.activation_dtype)
        narrow = [str(dtype).removeprefix("torch.") for dtype in dtypes if dtype is not None]
        kinds = [f"{dtype} {kind}" for dtype, kind in zip(narrow, ("weights", "activations"), strict=False)]
        return ", ".join(["PersistentLinear", pattern_name(self.pattern), *kinds])

    def prepare(self, work: LinearWork) -> tuple[Callable[[], Tensor], Tensor]:
        """Return the call that is timed, and the result that is expected of what is stored: the reference's."""
        layer, x = work.pruned_in(self.pattern).layer, work.x
        options: dict[str, Any] = {"weight_dtype": self.weight_dtype, "activation_dtype": self.activation_dtype}
        if self.weight_dtype is None:
            options["storage"] = self.pattern
        fast = PersistentLinear.from_dense(layer, backend="cpu", **options)
        expected = PersistentLinear.from_dense(layer, backend="reference", **options)
        if self.activation_dtype is None:
            return lambda: fast(x), F.linear(x.double(), fast.weight.to_dense().double(), layer.bias.double())
        return lambda: fast(x), expected(x).double()


def measure(benchmark: Any, work: LinearWork, contender: TorchLinear | OurLinear) -> None:
    """Check the result within the roundings of float32 sums, then time it."""
    run, expected = contender.prepare(work)
    with torch.inference_mode():
        error = (run() - expected).abs().max().item()
        assert error <= 4 * torch.finfo(torch.float32).eps * work.size**0.5, f"{contender} is wrong by {error}"
        benchmark.group = str(work)
        benchmark.extra_info.update(work.facts(), contender=str(contender), max_error=error)
        benchmark(run)
