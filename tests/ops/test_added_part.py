"""A part added to BlockMatrix, in that class alone, goes wherever its other parts go."""

import subprocess
import sys
from pathlib import Path

import triton_sparse_rnn

PROGRAM = """
import dataclasses, sys, types
import torch

# The class is exchanged before any other module of the package sees it.
package = types.ModuleType("triton_sparse_rnn")
package.__path__ = [sys.argv[1]]
sys.modules["triton_sparse_rnn"] = package
from triton_sparse_rnn.sparse import block_matrix
Plain = block_matrix.BlockMatrix

@dataclasses.dataclass(frozen=True, eq=False)
class BlockMatrix(Plain):
    picks: torch.Tensor | None = None
    PARTS = (*Plain.PARTS, "picks")

    def kinds(self):
        return super().kinds() | {"picks": (torch.uint8, self.values.shape[::2])}

block_matrix.BlockMatrix = BlockMatrix
del sys.modules["triton_sparse_rnn"]

from triton_sparse_rnn.kernels.cpu.addresses import addresses_of_parts
from triton_sparse_rnn.ops.flop_counting import count_operations
from triton_sparse_rnn.ops.layer_weights import LayerWeights, pack_layer_weights, unpack_layer_weights
from triton_sparse_rnn.ops.operators import recurrent_layer

def make(rows, columns, gates):
    weight = torch.zeros(rows, columns)
    weight[:, 0] = 0.5
    plain = BlockMatrix.from_dense(weight, (4, 1), gates=gates)
    return dataclasses.replace(plain, picks=torch.zeros(plain.values.shape[::2], dtype=torch.uint8))

weights = LayerWeights(make(32, 3, 4), make(32, 6, 4), None, None, make(6, 8, 1))
tensors = pack_layer_weights([weights])
[again] = unpack_layer_weights(tensors, "LSTM", 3, (8, 6))
for matrix, unpacked in ((weights[i], again[i]) for i in (0, 1, 4)):
    unpacked.check()
    assert unpacked.picks is matrix.picks
    assert matrix.nbytes == dataclasses.replace(matrix, picks=None).nbytes + matrix.picks.nbytes
    assert addresses_of_parts(matrix)["picks"] == matrix.picks.data_ptr()

call = [torch.ones(5, 3), [torch.zeros(1, 5, 6), torch.zeros(1, 5, 8)], tensors, None, "LSTM", 8, "reference", None, 1]
y = recurrent_layer(*call)[0]
assert y.shape == (5, 6) and y.any()
shapes = [None if tensor is None else tensor.shape for tensor in tensors]
assert count_operations((5, 3), [], shapes) == 2 * 5 * sum(weights[i].values.numel() for i in (0, 1, 4))

wrong = dataclasses.replace(weights.weight_hh, picks=weights.weight_hh.picks.int())
call[2] = pack_layer_weights([weights._replace(weight_hh=wrong)])
try:
    recurrent_layer(*call)
except ValueError as error:
    assert "picks must be torch.uint8" in str(error)
    print("picks went everywhere")
"""


def test_an_added_part_goes_everywhere():
    command = [sys.executable, "-c", PROGRAM, str(Path(triton_sparse_rnn.__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "picks went everywhere", result.stderr
