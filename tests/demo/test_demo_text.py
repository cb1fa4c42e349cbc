import math
from pathlib import Path

import pytest
import torch

from triton_sparse_rnn.demo.text import Text, TextError, Vocabulary, count_characters, load_text, read_document


def decoded(vocabulary: Vocabulary, symbols: torch.Tensor) -> str:
    decode = vocabulary.decoder()
    return "".join(decode(symbol) for symbol in symbols.tolist())


def test_standard_library_is_the_default_text():
    text = load_text()
    assert "standard library" in text.source
    assert len(text.train) > 5_000_000
    assert "import " in decoded(text.vocabulary, text.held_out)
    assert 80 < len(text.vocabulary) < 120


def test_text_comes_back_whole_from_both_parts(text: Text, text_file: Path):
    whole = torch.cat([text.train, text.held_out])
    assert decoded(text.vocabulary, whole) == text_file.read_text(encoding="utf-8")
    assert len(text.held_out) == len(whole) // 20


def test_bytes_per_character_counts_characters(text: Text, text_file: Path):
    data = text_file.read_bytes()[-len(text.held_out) :]
    characters = len(data.decode(errors="ignore"))
    assert count_characters(data) == characters
    assert text.bytes_per_character == pytest.approx(len(data) / characters)
    assert 1.02 < text.bytes_per_character < 1.1


def test_rare_bytes_share_a_symbol_with_the_bits_to_tell_them_apart():
    vocabulary = Vocabulary.of(b"ab" * 100_000 + b"c")
    assert vocabulary.known == b"ab"
    assert vocabulary.encode(b"abcz").tolist() == [0, 1, 2, 2]
    assert 2**vocabulary.other_bits == pytest.approx(254)


def test_vocabulary_of_every_byte():
    vocabulary = Vocabulary.of(bytes(range(256)))
    assert len(vocabulary) == 257
    assert vocabulary.other_bits == 0
    assert vocabulary.encode(b"\xff").tolist() == [255]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("grün\r\nrot\rblau\n".encode(), "grün\nrot\nblau\n"),
        ("grün".encode("latin-1"), "grün"),
        ("grün".encode("utf-8-sig"), "grün"),
        ("grün 字".encode("utf-16"), "grün 字"),
        (b"\xff\xfeo", None),  # the mark of UTF-16, then half a character
        (b"a\x00b", None),
        (b"\x7fELF\x02\x01", None),
        (b"", ""),
    ],
)
def test_encodings(tmp_path: Path, data: bytes, expected: str | None):
    path = tmp_path / "file"
    path.write_bytes(data)
    assert read_document(path) == expected


def test_folder_takes_visible_texts_in_an_order_drawn_from_the_seed(tmp_path: Path):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text("one of the texts " * 50)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deep.txt").write_text("deep text " * 5)
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    texts = [load_text(tmp_path, seed=seed) for seed in (0, 0, 1)]
    wholes = [decoded(text.vocabulary, torch.cat([text.train, text.held_out])) for text in texts]
    assert wholes[0] == wholes[1] != wholes[2]
    assert sorted(wholes[0]) == sorted(wholes[2])
    assert "deep text" in wholes[0]
    assert "hidden" not in wholes[0]
    assert "10 files" in texts[0].source
    assert texts[0].sha256 == texts[1].sha256 != texts[2].sha256


def test_what_is_no_text_is_refused_by_name(tmp_path: Path):
    binary, empty, short, folder = (tmp_path / name for name in ("binary", "empty", "short", "folder"))
    binary.write_bytes(bytes(range(256)))
    empty.touch()
    short.write_text("short")
    folder.mkdir()
    with pytest.raises(TextError, match="missing: no such file or folder"):
        load_text(tmp_path / "missing")
    with pytest.raises(TextError, match="binary: not a text"):
        load_text(binary)
    with pytest.raises(TextError, match="empty: 0 bytes of text, at least 1 are needed; name another"):
        load_text(empty)
    with pytest.raises(TextError, match="short: 5 bytes of text, at least 6 are needed"):
        load_text(short, min_bytes=6)
    with pytest.raises(TextError, match="folder: 0 bytes"):
        load_text(folder)
    with pytest.raises(TextError, match="cannot be read"):
        read_document(folder)


def test_smallest_text_that_is_allowed_is_enough(tiny, tmp_path: Path):
    path = tmp_path / "text"
    path.write_text("ab " * (tiny.min_bytes // 3 + 1))
    text = load_text(path, min_bytes=tiny.min_bytes)
    assert len(text.train) // tiny.batch_size > tiny.window
    assert len(text.held_out) > tiny.window
    assert not math.isnan(text.bytes_per_character)
