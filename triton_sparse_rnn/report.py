"""How sparse the recurrent layers of a model are: per weight and gate, with the bytes and products that remain."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triton_sparse_rnn.names import clean_names
from triton_sparse_rnn.nn.computed_weights import join_parts
from triton_sparse_rnn.nn.model_tensors import tensors_by_name
from triton_sparse_rnn.recurrent_tensors import NAMES_BY_COUNT, find_gates, is_nonzero
from triton_sparse_rnn.sparse.block_matrix import STORAGE_DTYPES, BlockMatrix
from triton_sparse_rnn.sparse.blocks import VECTOR_ROWS
from triton_sparse_rnn.sparse.patterns import PatternLike, as_pattern
from triton_sparse_rnn.sparse.row_blocks import row_blocks
from triton_sparse_rnn.tables import align

UNEVEN_ABOVE = 1.2  # of WeightReport.fullest_group: from where on a user is told so
_BLOCKS = re.compile(r".*weight_(ih|hh|hr)_l\d+(_reverse)?_(values|columns|starts|scales)")  # see PersistentLayer
_HEADINGS = ["weight", "gate", "shape", "density", "non-zero", "blocks", "bytes", "MAC/step"]


@dataclasses.dataclass(frozen=True)
class GateReport:
    """One gate of a weight: a matrix [H, columns].

    Attributes:
        nonzero: weights other than zero.
        stored_blocks, stored_bytes: what is kept in block storage, and the bytes of its values and columns.
        multiply_accumulates: products per time step and sequence with the stored blocks.
    """

    name: str
    shape: tuple[int, int]
    nonzero: int
    stored_blocks: int
    stored_bytes: int
    multiply_accumulates: int

    @property
    def density(self) -> float:
        return self.nonzero / max(1, self.shape[0] * self.shape[1])


@dataclasses.dataclass(frozen=True)
class BlockCount:
    """A weight in blocks of some size.

    Attributes:
        stored_blocks: blocks that are kept.
        density: these as a fraction of all blocks.
        stored_bytes: of the whole block storage.
        vector_multiply_adds: of VECTOR_ROWS numbers, per time step and sequence: a column of a block takes one for each
            VECTOR_ROWS rows begun.
    """

    block_size: tuple[int, int]
    stored_blocks: int
    density: float
    stored_bytes: int
    vector_multiply_adds: int


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """A weight_ih, weight_hh or weight_hr [G * H, columns].

    Attributes:
        block_size: (BR, BC); None of a weight that a converted layer keeps dense.
        stored_bytes: of the whole block storage, row starts and scales included.
        dense_bytes: of the weight without block storage.
        low_blocks: where BR is no multiple of VECTOR_ROWS, the weight in these blocks and in VECTOR_ROWS x BC; or None.
        fullest_group: in blocks of 16 x 1, those of the fullest gate of a unit group as a multiple of the mean. On a
            GPU the others wait for it at every step.
    """

    name: str
    shape: tuple[int, int]
    block_size: tuple[int, int] | None
    gates: tuple[GateReport, ...]
    stored_bytes: int
    dense_bytes: int
    low_blocks: tuple[BlockCount, BlockCount] | None = None
    fullest_group: float = 1.0

    @property
    def nonzero(self) -> int:
        return sum(gate.nonzero for gate in self.gates)

    @property
    def stored_blocks(self) -> int:
        return sum(gate.stored_blocks for gate in self.gates)

    @property
    def multiply_accumulates(self) -> int:
        return sum(gate.multiply_accumulates for gate in self.gates)

    @property
    def dense_multiply_accumulates(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def density(self) -> float:
        return self.nonzero / max(1, self.shape[0] * self.shape[1])


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """Any other tensor of the model: always stored whole."""

    name: str
    shape: tuple[int, ...]
    nonzero: int
    count: int
    nbytes: int

    @property
    def density(self) -> float:
        return self.nonzero / max(1, self.count)


@dataclasses.dataclass(frozen=True)
class SparsityReport:
    """What `sparsity_report` found; str() of it is a table.

    Attributes:
        weights: input, recurrent and projection weights of every recurrent layer.
        others: all other tensors.
        computed: weights in a state_dict that a parametrization computes; what it does, only the module tells.
    """

    weights: tuple[WeightReport, ...]
    others: tuple[TensorReport, ...]
    computed: tuple[str, ...] = ()

    @property
    def density(self) -> float:
        """Of all `weights` together; nan where there are none."""
        count = sum(weight.dense_multiply_accumulates for weight in self.weights)
        return self.nonzero / count if count else float("nan")

    @property
    def nonzero(self) -> int:
        return sum(weight.nonzero for weight in self.weights)

    @property
    def stored_bytes(self) -> int:
        return sum(weight.stored_bytes for weight in self.weights)

    @property
    def dense_bytes(self) -> int:
        return sum(weight.dense_bytes for weight in self.weights)

    @property
    def multiply_accumulates(self) -> int:
        return sum(weight.multiply_accumulates for weight in self.weights)

    @property
    def dense_multiply_accumulates(self) -> int:
        return sum(weight.dense_multiply_accumulates for weight in self.weights)

    def __str__(self) -> str:
        return "\n".join([*self._weight_lines(), *self._computed_lines(), *self._other_lines()])

    def _weight_lines(self) -> list[str]:
        if not self.weights:
            what = " that is stored as it is" if self.computed else ""
            return [f"No recurrent layer: no weight_hh of an nn.RNN, nn.GRU or nn.LSTM{what}."]
        rows = [_HEADINGS]
        for weight in self.weights:
            blocks = "dense" if weight.block_size is None else _blocks(weight.stored_blocks, weight.block_size)
            rows.append([weight.name, "all", *_cells(weight, blocks)])
            if len(weight.gates) > 1:
                for gate in weight.gates:
                    blocks = "dense" if weight.block_size is None else f"{gate.stored_blocks:,}"
                    rows.append(["", gate.name, *_cells(gate, blocks)])
        lines = align(rows, right=range(2, len(_HEADINGS)))
        return [
            *lines,
            "",
            f"Recurrent layers: {self.density:.1%} dense, {self.nonzero:,} non-zero weights.",
            f"  bytes     {self.stored_bytes:,} in blocks, {self.dense_bytes:,} dense"
            f" ({self.dense_bytes / max(1, self.stored_bytes):.2f}x)",
            f"  MAC/step  {self.multiply_accumulates:,} in blocks, {self.dense_multiply_accumulates:,} dense"
            f" ({self.dense_multiply_accumulates / max(1, self.multiply_accumulates):.2f}x)",
            *self._low_block_lines(),
            *self._uneven_lines(),
        ]

    def _computed_lines(self) -> list[str]:
        if not self.computed:
            return []
        advice = "report the module, or save it after torch.nn.utils.parametrize.remove_parametrizations"
        return ["", f"Computed by a parametrization, from tensors below: {', '.join(self.computed)}; {advice}."]

    def _low_block_lines(self) -> list[str]:
        rows = [["weight", "blocks", "of all", "bytes", "vector MAC/step"]]
        for weight in self.weights:
            for name, count in zip((weight.name, "  would be"), weight.low_blocks or (), strict=False):
                numbers = f"{count.density:.1%}", f"{count.stored_bytes:,}", f"{count.vector_multiply_adds:,}"
                rows.append([name, _blocks(count.stored_blocks, count.block_size), *numbers])
        if len(rows) == 1:
            return []
        heading = (
            f"A block takes as many vector multiply-adds as one of the next multiple of {VECTOR_ROWS} rows, "
            "and on a GPU as many bytes:"
        )
        return ["", heading, *align(rows, right=range(1, 5))]

    def _uneven_lines(self) -> list[str]:
        """About recurrent weights, as only they are multiplied step by step."""
        rows = [
            [f"  {weight.name}", f"{weight.fullest_group:.2f} times the mean"]
            for weight in self.weights
            if "weight_hh" in weight.name and weight.fullest_group > UNEVEN_ABOVE
        ]
        heading = (
            "On a GPU each gate of 16 units takes as long as the one with the most blocks; "
            "a Pruner with balanced=True makes them equal (accuracy not measured):"
        )
        return ["", heading, *align(rows, right=())] if rows else []

    def _other_lines(self) -> list[str]:
        if not self.others:
            return []
        rows = [["other tensors", "shape", "density", "non-zero", "bytes"]]
        for tensor in self.others:
            shape = " x ".join(map(str, tensor.shape)) or "scalar"
            rows.append([tensor.name, shape, f"{tensor.density:.1%}", f"{tensor.nonzero:,}", f"{tensor.nbytes:,}"])
        return ["", *align(rows, right=range(1, 5))]


def sparsity_report(model: nn.Module | Mapping[str, Any], *, pattern: PatternLike = (16, 1)) -> SparsityReport:
    """Count what is zero, and what would be stored and multiplied without it.

    Args:
        model: a module, or a state_dict of one. Layers that `to_sparse` converted are reported as they are stored;
            values of a mapping may be BlockMatrix. Anything but tensors in a mapping is left out. A weight that
            a parametrization or a hook computes is counted by its values; a mapping tells those of weight_norm and
            prune, the functions. Names are reported without what wrappers such as torch.compile put in.
        pattern: in which weights that are not stored in blocks are counted.
    Returns:
        A report for every weight_ih, weight_hh and weight_hr (of nn.RNN, nn.GRU, nn.LSTM and their cells) and gate.
    Raises:
        TypeError: `model` is neither.
        ValueError: it has no tensors, or some whose numbers cannot be read (on the meta device, nested, of a dtype that
            torch cannot compare), or is the bare state_dict of a converted model, which does not tell sizes.

    >>> layer = nn.GRU(2, 16, bias=False)
    >>> _ = layer.weight_hh_l0.data[:, 4:].zero_()
    >>> print(sparsity_report(layer))
    weight        gate    shape  density  non-zero      blocks  bytes  MAC/step
    weight_ih_l0  all    48 x 2   100.0%        96   6 of 16x1    424        96
                  r      16 x 2   100.0%        32           2    136        32
                  z      16 x 2   100.0%        32           2    136        32
                  n      16 x 2   100.0%        32           2    136        32
    weight_hh_l0  all   48 x 16    25.0%       192  12 of 16x1    832       192
                  r     16 x 16    25.0%        64           4    272        64
                  z     16 x 16    25.0%        64           4    272        64
                  n     16 x 16    25.0%        64           4    272        64
    <BLANKLINE>
    Recurrent layers: 33.3% dense, 288 non-zero weights.
      bytes     1,256 in blocks, 3,456 dense (2.75x)
      MAC/step  288 in blocks, 864 dense (3.00x)
    """
    block_size = as_pattern(pattern).block_size
    computed: tuple[str, ...] = ()
    if isinstance(model, nn.Module):
        tensors = tensors_by_name(model)
    elif isinstance(model, Mapping):
        state = {str(name): value for name, value in model.items() if isinstance(value, (Tensor, BlockMatrix))}
        names = clean_names(state)
        tensors, computed = join_parts({names[path]: value for path, value in state.items()})
    else:
        raise TypeError(f"model must be an nn.Module or a state_dict, got {type(model).__name__}")
    if not tensors:
        raise ValueError("model has no tensors to report")
    if missing := [name for name, value in tensors.items() if isinstance(value, Tensor) and value.is_meta]:
        raise ValueError(f"model has tensors without data on the meta device, such as {missing[0]}")
    if nested := [name for name, value in tensors.items() if isinstance(value, Tensor) and value.is_nested]:
        raise ValueError(f"model has nested tensors, which have several shapes, such as {nested[0]}")
    if parts := [name for name in tensors if _BLOCKS.fullmatch(name)]:
        raise ValueError(
            f"model has blocks of a converted layer without their sizes, such as {parts[0]}: "
            "give the module itself, or save it by save_sparse()"
        )
    gates = dict(find_gates(tensors))
    return SparsityReport(
        tuple(_report_weight(name, tensors, count, block_size) for name, count in gates.items()),
        tuple(_report_tensor(name, value) for name, value in tensors.items() if name not in gates),
        computed,
    )


def _report_weight(
    name: str, tensors: Mapping[str, Tensor | BlockMatrix], gates: int, block_size: tuple[int, int]
) -> WeightReport:
    weight = tensors[name]
    if isinstance(weight, BlockMatrix):
        return _report_blocks(name, weight, math.prod(weight.shape) * weight.scaled_blocks().element_size())
    if isinstance(tensors.get(name.replace("weight_ih", "weight_hh")), BlockMatrix):
        return _report_kept_dense(name, weight, gates)
    dtype = weight.dtype if weight.dtype in STORAGE_DTYPES and weight.is_floating_point() else torch.float32
    kept = is_nonzero(name, weight).to(dtype)  # all that is counted
    stored = BlockMatrix.from_dense(kept, block_size, gates=gates)
    return _report_blocks(name, stored, weight.numel() * weight.element_size())


def _report_blocks(name: str, stored: BlockMatrix, dense_bytes: int) -> WeightReport:
    (rows, columns), gates = stored.shape, stored.gates
    BR, BC = stored.block_size
    blocks, block_gates = stored.scaled_blocks(), stored.block_rows % gates
    block_bytes = BR * BC * stored.values.element_size() + stored.columns.element_size()
    block_counts = torch.bincount(block_gates, minlength=gates)
    nonzero = block_counts.new_zeros(gates).index_add_(0, block_gates, blocks.ne(0).sum((1, 2))).tolist()
    counts = block_counts.tolist()
    parts = tuple(
        GateReport(gate, (rows // gates, columns), nonzero[g], counts[g], counts[g] * block_bytes, counts[g] * BR * BC)
        for g, gate in enumerate(NAMES_BY_COUNT[gates])
    )
    low_blocks = (_count_blocks(stored), _count_blocks(_taller(stored))) if BR % VECTOR_ROWS else None
    return WeightReport(
        name, (rows, columns), (BR, BC), parts, stored.nbytes, dense_bytes, low_blocks, _fullest_group(stored)
    )


def _report_kept_dense(name: str, weight: Tensor, gates: int) -> WeightReport:
    nonzero = is_nonzero(name, weight).unflatten(0, (gates, -1)).sum((1, 2)).tolist()
    (rows, columns), nbytes = weight.shape, weight.numel() * weight.element_size()
    parts = tuple(
        GateReport(gate, (rows // gates, columns), nonzero[g], 0, nbytes // gates, rows // gates * columns)
        for g, gate in enumerate(NAMES_BY_COUNT[gates])
    )
    return WeightReport(name, (rows, columns), None, parts, nbytes, nbytes)


def _taller(stored: BlockMatrix) -> BlockMatrix:
    """The same weights in blocks of VECTOR_ROWS rows, in the same dtype."""
    dense = dataclasses.replace(stored, scales=None).to_dense()  # for int8 its integers
    wide = dense if dense.is_floating_point() else dense.float()
    taller = BlockMatrix.from_dense(wide, (VECTOR_ROWS, stored.block_size[1]), gates=stored.gates)
    return dataclasses.replace(taller, values=taller.values.to(dense.dtype), scales=stored.scales)


def _fullest_group(stored: BlockMatrix) -> float:
    """See WeightReport."""
    if stored.values.dtype == torch.int8:
        stored = dataclasses.replace(stored, values=stored.values.to(torch.float16), scales=None)
    counts = row_blocks(stored).starts.diff()
    return int(counts.max()) * len(counts) / int(counts.sum()) if counts.any() else 1.0


def _count_blocks(matrix: BlockMatrix) -> BlockCount:
    (BR, BC), NB = matrix.block_size, len(matrix.values)
    return BlockCount((BR, BC), NB, matrix.density, matrix.nbytes, NB * BC * -(-BR // VECTOR_ROWS))


def _report_tensor(name: str, tensor: Tensor | BlockMatrix) -> TensorReport:
    if isinstance(tensor, Tensor):
        nonzero, itemsize = is_nonzero(name, tensor), tensor.element_size()
    else:
        nonzero, itemsize = tensor.scaled_blocks().ne(0), tensor.scaled_blocks().element_size()
    shape, count = tuple(tensor.shape), math.prod(tensor.shape)
    return TensorReport(name, shape, int(nonzero.sum()), count, count * itemsize)


def _blocks(count: int, block_size: tuple[int, int]) -> str:
    return f"{count:,} of {block_size[0]}x{block_size[1]}"


def _cells(part: WeightReport | GateReport, blocks: str) -> Sequence[str]:
    return (
        f"{part.shape[0]} x {part.shape[1]}",
        f"{part.density:.1%}",
        f"{part.nonzero:,}",
        blocks,
        f"{part.stored_bytes:,}",
        f"{part.multiply_accumulates:,}",
    )
