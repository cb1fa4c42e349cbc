"""A blob that is damaged, forged or foreign is refused with a code, and never makes the runtime leave its memory."""

from __future__ import annotations

import ctypes
import struct
import zlib
from pathlib import Path

import pytest
import torch
from c_builds import (
    CHECKSUM,
    INDICES,
    LAYERS,
    MAGIC,
    MEMORY,
    OK,
    ORDER,
    SIZE,
    VERSION,
    Model,
    Running,
    Stream,
    build,
    library,
    open_blob,
    run,
)
from torch import nn

from triton_sparse_rnn import Blocks, PersistentGRU, PersistentLSTM, Picks
from triton_sparse_rnn.export.blob import make_blob
from triton_sparse_rnn.export.c_text import stream_bytes
from triton_sparse_rnn.export.chain import c_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*little to skip")  # of layers this small

_LAYER_WORD, _LAYER_WORDS, _MATRIX_WORDS = 16, 8, 16


def sparse(layer: nn.RNNBase) -> nn.RNNBase:
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                parameter.mul_(torch.rand_like(parameter) < 0.4)
    return layer


def small_chain(storage, dtype=torch.float32, **options) -> list[nn.Module]:
    torch.manual_seed(0)
    lstm = sparse(nn.LSTM(9, 18, proj_size=5, **options))
    gru = sparse(nn.GRU(10 if options.get("bidirectional") else 5, 17))
    store = {"storage": storage, "backend": "reference"}
    return [
        PersistentLSTM.from_dense(lstm, weight_dtype=dtype, **store),
        nn.Sigmoid(),
        PersistentGRU.from_dense(gru, **store),
        nn.Linear(17, 3),
    ]


def blob_of(chain: list[nn.Module]) -> bytes:
    return make_blob(c_layers([("", module) for module in chain]))


def forged(blob: bytes, word: int, value: int) -> bytes:
    """A blob with another number of 32 bits, and the checksum that belongs to it."""
    changed = bytearray(blob)
    struct.pack_into("<I", changed, 4 * word, value)
    struct.pack_into("<I", changed, 24, zlib.crc32(changed[28:]))
    return bytes(changed)


def word_of(blob: bytes, number: int) -> int:
    return struct.unpack_from("<I", blob, 4 * number)[0]


def test_what_is_no_blob():
    blob = blob_of(small_chain(Picks()))
    assert open_blob(blob)[0] == OK
    assert open_blob(b"")[0] == MAGIC
    assert open_blob(b"x" + blob[1:])[0] == MAGIC
    assert open_blob(blob[:8] + blob[8:12][::-1] + blob[12:])[0] == ORDER
    assert open_blob(blob[:12] + struct.pack("<I", 2) + blob[16:])[0] == VERSION
    assert open_blob(blob[:-1])[0] == open_blob(blob + b"\0")[0] == SIZE
    assert open_blob(blob[:-1] + bytes([blob[-1] ^ 1]))[0] == CHECKSUM
    assert open_blob(blob[:28] + bytes([blob[28] ^ 1]) + blob[29:])[0] == CHECKSUM
    assert b"checksum" in library().tsr_message(CHECKSUM)


def test_a_refused_blob_leaves_an_empty_model():
    status, model = open_blob(b"x" * 1000)
    assert status == MAGIC
    assert bytes(model) == bytes(ctypes.sizeof(Model))


