"""The numbers of a demo run."""

from __future__ import annotations

import dataclasses

from triton_sparse_rnn.sparse.patterns import Blocks, Pattern
from triton_sparse_rnn.sparse.picks import Picks

# Kinds of models, in the order in which they are trained, with the pattern in which each is pruned.
PATTERNS: dict[str, Pattern | None] = {"picks": Picks(), "dense": None, "blocks": Blocks(16, 1)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome of a run; a checkpoint of other settings is not continued.

    Attributes:
        input_size, hidden_size: I and H of the recurrent layer.
        batch_size, window: B streams of text are read side by side, T symbols of each per step.
        steps: optimizer steps of each of the three trainings.
        learning_rate, warmup: peak rate, reached after `warmup` of the steps; a half cosine to 0 follows.
        clip_norm: largest norm of the whole gradient.
        sparsity: of recurrent and input weights at the end of pruning.
        prune_begin, prune_end, prune_every: the ramp as shares of `steps`, and the steps between its updates.
        held_out: how many symbols of held-out text are scored.
        generated: symbols of the sample, and of each timed run.
        checkpoint_every: steps.
    """

    input_size: int = 128
    hidden_size: int = 384
    batch_size: int = 32
    window: int = 32
    steps: int = 1200
    learning_rate: float = 4e-3
    warmup: float = 0.05
    clip_norm: float = 1.0
    sparsity: float = 0.9
    prune_begin: float = 0.1
    prune_end: float = 0.5
    prune_every: int = 10
    held_out: int = 200_000
    generated: int = 1_500
    checkpoint_every: int = 250
    seed: int = 0
    threads: int = 2

    @property
    def min_bytes(self) -> int:
        """Bytes of text below which a stream or the held-out part would hold less than two windows."""
        return 40 * (self.window + 1) + 2 * self.batch_size * (self.window + 1)


QUICK = Settings(hidden_size=256, steps=160, prune_every=4, held_out=50_000, generated=1_000)
