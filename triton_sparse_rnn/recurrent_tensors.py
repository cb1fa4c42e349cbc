"""Which tensors of a state_dict are weights of recurrent layers, and where a tensor of any kind is zero."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import GATE_NAMES

NAMES_BY_COUNT = {len(names): names for names in GATE_NAMES.values()}
_MATRIX = re.compile(r"(?P<prefix>.*)weight_(?P<kind>ih|hh|hr)(?P<suffix>(_l\d+(_reverse)?)?)")


def is_recurrent(name: str) -> bool:
    """Whether a tensor has the name of a weight of a recurrent layer or cell.

    >>> is_recurrent("rnn.weight_ih_l0"), is_recurrent("fc.weight")
    (True, False)
    """
    return _MATRIX.fullmatch(name) is not None


def find_gates(tensors: Mapping[str, Tensor | BlockMatrix]) -> Iterator[tuple[str, int]]:
    """Yield each recurrent and input weight with its G, which the shape of the layer's recurrent weight tells.

    Tensors of such names that are no real matrices, or do not fit together, are left out.

    Raises:
        ValueError: blocks are of another G.
    """
    for name, tensor in tensors.items():
        match = _MATRIX.fullmatch(name)
        if match is None:
            continue
        recurrent = tensors.get(f"{match['prefix']}weight_hh{match['suffix']}")
        projection = tensors.get(f"{match['prefix']}weight_hr{match['suffix']}")
        if recurrent is None or not (_is_real_matrix(recurrent) and _is_real_matrix(tensor)):
            continue
        rows, columns = recurrent.shape
        hidden = projection.shape[-1] if projection is not None and _is_real_matrix(projection) else columns
        gates, rest = divmod(rows, max(1, hidden))
        if rest == 0 and gates in NAMES_BY_COUNT:
            is_projection = match["kind"] == "hr"
            if tensor.shape == (columns, hidden) if is_projection else tensor.shape[0] == rows:
                gates = 1 if is_projection else gates
                if isinstance(tensor, BlockMatrix) and tensor.gates != gates:
                    raise ValueError(f"{name} is of {gates} gates in its layer, but is stored as of {tensor.gates}")
                yield name, gates


def _is_real_matrix(tensor: Tensor | BlockMatrix) -> bool:
    return len(tensor.shape) == 2 and not (isinstance(tensor, Tensor) and tensor.is_complex())


def is_nonzero(name: str, tensor: Tensor) -> Tensor:
    """Where a tensor of any layout or dtype is not zero, in plain memory.

    Raises:
        ValueError: torch does not say it.
    """
    try:
        tensor = tensor.detach()
        return (tensor.dequantize() if tensor.is_quantized else tensor.to_dense()).ne(0)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}, {tensor.dtype} of layout {tensor.layout}, cannot be read: {reason}") from error
