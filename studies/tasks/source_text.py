"""The sources of Python's standard library, text that every Python has, as symbols in three parts.

A symbol is a byte. Bytes that the training text hardly uses share the last symbol; each of them then costs
log2(how many they are) bits on top, so that bits per character remain the length of a code from which the text could be
restored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from studies.tasks.task import MissingDataError

HELD_OUT = 0.05  # share of the text for each of validation, at its end, and test, before it
RARE = 1e-5  # share of the training text below which a byte has no symbol of its own
LEAST_BYTES = 1_000_000
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}


class Part(NamedTuple):
    """A part of a text that is held out: int64 symbols [N]."""

    symbols: Tensor
    bytes_per_character: float


@dataclasses.dataclass(frozen=True)
class SourceText:
    """A text.

    Attributes:
        source, sha256: what was read.
        symbols: how many there are; the last one is that of rare bytes.
        rare_bits: that say which byte the last symbol was.
        train: [N], int64 symbols.
    """

    source: str
    sha256: str
    symbols: int
    rare_bits: float
    train: Tensor
    validation: Part
    test: Part

    @classmethod
    def of(cls, name: str, documents: Sequence[str]) -> SourceText:
        """Join documents, and hold the end out."""
        data = "\n".join(documents).encode()
        size = int(HELD_OUT * len(data))
        border = len(data) - 2 * size
        codes = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
        known = (codes[:border].bincount(minlength=256) > RARE * border).nonzero().flatten()
        table = torch.full((256,), len(known))
        table[known] = torch.arange(len(known))

        def part(begin: int, end: int) -> Part:
            characters = data[begin:end].decode(errors="ignore")
            return Part(table[codes[begin:end]], len(characters.encode()) / len(characters))

        return cls(
            source=f"{name} ({len(data) / 1000:,.0f} kB, {len(documents):,} files)",
            sha256=hashlib.sha256(data).hexdigest(),
            symbols=len(known) + 1,
            rare_bits=math.log2(max(1, 256 - len(known))),
            train=table[codes[:border]],
            validation=part(border + size, len(data)),
            test=part(border, border + size),
        )

    @classmethod
    def load(cls) -> SourceText:
        """Read the running Python's sources, in an order that is always the same.

        Raises:
            MissingDataError: they are not there.
        """
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in root.rglob("*.py") if not LEFT_OUT & set(file.relative_to(root).parts)]
        files.sort(key=lambda file: file.relative_to(root).as_posix())
        random.Random(0).shuffle(files)
        documents = [document for file in files if (document := file.read_text(encoding="utf-8", errors="replace"))]
        size = sum(map(len, documents))
        if size < LEAST_BYTES:
            raise MissingDataError(
                f"characters: {root} holds {size:,} characters of Python, {LEAST_BYTES:,} are needed"
            )
        return cls.of("Python's standard library sources", documents)


def cut_into_streams(symbols: Tensor, count: int) -> Tensor:
    """Cut [N] into `count` stretches of text side by side, [N // count, count]; the rest is left out."""
    length = len(symbols) // count
    return symbols[: length * count].view(count, length).t()