@pytest.mark.parametrize(
    ("word", "value", "status"),
    [
        (7, 0, LAYERS),  # layers
        (7, 2**31, LAYERS),
        (8, 2**31, LAYERS),  # matrices
        (8, 2, LAYERS),
        (9, 10, LAYERS),  # inputs of the chain
        (10, 4, LAYERS),  # outputs of the chain
        (_LAYER_WORD + 0, 9, LAYERS),  # kind
        (_LAYER_WORD + 1, 10, LAYERS),  # inputs
        (_LAYER_WORD + 2, 19, LAYERS),  # hidden units
        (_LAYER_WORD + 3, 6, LAYERS),  # outputs
        (_LAYER_WORD + 4, 3, LAYERS),  # directions
        (_LAYER_WORD + 4, 0, LAYERS),
        (_LAYER_WORD + 5, 2**31, LAYERS),  # first matrix
        (_LAYER_WORD + _LAYER_WORDS + 6, 4, LAYERS),  # the function
        (_LAYER_WORD + 4 * _LAYER_WORDS + 0, 3, LAYERS),  # of a matrix its pattern
        (_LAYER_WORD + 4 * _LAYER_WORDS + 1, 4, LAYERS),  # dtype
        (_LAYER_WORD + 4 * _LAYER_WORDS + 2, 3, LAYERS),  # gates
        (_LAYER_WORD + 4 * _LAYER_WORDS + 5, 10**6, INDICES),  # vectors
        (_LAYER_WORD + 4 * _LAYER_WORDS + 6, 2**31, INDICES),  # where values are
        (_LAYER_WORD + 4 * _LAYER_WORDS + 13, 2**32 - 1, INDICES),  # where biases are
    ],
)
def test_sizes_that_do_not_fit(word, value, status):
    blob = blob_of(small_chain(Picks()))
    assert open_blob(forged(blob, word, value))[0] == status


@pytest.mark.parametrize("storage", [Picks(), Blocks(16, 1)], ids=str)
def test_indices_out_of_range(storage):
    blob = blob_of(small_chain(storage))
    matrix = _LAYER_WORD + 4 * _LAYER_WORDS
    counts, places = (16 * word_of(blob, matrix + field) for field in (7, 8))
    assert open_blob(forged(blob, places, 9 if isinstance(storage, Blocks) else 1))[0] == INDICES
    assert open_blob(forged(blob, counts, word_of(blob, counts) + 1))[0] == INDICES
    assert open_blob(forged(blob, matrix + 9, word_of(blob, matrix + 9) - 1))[0] == INDICES


def test_too_little_memory():
    running = Running(*small_chain(Picks()))
    stream = Stream()
    memory, size = ctypes.create_string_buffer(10), ctypes.c_size_t(10)
    both = ctypes.byref(stream), ctypes.byref(running.model)
    assert library().tsr_init(*both, memory, size) == MEMORY
    assert library().tsr_init(*both, None, ctypes.c_size_t(10**6)) == MEMORY


def test_too_little_scratch():
    running = Running(*small_chain(Picks(), bidirectional=True))
    x, y = ctypes.create_string_buffer(4 * 9 * 5), ctypes.create_string_buffer(4 * 3 * 5)
    needed = library().tsr_run_bytes(ctypes.byref(running.model), ctypes.c_size_t(5))
    scratch = ctypes.create_string_buffer(needed)
    for given in (0, needed - 1):
        sizes = ctypes.c_size_t(5), scratch, ctypes.c_size_t(given)
        assert library().tsr_run(ctypes.byref(running.stream), x, y, *sizes) == MEMORY
    too_many = ctypes.c_size_t(2**62)
    assert library().tsr_run_bytes(ctypes.byref(running.model), too_many) == 2 ** (8 * ctypes.sizeof(too_many)) - 1


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=str)
def test_the_memory_of_a_stream_is_known_before(options):
    running = Running(*small_chain(Picks(), **options))
    assert stream_bytes(running.layers) == running.model.stream_bytes
    assert sum(layer.state_floats for layer in running.layers) == running.model.state_floats


def test_the_same_layers_give_the_same_bytes():
    assert blob_of(small_chain(Picks())) == blob_of(small_chain(Picks()))


@pytest.mark.slow("compiler")
@pytest.mark.parametrize("name", ["sanitized", "sanitized plain"])
@pytest.mark.parametrize(
    "chain",
    [
        (Picks(), torch.float32, {}),
        (Blocks(16, 1), torch.int8, {"bidirectional": True}),
        (Picks(), torch.float16, {"num_layers": 2}),
    ],
    ids=str,
)
def test_damaged_and_forged_blobs(name, chain, tmp_path):
    storage, dtype, options = chain
    (tmp_path / "model.bin").write_bytes(blob_of(small_chain(storage, dtype, **options)))
    program = build(name, Path(__file__).parent / "fuzz_blob.c")
    done = run(name, program, [tmp_path / "model.bin", 3000])
    assert done.returncode == 0, done.stderr.decode()
    assert 0 < int(done.stdout.split()[0]) < 3000
