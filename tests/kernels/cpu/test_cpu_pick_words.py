"""Picks in words: every class of entries, kernels that read them, and that words follow what is written into picks."""

import itertools

import pytest
import torch
from cpu_layers import random_matrix
from torch import Tensor

from triton_sparse_rnn import PersistentGRU
from triton_sparse_rnn.kernels.cpu import target
from triton_sparse_rnn.kernels.cpu.pick_words import PICK_BITS, pick_words, units_in_word
from triton_sparse_rnn.kernels.cpu.recurrent_layer import RecurrentLayer
from triton_sparse_rnn.kernels.cpu.stored_weights import BlockFormat
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_weights import LayerWeights
from triton_sparse_rnn.sparse.picks import ENTRY_UNITS, Picks

reads_words = pytest.mark.skipif(target.vector_path() != "AVX-512", reason="picks are read in bytes here")


def matrix_of_counts(counts: Tensor, bank: int, BR: int = 16) -> BlockMatrix:
    """With so many units [groups, banks] in each bank, of random picks and small integers."""
    groups, banks = counts.shape
    rank = torch.rand(groups, BR, banks, bank).argsort(-1).argsort(-1)
    stored = rank < counts[:, None, :, None]
    weight = torch.randint(1, 5, stored.shape) * stored
    return BlockMatrix.from_dense(weight.reshape(groups * BR, banks * bank).float(), Picks(BR, bank))


def read_words(matrix: BlockMatrix) -> Tensor:
    """[NB, BR], the picks that words hold, unit after unit."""
    words, word_starts = pick_words(matrix)
    rows = []
    for kind, (begin, end) in enumerate(itertools.pairwise(matrix.starts.tolist())):
        full = units_in_word(ENTRY_UNITS - kind % ENTRY_UNITS)
        for unit in range(end - begin):
            word = words[word_starts[kind] + unit // full]
            rows.append(word >> PICK_BITS * (unit % full) & (1 << PICK_BITS) - 1)
    return torch.stack(rows) if rows else words.new_zeros(0, words.shape[1])


@pytest.mark.parametrize("bank", [8, 16, 32])
@pytest.mark.parametrize("BR", [16, 48])
def test_words_hold_the_picks(bank, BR):
    counts = torch.cat([torch.zeros(1, 9, dtype=torch.int64), torch.randint(0, bank + 1, (5, 9)).clamp(max=7)])
    matrix = matrix_of_counts(counts, bank, BR)
    assert matrix.picks is not None
    assert torch.equal(read_words(matrix), matrix.picks[:, 0].int())
    assert len(read_words(matrix_of_counts(0 * counts, bank))) == 0


@pytest.mark.parametrize("bank", [8, 32])
@pytest.mark.parametrize("B", [1, 2, 11])
def test_every_remainder_of_each_class(bank, B):
    """Words are full or not in all ways: 0 to 13 banks of 0 to 7 units. Bits of the reference, which sums integers."""
    counts = torch.cat([torch.arange(14)[:, None].gt(torch.arange(13)).long() * units for units in range(1, 8)])
    matrix = matrix_of_counts(counts, bank)
    H, I = matrix.shape
    x = torch.randint(-9, 10, (B, I)).float()
    nothing = BlockMatrix.from_dense(torch.zeros(H, H), (16, 1))
    layer = RecurrentLayer("RNN_RELU", [LayerWeights(matrix, nothing, None, None)], quantized=False)
    assert torch.equal(layer(x, [torch.zeros(1, B, H)], None)[0], (x @ matrix.to_dense().t()).relu())


def test_what_is_read_in_words(monkeypatch):
    """Sixteen lanes, five bits, a column: and float inputs."""
    in_words, in_bytes = [(16, 1, 32), (48, 1, 8), (32, 1, 16)], [(16, 1, 64), (8, 1, 32), (16, 2, 32), (16, 1, 0)]
    for path in ("AVX-512", "AVX2", "generic"):
        monkeypatch.setattr(target, "vector_path", lambda path=path: path)
        for BR, BC, bank in in_words + in_bytes:
            expected = path == "AVX-512" and (BR, BC, bank) in in_words
            assert BlockFormat(BR, BC, "int8", False, bank).reads_words == expected
            assert not BlockFormat(BR, BC, "int8", True, bank).reads_words


def turn(picks: Tensor | None) -> None:
    assert picks is not None
    picks.copy_(picks.flip(0))


def test_words_are_made_once_for_what_picks_hold():
    matrix = random_matrix(3, 40, 70, Picks())
    first = pick_words(matrix)
    assert pick_words(matrix) is first
    turn(matrix.picks)
    assert not torch.equal(pick_words(matrix).words, first.words)
    again = pick_words(matrix)
    matrix.starts.copy_(matrix.starts)
    assert pick_words(matrix) is not again
    with torch.inference_mode():
        uncounted = random_matrix(3, 40, 70, Picks())
        before = pick_words(uncounted).words.clone()
        turn(uncounted.picks)
        assert not torch.equal(pick_words(uncounted).words, before)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_write_into_picks_counts(compiled):
    """Of a module that runs by its plan, and of one that runs by the operator."""
    gru = torch.nn.GRU(64, 32)
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter.mul_(torch.rand(parameter.shape) < 0.1)
    module = PersistentGRU.from_dense(gru, storage=Picks()).eval()
    run = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
    x = torch.randn(3, 1, 64)
    before = run(x)[0]
    picks = next(buffer for name, buffer in module.named_buffers() if name.endswith("ih_l0_picks"))
    with torch.no_grad():
        picks.copy_(picks.flip(-1))
        picks.copy_(picks.flip(-1))
        assert torch.equal(run(x)[0], before)
        picks.copy_(picks.flip(-1))
    module.backend = "reference"
    expected = module(x)[0]
    module.backend = None
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(run(x)[0], expected)
