"""What is compared: the model as it came, fine-tuned without pruning, and pruned by how much and how."""

from __future__ import annotations

import dataclasses
from typing import Any

from triton_sparse_rnn import OneShot, PolynomialDecay
from triton_sparse_rnn.pruning.schedules import Schedule

LINEAR_WEIGHTS = ("fc_*.weight",)


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to fine-tune.

    Attributes:
        sparsity: of the recurrent and input weights of both GRU layers; 0 leaves them dense.
        gradual: False prunes in one go before the fine-tuning.
        linear_too: whether the weights of the linear layers are pruned as far.
        peak_rate: of Adam. What is pruned has more to learn, and wants a higher one.
    """

    name: str
    sparsity: float = 0.0
    gradual: bool = True
    linear_too: bool = False
    peak_rate: float = 2e-3
    seeds: tuple[int, ...] = (0,)

    def schedule(self, steps: int) -> Schedule | None:
        """Return when what is pruned in a fine-tuning of so many steps; None for a dense one."""
        if not self.sparsity:
            return None
        if not self.gradual:
            return OneShot(sparsity=self.sparsity, step=0)
        begin, end = steps // 50, max(steps // 50 + 1, steps // 2)
        return PolynomialDecay(
            final_sparsity=self.sparsity, begin_step=begin, end_step=end, frequency=max(1, (end - begin) // 25)
        )

    @property
    def include(self) -> tuple[str, ...]:
        """Globs of what is pruned beside the GRU layers."""
        return LINEAR_WEIGHTS if self.linear_too else ()

    def settings(self) -> dict[str, Any]:
        """What decides the outcome of a run, for JSON."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ("name", "seeds")}


TASK = "denoising"
NOISY, ORIGINAL = Row("noisy"), Row("original")  # what is evaluated without training
DENSE = Row("dense", peak_rate=5e-4)
ROWS = (
    DENSE,
    Row("50 %", 0.5),
    Row("80 %", 0.8),
    Row("90 %", 0.9),
    Row("95 %", 0.95),
    Row("90 % in one go", 0.9, gradual=False),
    Row("90 %, linear too", 0.9, linear_too=True),
)
UNTRAINED = (NOISY, ORIGINAL)
BY_NAME = {row.name: row for row in ROWS}
