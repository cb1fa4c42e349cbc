"""A part added to BlockMatrix, in that class alone, goes wherever its other parts go."""

import subprocess
import sys
from pathlib import Path

import triton_sparse_rnn

PROGRAM = """
import copy, dataclasses, pickle, sys, types
import torch

# The class is exchanged before any other module of the package sees it.
package = types.ModuleType("triton_sparse_rnn")
package.__path__ = [sys.argv[1]]
sys.modules["triton_sparse_rnn"] = package
from triton_sparse_rnn.sparse import block_matrix
Plain = block_matrix.BlockMatrix

@dataclasses.dataclass(frozen=True, eq=False)
class BlockMatrix(Plain):
    extra: torch.Tensor | None = None
    PARTS = (*Plain.PARTS, "extra")

    def kinds(self):
        return super().kinds() | ({} if self.extra is None else {"extra": (torch.uint8, self.values.shape[::2])})

    @classmethod
    def from_dense(cls, weight, pattern, **options):
        found = Plain.from_dense(weight, pattern, **options)
        extra = torch.randint(32, found.values.shape[::2], dtype=torch.uint8) if found.gates > 1 else None
        return cls(**found.parts(), shape=found.shape, gates=found.gates, extra=extra)

block_matrix.BlockMatrix = BlockMatrix
del sys.modules["triton_sparse_rnn"]

from torch import nn
from triton_sparse_rnn import load_sparse, save_sparse, sparsity_report, to_dense, to_sparse
from triton_sparse_rnn.kernels.cpu.addresses import addresses_of_parts
from triton_sparse_rnn.ops.flop_counting import count_operations
from triton_sparse_rnn.ops.layer_weights import LayerWeights, pack_layer_weights, unpack_layer_weights
from triton_sparse_rnn.ops.operators import recurrent_layer

def pruned():
    torch.manual_seed(0)
    layer = nn.LSTM(5, 32, proj_size=6, bias=False)
    with torch.no_grad():
        for weight in layer.parameters():
            weight[:, 1:] = 0
    return layer.eval()

layer = to_sparse(pruned(), storage=(16, 1), backend="reference")
stored = layer.stored_weights()

def check_same(weights):
    assert weights["weight_hr_l0"].extra is None
    assert all(torch.equal(weights[name].extra, stored[name].extra) for name in ("weight_ih_l0", "weight_hh_l0"))

other = to_sparse(pruned(), storage=(16, 1), backend="reference")
other.load_state_dict(layer.state_dict())
save_sparse(layer, sys.argv[2])
for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), load_sparse(pruned(), sys.argv[2])):
    check_same(same.stored_weights())

weight_ih, weight_hh, weight_hr = stored.values()
weights = LayerWeights(weight_ih, weight_hh, None, None, weight_hr)
tensors = pack_layer_weights([weights])
[again] = unpack_layer_weights(tensors, "LSTM", 5, (32, 6))
check_same({f"{name}_l0": weight for name, weight in again._asdict().items()})
for matrix in (weight_ih, weight_hh):
    matrix.check()
    assert matrix.nbytes == dataclasses.replace(matrix, extra=None).nbytes + matrix.extra.nbytes
    assert addresses_of_parts(matrix)["extra"] == matrix.extra.data_ptr()
assert addresses_of_parts(weight_hr)["extra"] == 0
assert layer.nbytes == sum(matrix.nbytes for matrix in stored.values())
shapes = [None if tensor is None else tensor.shape for tensor in tensors]
assert count_operations((3, 5), [], shapes) == 2 * 3 * sum(matrix.values.numel() for matrix in stored.values())

x = torch.randn(3, 2, 5)
y = layer(x)[0]
assert y.any() and torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x)[0], y)
assert torch.equal(to_dense(layer)(x)[0], pruned()(x)[0])
sparsity_report(layer)

wrong = pack_layer_weights([weights._replace(weight_hh=dataclasses.replace(weight_hh, extra=weight_hh.extra.int()))])
try:
    recurrent_layer(x[0], [torch.zeros(1, 2, 6), torch.zeros(1, 2, 32)], wrong, None, "LSTM", 32, "reference", None, 1)
except ValueError as error:
    assert "extra must be torch.uint8" in str(error)
    print("extra went everywhere")
"""


def test_an_added_part_goes_everywhere(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(Path(triton_sparse_rnn.__file__).parent), str(tmp_path / "model")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "extra went everywhere", result.stderr
