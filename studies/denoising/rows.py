"""What is compared: the model as it came, fine-tuned without pruning, and pruned by how much and how."""

from __future__ import annotations

import dataclasses
from typing import Any

from triton_sparse_rnn import Blocks, OneShot, Picks, PolynomialDecay
from triton_sparse_rnn.pruning.schedules import Schedule

LINEAR_WEIGHTS = ("fc_*.weight",)


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to fine-tune.

    Attributes:
        sparsity: of the recurrent and input weights of both GRU layers; 0 leaves them dense.
        gradual: False prunes in one go before the fine-tuning.
        linear_too: whether the weights of the linear layers are pruned as far.
        pattern: which weights are pruned together.
        taught: by the dense model of the same seed and steps: its outputs and those of its GRU add to the loss.
        begins_dense: the fine-tuning begins with the weights of that model, in place of the original's.
        peak_rate: of Adam. What is pruned has more to learn, and wants a higher one.
        held: share of the steps before which the rate does not fall.
    """

    name: str
    sparsity: float = 0.0
    gradual: bool = True
    linear_too: bool = False
    pattern: Picks | Blocks = Picks()  # noqa: RUF009 - it is frozen
    taught: bool = False
    begins_dense: bool = False
    peak_rate: float = 2e-3
    held: float = 0.0
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
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for shown in ("name", "seeds"):
            del settings[shown]
        return settings | {"pattern": repr(self.pattern) if self.sparsity else None}


TASK = "denoising"
NOISY, ORIGINAL = Row("noisy"), Row("original")  # what is evaluated without training
DENSE = Row("dense", peak_rate=5e-4)
TAUGHT = Row("90 %", 0.9, taught=True, begins_dense=True, held=0.5)  # until masks are final
BLOCKS = Blocks(16, 1)
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
PICKS_ROWS: tuple[Row, ...] = (
    *(dataclasses.replace(TAUGHT, name=f"{100 * sparsity:g} %", sparsity=sparsity) for sparsity in SPARSITIES),
    dataclasses.replace(TAUGHT, name="90 %, not taught", taught=False, begins_dense=False),
    dataclasses.replace(TAUGHT, name="90 %, linear too", linear_too=True),
)
BLOCKS_ROWS: tuple[Row, ...] = (
    *(Row(f"{100 * sparsity:g} % in 16x1 blocks", sparsity, pattern=BLOCKS) for sparsity in SPARSITIES),
    Row("90 % in one go in 16x1 blocks", 0.9, pattern=BLOCKS, gradual=False),
    Row("90 % in 16x1 blocks, linear too", 0.9, pattern=BLOCKS, linear_too=True),
)
ROWS = (DENSE, *PICKS_ROWS, *BLOCKS_ROWS)
UNTRAINED = (NOISY, ORIGINAL)
BY_NAME = {row.name: row for row in ROWS}
