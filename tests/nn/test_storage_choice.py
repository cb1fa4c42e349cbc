import pytest
import torch

from triton_sparse_rnn.kernels.cpu import support
from triton_sparse_rnn.nn.storage_choice import (
    DENSE_ROW_VECTOR_TIME,
    DENSE_VECTOR_TIME,
    VECTOR_TIMES,
    fastest_linear_storage,
    fastest_storage,
)
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.blocks import expand_block_mask
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

G, H, C = 3, 80, 200


@pytest.fixture(params=VECTOR_TIMES)
def vectors(request, monkeypatch):
    monkeypatch.setattr(support, "vectors", lambda: request.param)
    return request.param


def weight(pattern: Blocks | None = None, density: float = 0.1) -> torch.Tensor:
    torch.manual_seed(0)
    if pattern is None:
        return torch.randn(G, H, C) * (torch.rand(G, H, C) < density)
    mask = torch.rand(pattern.mask_shape(G, H, C)) < density
    return torch.randn(G, H, C) * expand_block_mask(mask, pattern.block_size, H, C)


def chosen(found: torch.Tensor, backend: str | None = None, activations=None, **options: bool):
    given: dict[str, bool] = {"of_inputs": False, "may_stay_dense": False, **options}
    return fastest_storage(found, backend=backend, activation_dtype=activations, **given)


@pytest.mark.parametrize("density", [0, 0.02, 0.3, 1])
@pytest.mark.parametrize("activations", [None, torch.int8])
@pytest.mark.parametrize("like", [None, Blocks(16, 4)])
@pytest.mark.parametrize("of_inputs", [False, True])
def test_no_listed_storage_takes_less_time(vectors, density, activations, like, of_inputs):
    found = weight(like, density)
    times = {
        pattern: BlockMatrix.from_dense(found.flatten(0, 1), pattern, gates=G).values.numel() / 16 * time[of_inputs]
        for pattern, time in VECTOR_TIMES[vectors][activations].items()
    }
    best = chosen(found, activations=activations, of_inputs=of_inputs)
    assert best is not None
    assert times[best] == min(times.values())
    dense = DENSE_VECTOR_TIME * G * H * C / 16
    assert (chosen(found, activations=activations, of_inputs=of_inputs, may_stay_dense=True) is None) == (
        dense < times[best]
    )


def test_masks_are_stored_as_they_were_made(monkeypatch):
    monkeypatch.setattr(support, "vectors", lambda: "AVX-512 with bytes")
    picked, pattern = weight(), Picks()
    scores, kept = pattern.scores(picked, "l2"), pattern.kept(picked)
    pruned = [pattern.prune_to_sparsity(*gate, 0.95) for gate in zip(scores, kept, strict=True)]
    picked *= pattern.spread(torch.stack(pruned), picked)
    assert chosen(picked) == chosen(weight()) == Picks()
    assert chosen(picked, activations=torch.int8) == Picks(16, 64, 4)
    assert chosen(weight(Blocks(16, 1))) == Blocks(16, 1)
    assert chosen(weight(Blocks(16, 4)), activations=torch.int8) in (Blocks(16, 4), Blocks(16, 16))
    assert chosen(weight(density=1), may_stay_dense=True) is None


def test_what_has_no_kernel_is_not_chosen(vectors):
    assert chosen(weight(), "triton") == chosen(weight(), "triton", torch.int8) == Picks()  # not those of bytes
    assert chosen(weight(Blocks(16, 16)), "triton", of_inputs=True) == Blocks(16, 1)  # as it runs there


def test_blocks_and_picks_on_a_gpu_by_what_they_read():
    for density, pattern in ((0.02, Picks()), (0.9, Blocks(16, 1))):
        assert chosen(weight(density=density), "triton") == pattern


def test_without_numba_there_is_a_choice(monkeypatch):
    monkeypatch.setattr(support, "vectors", lambda: "none")
    assert chosen(weight()) == Picks()


def test_blocks_do_not_reach_from_gate_to_gate():
    found = torch.zeros(2, 8, 4)
    found[0, :, 0], found[1, :, 1:] = 1, 1  # one full 16x4 block if rows were cut without regard to gates
    assert Blocks(16, 4).kept(found).sum() == 2


def chosen_linear(found: torch.Tensor, *, may_stay_dense: bool = True, backend: str | None = None, activations=None):
    return fastest_linear_storage(found, backend=backend, activation_dtype=activations, may_stay_dense=may_stay_dense)


@pytest.mark.parametrize("density", [0, 0.02, 0.2, 0.3, 0.5, 1])
@pytest.mark.parametrize("activations", [None, torch.int8])
@pytest.mark.parametrize("like", [None, Blocks(16, 1)])
def test_a_linear_layer_is_slower_than_torch_with_no_number_of_rows(vectors, density, activations, like):
    found = weight(like, density)[:1]
    whole = 5 * C  # vectors of 80 rows
    shares = {
        pattern: max(
            BlockMatrix.from_dense(found[0], pattern).values.numel() / 16 * time / (dense * whole)
            for time, dense in zip(times, (DENSE_ROW_VECTOR_TIME, DENSE_VECTOR_TIME), strict=True)
        )
        for pattern, times in VECTOR_TIMES[vectors][activations].items()
    }
    best = chosen_linear(found, activations=activations, may_stay_dense=False)
    assert best is not None
    assert shares[best] == min(shares.values())
    assert (chosen_linear(found, activations=activations) is None) == (shares[best] > 1)


def test_linear_layers_of_many_zeros_are_stored(monkeypatch):
    monkeypatch.setattr(support, "vectors", lambda: "AVX-512 with bytes")
    assert chosen_linear(weight(density=0.1)[:1]) == Picks()
    assert chosen_linear(weight(Blocks(16, 1), 0.4)[:1]) == Blocks(16, 1)
    assert chosen_linear(weight(density=0.6)[:1]) is None
    assert chosen_linear(weight(density=1)[:1]) is None


def test_on_a_gpu_one_row_counts_alone():
    """Of many rows nothing is known there."""
    found = weight(Blocks(16, 1), 0.75)[:1]
    assert chosen_linear(found, backend="triton") == Blocks(16, 1)
    assert chosen_linear(found, backend="cpu") is None
