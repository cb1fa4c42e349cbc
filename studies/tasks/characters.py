"""The next character of Python's standard library: a language model on text that every Python has."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studies.tasks.task import MakeRNN, Metric, MissingDataError, distilled
from triton_sparse_rnn.demo.evaluation import bits_per_character
from triton_sparse_rnn.demo.model import CharacterModel
from triton_sparse_rnn.demo.text import Text, TextError, load_text
from triton_sparse_rnn.demo.training import cut_into_streams


@dataclasses.dataclass(frozen=True)
class Characters:
    """`batch_size` streams of text are read side by side, `window` symbols a step; the state is carried along.

    Attributes:
        text: as the demo reads it; the last 5 % are held out.
        held_out: how many of the held-out symbols are scored.
    """

    name: ClassVar[str] = "characters"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("bits_per_character", "bits per character", 3),)

    text: Text
    embedding_size: int = 64
    hidden_size: int = 256
    batch_size: int = 32
    window: int = 64
    peak_rate: float = 2e-3
    steps: int = 500
    held_out: int = 200_000

    @property
    def loss_scale(self) -> float:
        """The loss is a mean over symbols."""
        return 1 / (self.batch_size * self.window)

    @classmethod
    def load(cls) -> Characters:
        try:
            return cls(load_text(min_bytes=1_000_000))
        except TextError as error:
            raise MissingDataError(f"characters: {error}") from None

    def settings(self) -> dict[str, Any]:
        numbers = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "text"}
        return numbers | {"text": self.text.source, "sha256": self.text.sha256}

    def build_model(self, make_rnn: MakeRNN, seed: int) -> CharacterModel:
        torch.manual_seed(seed)
        return CharacterModel(len(self.text.vocabulary), make_rnn(self.embedding_size, self.hidden_size))

    def losses(self, model: nn.Module, seed: int, teacher: nn.Module | None = None) -> Iterator[Tensor]:
        """Begin at a window drawn from `seed`; where the streams end, start again with a fresh state."""
        streams = cut_into_streams(self.text.train, self.batch_size)
        windows = (len(streams) - 1) // self.window
        state = teacher_state = None
        for index in itertools.count(random.Random(seed).randrange(windows)):
            if index % windows == 0:
                state = teacher_state = None
            start = index % windows * self.window
            ids = streams[start : start + self.window + 1].long()
            scores, state = model(ids[:-1], state)
            state = tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()
            loss = F.cross_entropy(scores.flatten(0, 1), ids[1:].flatten())
            if teacher is not None:
                with torch.no_grad():
                    taught, teacher_state = teacher(ids[:-1], teacher_state)
                loss = distilled(loss, scores.flatten(0, 1).log_softmax(1), taught.flatten(0, 1).log_softmax(1))
            yield loss

    def learning_rate(self, step: int, steps: int) -> float:
        """The same throughout."""
        return self.peak_rate

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"bits_per_character": bits_per_character(model, self.text, self.held_out)}
