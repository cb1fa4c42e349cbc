import pytest
import torch

from triton_sparse_rnn.kernels.cpu import support
from triton_sparse_rnn.nn.storage_choice import DENSE_VECTOR_TIME, VECTOR_TIMES, fastest_storage
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
