import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from triton_sparse_rnn.demo.evaluation import (
    WINDOW,
    WrongResultError,
    bits_per_character,
    check_rounding,
    check_same_outputs,
)
from triton_sparse_rnn.demo.model import build_model
from triton_sparse_rnn.demo.text import Text, Vocabulary


@pytest.fixture
def model(text: Text):
    return build_model(nn.GRU, len(text.vocabulary), 5, 9, seed=3).eval()


def test_a_model_that_knows_nothing_needs_the_bits_of_a_plain_code(model, text: Text):
    torch.nn.init.zeros_(model.decoder.weight)
    torch.nn.init.zeros_(model.decoder.bias)
    expected = math.log2(len(text.vocabulary)) * text.bytes_per_character
    assert bits_per_character(model, text, 700) == pytest.approx(expected, rel=1e-6)


def test_state_is_carried_over_windows(model, text: Text):
    torch.nn.init.normal_(model.rnn.weight_hh_l0)
    count = WINDOW * 2 - 1  # one stream, not quite two windows
    ids = text.held_out[:count, None].long()
    with torch.inference_mode():
        scores, _ = model(ids[:-1])
    expected = F.cross_entropy(scores.flatten(0, 1), ids[1:].flatten()).item() / math.log(2) * text.bytes_per_character
    assert bits_per_character(model, text, count) == pytest.approx(expected, rel=1e-5)


def test_an_other_also_costs_the_bits_that_say_which(model):
    vocabulary = Vocabulary(b"ab")
    model = build_model(nn.GRU, len(vocabulary), 5, 9, seed=3).eval()
    torch.nn.init.zeros_(model.decoder.weight)
    torch.nn.init.zeros_(model.decoder.bias)
    held_out = vocabulary.encode(b"ab?a" * 50 + b"a")
    text = Text("", "", vocabulary, held_out, held_out, bytes_per_character=1.0, sha256="")
    assert bits_per_character(model, text, 1000) == pytest.approx(math.log2(3) + math.log2(254) / 4, rel=1e-6)


def test_more_held_out_text_than_there_is(model, text: Text):
    assert bits_per_character(model, text, 10**9) == bits_per_character(model, text, len(text.held_out))


def test_same_outputs(model, text: Text):
    ids = text.held_out[:60].view(20, 3).long()
    comparison = check_same_outputs(model, copy.deepcopy(model), ids)
    assert comparison.difference == 0
    assert 0 < comparison.allowed < 1e-4
    assert "rounding allows" in str(comparison)


@pytest.mark.parametrize("damage", [1e-3, math.nan])
def test_other_outputs_are_an_error(model, text: Text, damage: float):
    ids = text.held_out[:60].view(20, 3).long()
    other = copy.deepcopy(model)
    other.rnn.weight_hh_l0.data[0, 0] += damage
    with pytest.raises(WrongResultError, match="not the trained one"):
        check_same_outputs(model, other, ids)


def test_no_number_of_a_model_that_diverged(model, text: Text):
    model.decoder.bias.data[0] = math.nan
    with pytest.raises(WrongResultError):
        check_same_outputs(model, copy.deepcopy(model), text.held_out[:60].view(20, 3).long())


def test_rounding_may_go_either_way_but_not_farther(model, text: Text):
    ids = text.held_out[:60].view(20, 3).long()
    up, down, twice, broken = (copy.deepcopy(model) for _ in range(4))
    for other, change in ((up, 1e-3), (down, -1e-3), (twice, 3e-3), (broken, math.nan)):
        other.decoder.bias.data += change
    check_rounding(model, up, down, ids)
    for wrong in (twice, broken):
        with pytest.raises(WrongResultError, match="not the one of the reference"):
            check_rounding(model, up, wrong, ids)
