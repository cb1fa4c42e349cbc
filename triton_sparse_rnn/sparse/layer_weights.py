"""The weights of one direction of one layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from triton_sparse_rnn.sparse.block_matrix import BlockMatrix


class LayerWeights(NamedTuple):
    """What nn calls weight_ih_l{k}, weight_hh_l{k}, bias_ih_l{k}, bias_hh_l{k} and weight_hr_l{k}.

    weight_ih [G * H, input] is in blocks or, where it was kept dense, an ordinary tensor in the dtype of the layer's
    inputs; weight_hh [G * H, H or proj_size] and weight_hr [proj_size, H], which has one gate, are in blocks; biases
    [G * H] are ordinary tensors. Biases and weight_hr are None where the layer has none.
    """

    weight_ih: BlockMatrix | Tensor
    weight_hh: BlockMatrix
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: BlockMatrix | None = None
