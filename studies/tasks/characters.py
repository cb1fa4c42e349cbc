"""The next character of Python's standard library: a language model on text that every Python has."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studies.tasks.source_text import SourceText, cut_into_streams
from studies.tasks.task import HeldOut, MakeRNN, Metric, Task, numbers_of
from studies.tasks.teacher import Teacher

SCORED_STREAMS, SCORED_WINDOW = 32, 256  # at most, side by side; symbols at once


class CharacterModel(nn.Module):
    """Scores [T, B, symbols] for the next symbol from the symbols [T, B] so far and the state of `rnn`."""

    def __init__(self, symbols: int, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, rnn.input_size)
        self.rnn = rnn
        self.decoder = nn.Linear(rnn.hidden_size, symbols)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.embedding(ids), state)
        return self.decoder(y), state


@dataclasses.dataclass(frozen=True)
class Characters(Task):
    """`batch_size` streams of text are read side by side, `window` symbols a step; the state is carried along.

    Attributes:
        scored: how many symbols of a split are scored.
    """

    name: ClassVar[str] = "characters"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("bits_per_character", "bits per character", 3),)

    text: SourceText
    embedding_size: int = 64
    hidden_size: int = 256
    batch_size: int = 32
    window: int = 64
    peak_rate: float = 4e-3
    warmup: float = 0.05
    steps: int = 500
    scored: int = 200_000

    @property
    def loss_scale(self) -> float:
        """The loss is a mean over symbols."""
        return 1 / (self.batch_size * self.window)

    @classmethod
    def load(cls) -> Characters:
        return cls(SourceText.load())

    def settings(self) -> dict[str, Any]:
        return numbers_of(self) | {"text": self.text.source, "sha256": self.text.sha256}

    def build_model(self, make_rnn: MakeRNN, seed: int) -> CharacterModel:
        torch.manual_seed(seed)
        return CharacterModel(self.text.symbols, make_rnn(self.embedding_size, self.hidden_size))

    def losses(self, model: nn.Module, seed: int, teacher: Teacher | None = None) -> Iterator[Tensor]:
        """Begin at a window drawn from `seed`; where the streams end, start again with a fresh state."""
        streams = cut_into_streams(self.text.train, self.batch_size)
        windows = (len(streams) - 1) // self.window
        state = teacher_state = None
        for index in itertools.count(random.Random(seed).randrange(windows)):
            if index % windows == 0:
                state = teacher_state = None
            start = index % windows * self.window
            ids = streams[start : start + self.window + 1]
            scores, state = model(ids[:-1], state)
            state = tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()
            loss = F.cross_entropy(scores.flatten(0, 1), ids[1:].flatten())
            if teacher is not None:
                taught, teacher_state = teacher(ids[:-1], teacher_state)
                loss = loss + teacher.loss(scores, taught)
            yield loss

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, split: HeldOut) -> dict[str, float]:
        """Read up to 32 streams side by side, with the state carried along."""
        part = self.text.test if split == "test" else self.text.validation
        symbols = part.symbols[: self.scored]
        streams = cut_into_streams(symbols, max(1, min(SCORED_STREAMS, len(symbols) // SCORED_WINDOW)))
        state, nats, targets = None, 0.0, streams[1:]
        for start in range(0, len(targets), SCORED_WINDOW):
            window = slice(start, start + SCORED_WINDOW)
            scores, state = model(streams[:-1][window], state)
            nats += F.cross_entropy(scores.flatten(0, 1), targets[window].flatten(), reduction="sum").item()
        bits = nats / math.log(2) + self.text.rare_bits * int((targets == self.text.symbols - 1).sum())
        return {"bits_per_character": bits / targets.numel() * part.bytes_per_character}
