"""Storage of a block-sparse weight: the one packed layout that is held in memory, saved, and read by the CPU kernels.

A weight [G * H, C] of a recurrent layer stacks G gates. Its blocks are ordered so that a kernel finishes BR hidden
units in one go: unit groups from top to bottom, in each group its gates, in each gate its stored blocks from left to
right. Example: G = 2, H = 4, C = 6, blocks of 2 x 2; letters are stored blocks, dots are zeros.

           block column  0 1 2                 row of blocks      starts   columns   values
    gate 0, units 0-1    A . B                 group 0, gate 0    0        0 2       A B
    gate 0, units 2-3    . C .      ->         group 0, gate 1    2        1 2       D E
    gate 1, units 0-1    . D E                 group 1, gate 0    4        1         C
    gate 1, units 2-3    . . .                 group 1, gate 1    5                            (ends at 5)

A block is stored column by column, values[block, c, r] = weight[row + r, column + c], so that one column of it is one
contiguous vector of BR weights: a processor multiplies it by one broadcast number of the input.

Picked units are stored in the same way, and beside them, in `picks`, where in its bank each weight stands; rows of
blocks are finer divided then (picked_storage.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from triton_sparse_rnn.sparse.blocks import check_filling_up, check_gates, count_blocks, from_blocks, to_blocks
from triton_sparse_rnn.sparse.bsr import make_bsr, read_bsr, rows_of_blocks, starts_of
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern, PatternLike, as_pattern
from triton_sparse_rnn.sparse.picked_storage import check_order, check_sizes, dense_places, pick_units
from triton_sparse_rnn.sparse.picks import ENTRY_UNITS, Picks

INDEX_DTYPE = torch.int32  # of columns, starts and bank
PICK_DTYPE = torch.uint8
INDEX_DTYPES = (INDEX_DTYPE, PICK_DTYPE)  # never of weights: what is written into such a part changes what is read
_SIZES_END = 2**31  # block columns are int32, and the product of two sizes is an int64
STORAGE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMatrix:
    """A block-sparse matrix [rows, columns]; see the top of the file for the layout.

    Made by `BlockMatrix.from_dense` or `BlockMatrix.from_bsr`; the tensors are not to be written to.

    Attributes:
        values: [NB, BC, BR], the stored blocks, each transposed; float32, float64, float16, bfloat16 or int8.
        columns: [NB], int32, the block column of each stored block, ascending within a row of blocks; of a picked unit
            its bank, in the order of picked_storage.py.
        starts: [ceil(H / BR) * G + 1], int32, where each row of blocks begins in `values`; with picks
            [ceil(H / BR) * G * ENTRY_UNITS + 1], where each class of entries in it does.
        shape: (rows, columns) of the matrix, rows = G * H.
        gates: G, the number of matrices [H, columns] stacked in it.
        scales: [rows], float32, for int8 only: a stored weight is its int8 value times the scale of its row.
        picks: [NB, BC, BR], uint8, for picks only: the place in its bank of the column of each weight.
        bank: [1], int32, for picks only: the columns of a bank.

    >>> weight = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 3.0, 0.0, 4.0]])
    >>> matrix = BlockMatrix.from_dense(weight, pattern=(2, 1))
    >>> matrix.values.tolist(), matrix.columns.tolist(), matrix.density
    ([[[1.0, 0.0]], [[2.0, 3.0]], [[0.0, 4.0]]], [0, 1, 3], 0.75)
    >>> picked = BlockMatrix.from_dense(weight, pattern=Picks(rows=2, bank=8))
    >>> picked.values.tolist(), picked.picks.tolist(), picked.density
    ([[[1.0, 3.0]], [[2.0, 4.0]]], [[[0, 1]], [[1, 3]]], 0.5)
    >>> torch.equal(matrix.to_dense(), weight) and torch.equal(picked.to_dense(), weight)
    True
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    shape: tuple[int, int]
    gates: int = 1
    scales: Tensor | None = None
    picks: Tensor | None = None
    bank: Tensor | None = None

    INDICES: ClassVar[tuple[str, ...]] = ("columns", "starts", "picks", "bank")  # tensors that say what a kernel reads
    PARTS: ClassVar[tuple[str, ...]] = ("values", "scales", *INDICES)  # all that are tensors

    def parts(self) -> dict[str, Tensor | None]:
        """Return the tensors by name, one for each of PARTS; None for what this matrix does without."""
        return {name: getattr(self, name) for name in self.PARTS}

    def kinds(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of each part that a matrix with these `values` has; the others must be None."""
        NB, BC, BR = self.values.shape
        gates, groups, _ = self.block_grid
        kinds = {"values": (self.values.dtype, (NB, BC, BR)), "columns": (INDEX_DTYPE, (NB,))}
        kinds["starts"] = INDEX_DTYPE, (groups * gates * self._classes + 1,)
        if self.values.dtype == torch.int8:
            kinds["scales"] = torch.float32, (self.shape[0],)
        if self.is_picked:
            kinds |= {"picks": (PICK_DTYPE, (NB, BC, BR)), "bank": (INDEX_DTYPE, (1,))}
        return kinds

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor | None], *, shape: tuple[int, int], gates: int) -> BlockMatrix:
        """Undo `parts`; the tensors are taken as they are, and looked at by `check` only."""
        return cls(**parts, shape=shape, gates=gates)  # type: ignore[arg-type]

    @classmethod
    def from_dense(
        cls, weight: Tensor, pattern: PatternLike, *, gates: int = 1, dtype: torch.dtype | None = None
    ) -> BlockMatrix:
        """Store every block that holds a weight other than zero (NaN is stored, a block of -0.0 is not).

        Args:
            weight: [G * H, columns], floating point, any strides.
            pattern: `Blocks`, or a pair (BR, BC); blocks at the edge of a gate are filled up with zeros. Both may be up
                to 4096, or as many as a gate has rows and columns. Or `Picks`, with which any weight can be stored:
                where rows have fewer weights in a bank than others of their unit group, they are padded.
            gates: G; its rows are cut gate by gate.
            dtype: how weights are stored, None for that of `weight`. int8 is symmetric, with one scale for each row.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
        if weight.dim() != 2 or not weight.is_floating_point() or weight.layout != torch.strided:
            raise ValueError(
                "weight must be a floating-point matrix of layout torch.strided, "
                f"got {weight.dtype} of shape {tuple(weight.shape)} and layout {weight.layout}"
            )
        check_gates(gates, weight.shape[0])
        dtype = check_storage_dtype(weight.dtype if dtype is None else dtype)
        pattern = as_pattern(pattern)
        weight = weight.detach()
        # What is zero is decided before rounding: a tiny weight that a narrow dtype rounds to 0 stays in its block.
        blocks, indices = _cut(weight.unflatten(0, (gates, -1)), pattern)
        matrix = cls(blocks.transpose(1, 2), **indices, shape=(weight.shape[0], weight.shape[1]), gates=gates)
        if dtype == torch.int8:
            scales = row_scales(weight)
            blocks = (blocks / matrix._by_block(scales, padding=1)).round_().clamp_(-127, 127)
            matrix = dataclasses.replace(matrix, scales=scales)
        values = blocks.to(dtype)
        if dtype.is_floating_point and not torch.equal(values.isinf(), blocks.isinf()):
            raise ValueError(f"weight holds values beyond {torch.finfo(dtype).max:.3g}, the largest number of {dtype}")
        return dataclasses.replace(matrix, values=values.transpose(1, 2).contiguous())

    @classmethod
    def from_bsr(cls, matrix: Tensor, *, shape: tuple[int, int] | None = None, gates: int = 1) -> BlockMatrix:
        """Take over the blocks of a torch BSR tensor, stored zeros included.

        Args:
            matrix: [G * ceil(H / BR) * BR, ceil(columns / BC) * BC], layout torch.sparse_bsr.
            shape: (G * H, columns) without the filling up of edge blocks; None for the shape of `matrix`.
            gates: G, as for `from_dense`.

        Raises:
            ValueError, TypeError: an argument is wrong, or the indices of `matrix` do not fit together.
        """
        blocks, columns, starts, shape = read_bsr(matrix, shape, gates)
        result = cls(
            values=blocks.transpose(1, 2).contiguous(),
            columns=columns.to(INDEX_DTYPE),
            starts=starts.to(INDEX_DTYPE),
            shape=shape,
            gates=gates,
        )
        result.check()
        return result

    def to_bsr(self) -> Tensor:
        """Return a torch BSR tensor; the edge blocks of each gate stay filled up with zeros.

        Raises:
            ValueError: weights are stored in picks, for which torch has no layout.
        """
        if self.is_picked:
            raise ValueError("a BSR tensor holds blocks, and these weights are stored in picks: take to_dense()")
        return make_bsr(self.scaled_blocks(), self.columns, self.starts, self.shape, self.gates)

    def to_dense(self) -> Tensor:
        """Return the matrix [rows, columns] as an ordinary tensor; int8 weights come back times their scale."""
        gates, groups, block_columns = self.block_grid
        BR, BC = self.block_size
        scaled = self.scaled_blocks()
        if self.picks is not None:
            by_row = scaled.new_zeros(groups * gates, BR, self.shape[1])
            # A padded place adds 0 to the weight that its row has there.
            rows = self.block_rows[:, None, None] * BR + torch.arange(BR, dtype=torch.int64, device=scaled.device)
            places = rows * self.shape[1] + self.input_places()  # [NB, BC, BR]
            by_row.view(-1).index_add_(0, places.flatten(), scaled.transpose(1, 2).flatten())
            by_gate = by_row.view(groups, gates, BR, -1).transpose(0, 1).flatten(1, 2)
            return by_gate[:, : self.shape[0] // gates].flatten(0, 1).contiguous()
        blocks = scaled.new_zeros(groups * gates, block_columns, BR, BC)
        blocks[self.block_rows, self.columns.long()] = scaled
        whole = blocks.view(groups, gates, block_columns, BR, BC).transpose(0, 1)
        return from_blocks(whole, self.shape[0] // gates, self.shape[1]).flatten(0, 1)

    def check(self, *, indices: bool = True) -> None:
        """Raise ValueError unless the tensors fit together: kernels read as far as `starts` and `columns` say.

        Args:
            indices: also read what `starts` and `columns` hold; False reads no tensor.
        """
        check_storage_dtype(self.values.dtype, "values")
        _check_shape(self.shape)
        check_gates(self.gates, self.shape[0])
        if self.values.dim() != 3 or 0 in self.block_size:
            raise ValueError(
                f"values must be blocks [NB, BC, BR] that are not empty, got shape {tuple(self.values.shape)}"
            )
        check_filling_up(self.block_size, self.shape[0] // self.gates, self.shape[1])
        kinds, dtype, device = self.kinds(), self.values.dtype, self.values.device
        for name, tensor in self.parts().items():
            if (tensor is None) == (name in kinds):
                raise ValueError(
                    f"{name} must {'not ' if tensor is None else ''}be None beside "
                    + (f"values of {dtype}" if name == "scales" else "picks" if self.is_picked else "blocks")
                )
            if tensor is not None and (tensor.dtype, tuple(tensor.shape)) != kinds[name]:
                wanted, shape = kinds[name]
                raise ValueError(
                    f"{name} must be {wanted} of shape {shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}: "
                    f"parts of a {self.shape} matrix that do not fit together"
                )
            if tensor is not None and not (tensor.is_contiguous() and tensor.device == device):
                raise ValueError(f"{name} must be contiguous and on {device}, the device of values")
        if indices:
            self._check_indices()

    def _check_indices(self) -> None:
        NB, block_columns = len(self.values), self.block_grid[2]
        if self.starts[0] != 0 or self.starts[-1] != NB or (self.starts.diff() < 0).any():
            raise ValueError(f"starts must rise from 0 to the {NB} stored blocks")
        if self.picks is not None:
            check_sizes(self._bank, self.block_size[1])
            check_order(self.picks, self.columns, self.starts, self._bank, self.shape[1])
            return
        if NB and not 0 <= self.columns.min() <= self.columns.max() < block_columns:
            raise ValueError(f"columns must lie in 0..{block_columns - 1}")
        if ((self.block_rows * block_columns + self.columns).diff() <= 0).any():
            raise ValueError("columns must ascend within each row of blocks")

    def scaled_blocks(self) -> Tensor:
        """The stored blocks [NB, BR, BC], upright and with scales applied."""
        blocks = self.values.transpose(1, 2)
        return blocks if self.scales is None else blocks * self._by_block(self.scales)

    def input_places(self) -> Tensor:
        """The column of each weight, int64: [NB, BC], as all rows of a block have the same; of picks [NB, BC, BR]."""
        if self.picks is not None:
            return dense_places(self.picks, self.columns, self._bank)
        BC = self.block_size[1]
        return self.columns.long()[:, None] * BC + torch.arange(BC, dtype=torch.int64, device=self.columns.device)

    def _by_block(self, rows: Tensor, padding: float = 0) -> Tensor:
        """A number for each row of the matrix, as [NB, BR, 1] for each row of each block."""
        BR = self.block_size[0]
        gates = rows.view(self.gates, -1)
        missing = -gates.shape[1] % BR
        groups = torch.nn.functional.pad(gates, (0, missing), value=padding).unflatten(1, (-1, BR)).transpose(0, 1)
        return groups.reshape(-1, BR)[self.block_rows].unsqueeze(-1)

    @property
    def block_rows(self) -> Tensor:
        """[NB], int64, the row of blocks in which each stored block stands (group * G + gate)."""
        return rows_of_blocks(self.starts[:: self._classes].contiguous(), len(self.columns))

    @property
    def is_picked(self) -> bool:
        """Whether weights are stored in picks; `check` raises where one of `picks` and `bank` is missing."""
        return self.picks is not None or self.bank is not None

    @property
    def pattern(self) -> Pattern:
        """In which the weights are stored."""
        BR, BC = self.block_size
        return Picks(BR, self._bank, BC) if self.is_picked else Blocks(BR, BC)

    @property
    def _bank(self) -> int:
        """The columns of a bank, of picks."""
        assert self.bank is not None
        return int(self.bank)

    @property
    def _classes(self) -> int:
        """Starts of each row of blocks."""
        return ENTRY_UNITS if self.is_picked else 1

    @property
    def block_size(self) -> tuple[int, int]:
        """(BR, BC)."""
        return self.values.shape[2], self.values.shape[1]

    @property
    def block_grid(self) -> tuple[int, int, int]:
        """(G, unit groups, block columns): as many blocks or picked units as there would be without zeros."""
        groups, block_columns = count_blocks(self.shape[0] // self.gates, self.shape[1], self.block_size)
        return self.gates, groups, block_columns

    @property
    def padded_columns(self) -> int:
        """The columns, filled up to whole blocks or banks: so many inputs a kernel reads."""
        width = self._bank if self.is_picked else self.block_size[1]
        return -(-self.shape[1] // width) * width

    @property
    def density(self) -> float:
        """Stored blocks as a fraction of all blocks."""
        gates, groups, block_columns = self.block_grid
        return len(self.values) / max(1, gates * groups * block_columns)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(tensor.nbytes for tensor in self.parts().values() if tensor is not None)


def _cut(weight: Tensor, pattern: Pattern) -> tuple[Tensor, dict[str, Tensor]]:
    """Cut a weight [G, H, C] into what is to be stored, [NB, BR, BC], and the indices."""
    if not isinstance(pattern, (Blocks, Picks)):
        raise TypeError(f"a BlockMatrix stores Blocks or Picks, got {pattern!r}")
    pattern.check_size(weight.shape[1], weight.shape[2], "a matrix")
    if isinstance(pattern, Picks):
        blocks, picks, columns, starts = pick_units(weight, pattern)
        bank = torch.tensor([pattern.bank], dtype=INDEX_DTYPE, device=weight.device)
        return blocks, {
            "columns": columns.to(INDEX_DTYPE),
            "starts": starts.to(INDEX_DTYPE),
            "picks": picks,
            "bank": bank,
        }
    groups = to_blocks(weight, pattern.block_size).transpose(0, 1)  # [groups, G, block columns, BR, BC]
    kept = groups.ne(0).flatten(-2).any(-1)
    starts = starts_of(kept.sum(-1).flatten()).to(INDEX_DTYPE)
    return groups[kept], {"columns": kept.nonzero()[:, 2].to(INDEX_DTYPE), "starts": starts}


def _check_shape(shape: tuple[int, int]) -> None:
    whole = not any(isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)) for size in shape)
    if len(shape) != 2 or not whole or not all(0 <= size < _SIZES_END for size in shape):
        raise ValueError(f"shape must be two integers from 0 to {_SIZES_END - 1}, rows and columns, got {shape!r}")


def check_storage_dtype(dtype: torch.dtype, name: str = "dtype") -> torch.dtype:
    """Return dtype if weights can be stored in it, or raise naming the argument."""
    if dtype not in STORAGE_DTYPES:
        raise ValueError(f"{name} must be one of {', '.join(map(str, STORAGE_DTYPES))}, got {dtype}")
    return dtype


def row_scales(weight: Tensor) -> Tensor:
    """Return the scales [R], float32, with which the rows of a weight [R, C] become integers -127..127.

    Raises:
        ValueError: a weight is not finite, which no int8 can say.
    """
    low, high = weight.aminmax(dim=1)
    largest = torch.maximum(-low, high).float()
    if not largest.isfinite().all():
        raise ValueError("weight holds NaN or infinity, which int8 cannot store; use a floating-point weight_dtype")
    scales = largest / 127
    return scales.where(scales > 0, 1)
