"""The text that the demo learns: read from files, spelled in at most 257 symbols, cut into training and held-out parts.

A symbol is one byte of the text's UTF-8 form, so every text in every script works. Bytes that the training text hardly
uses share one symbol, OTHER; each of them then costs log2(how many they are) bits on top of OTHER's own, so that bits
per character remain the length of a code from which the text could be restored.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import math
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 0.05  # share of the text, at its end
RARE = 1e-5  # a byte below this share of the training text is spelled OTHER
MAX_BYTES = 32 << 20  # more text than this is never reached in a demo
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_CONTROLS = {chr(code) for code in range(32)} - set("\t\n\r\f\v")


class TextError(ValueError):
    """The text cannot be used; the message names the file and the way out."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Symbols 0 .. len(known) - 1 stand for the bytes in `known`, symbol len(known) is OTHER.

    >>> vocabulary = Vocabulary(b"abc")
    >>> vocabulary.encode(b"cab?").tolist(), len(vocabulary)
    ([2, 0, 1, 3], 4)
    >>> decode = vocabulary.decoder()
    >>> [decode(symbol) for symbol in (2, 0)]
    ['c', 'a']
    """

    known: bytes

    @classmethod
    def of(cls, data: bytes) -> Vocabulary:
        """Keep the bytes of `data` that are not rare."""
        counts = torch.bincount(_as_tensor(data), minlength=256)
        return cls(bytes((counts > RARE * len(data)).nonzero().flatten().tolist()))

    def __len__(self) -> int:
        return len(self.known) + 1

    @property
    def other_bits(self) -> float:
        """Bits that say which byte an OTHER was."""
        return math.log2(max(1, 256 - len(self.known)))

    def encode(self, data: bytes) -> Tensor:
        """Return the symbols of `data`, [len(data)], int16."""
        symbols = {"dtype": torch.int16, "device": "cpu"}
        table = torch.full((256,), len(self.known), **symbols)
        table[_as_tensor(self.known).long()] = torch.arange(len(self.known), **symbols)
        return table[_as_tensor(data).long()]

    def decoder(self) -> Callable[[int], str]:
        """Return a function that turns one symbol after another into text: "" inside a character of several bytes.

        What is no valid UTF-8 becomes U+FFFD.
        """
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        return lambda symbol: decode(self.known[symbol : symbol + 1] or b"\xff")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as symbols, in two parts.

    Attributes:
        name, source: what was read, in few words and with its size.
        train, held_out: [N], int16 symbols of `vocabulary`.
        bytes_per_character: UTF-8 bytes per character of the held-out part.
        sha256: of the text, to recognise it when a run is resumed.
    """

    name: str
    source: str
    vocabulary: Vocabulary
    train: Tensor
    held_out: Tensor
    bytes_per_character: float
    sha256: str


def load_text(path: Path | None = None, *, min_bytes: int = 0, seed: int = 0) -> Text:
    """Read a file, a folder, or (None) the sources of the running Python's standard library.

    The files of a folder are put in an order drawn from `seed`, and the last 5 % of the whole text are held out.

    Raises:
        TextError: nothing there, not a text, or less than `min_bytes` of it.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in root.rglob("*.py") if not _LEFT_OUT & set(file.relative_to(root).parts)]
        what = "Python's standard library sources"
        advice = "name a text with --text"
    else:
        root, what, advice = path, str(path), "name another file or folder with --text"
        if not path.exists():
            raise TextError(f"{path}: no such file or folder; {advice}")
        files = [path] if path.is_file() else [file for file in path.rglob("*") if _is_visible(file, path)]
    documents, room = [], MAX_BYTES
    for file in _shuffled(files, root, seed):
        document = read_document(file)
        if document is None and file == path:
            raise TextError(f"{path}: not a text (it holds NUL or other control characters); {advice}")
        if document:
            documents.append(document)
            room -= len(document)
        if room <= 0:
            break
    data = "\n".join(documents).encode("utf-8")[:MAX_BYTES]
    if not data or len(data) < min_bytes:
        raise TextError(f"{what}: {len(data):,} bytes of text, at least {max(1, min_bytes):,} are needed; {advice}")
    border = len(data) - int(HELD_OUT * len(data))
    vocabulary, held_out = Vocabulary.of(data[:border]), data[border:]
    count = f", {len(documents):,} files" if len(documents) > 1 else ""
    return Text(
        name=what,
        source=f"{what} ({len(data) / 1000:,.0f} kB{count})",
        vocabulary=vocabulary,
        train=vocabulary.encode(data[:border]),
        held_out=vocabulary.encode(held_out),
        bytes_per_character=len(held_out) / max(1, count_characters(held_out)),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def read_document(path: Path) -> str | None:
    """Return the text of a file with plain newlines, or None where it is not a text.

    UTF-8, UTF-16 with its mark, else Latin-1 as long as no control characters show.

    Raises:
        TextError: it cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror or error})") from None
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for encoding in ("utf-16",) if marked else ("utf-8-sig", "latin-1"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        return None if _CONTROLS & set(text) else text.replace("\r\n", "\n").replace("\r", "\n")
    return None


def count_characters(data: bytes) -> int:
    """Return how many characters begin in UTF-8 bytes."""
    return int(((_as_tensor(data) & 0xC0) != 0x80).sum())


def _as_tensor(data: bytes) -> Tensor:
    if not data:  # torch.frombuffer takes no empty buffer
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _is_visible(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def _shuffled(files: list[Path], root: Path, seed: int) -> list[Path]:
    ordered = sorted(files, key=lambda file: file.relative_to(root).as_posix())
    random.Random(seed).shuffle(ordered)
    return ordered
