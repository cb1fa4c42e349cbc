"""What a sparsity report holds, and how it reads as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from triton_sparse_rnn.sparse.blocks import VECTOR_ROWS
from triton_sparse_rnn.sparse.patterns import Pattern
from triton_sparse_rnn.sparse.picks import Picks
from triton_sparse_rnn.tables import align

UNEVEN_ABOVE = 1.2  # of WeightReport.fullest_group: from where on a user is told so
_HEADINGS = ["weight", "gate", "shape", "density", "non-zero", "stored", "bytes", "MAC/step"]


@dataclasses.dataclass(frozen=True)
class GateReport:
    """One gate of a weight: a matrix [H, columns].

    Attributes:
        nonzero: weights other than zero.
        stored_units, stored_bytes: what of a pattern is kept, such as blocks, and the bytes of its values and indices.
        multiply_accumulates: products per time step and sequence with these.
    """

    name: str
    shape: tuple[int, int]
    nonzero: int
    stored_units: int
    stored_bytes: int
    multiply_accumulates: int

    @property
    def density(self) -> float:
        return self.nonzero / max(1, self.shape[0] * self.shape[1])


@dataclasses.dataclass(frozen=True)
class UnitCount:
    """A weight in some pattern.

    Attributes:
        stored_units: that are kept.
        density: these as a fraction of all units.
        stored_bytes: of the whole storage.
        vector_multiply_adds: of VECTOR_ROWS numbers, per time step and sequence.
    """

    pattern: Pattern
    stored_units: int
    density: float
    stored_bytes: int
    vector_multiply_adds: int


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """A weight_ih, weight_hh or weight_hr [G * H, columns], or the weight of a linear layer.

    Attributes:
        pattern: in which it is stored; None of a weight that a converted layer keeps dense.
        stored_bytes: of the whole storage, row starts and scales included.
        dense_bytes: of the weight as a dense matrix.
        half_empty: where units leave vectors partly empty, the weight in these and in patterns that do not; else None.
        fullest_group: in blocks of 16 x 1, those of the fullest gate of a unit group as a multiple of the mean. On a
            GPU the others wait for it at every step. 1 for picks, which no GPU runs.
        recurrent: whether it is of a recurrent layer, and not of a linear one.
    """

    name: str
    shape: tuple[int, int]
    pattern: Pattern | None
    gates: tuple[GateReport, ...]
    stored_bytes: int
    dense_bytes: int
    half_empty: tuple[UnitCount, ...] | None = None
    fullest_group: float = 1.0
    recurrent: bool = True

    @property
    def nonzero(self) -> int:
        return sum(gate.nonzero for gate in self.gates)

    @property
    def stored_units(self) -> int:
        return sum(gate.stored_units for gate in self.gates)

    @property
    def multiply_accumulates(self) -> int:
        return sum(gate.multiply_accumulates for gate in self.gates)

    @property
    def stored_zeros(self) -> int:
        """Zeros that are stored and multiplied: they fill up blocks, rows of a bank with fewer weights, and edges."""
        return self.multiply_accumulates - self.nonzero

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
        weights: input, recurrent and projection weights of every recurrent layer, and linear ones that count too.
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
    def stored_zeros(self) -> int:
        return sum(weight.stored_zeros for weight in self.weights)

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
            stored = "dense" if weight.pattern is None else weight.pattern.describe(weight.stored_units)
            rows.append([weight.name, "all", *_cells(weight, stored)])
            if len(weight.gates) > 1:
                for gate in weight.gates:
                    stored = "dense" if weight.pattern is None else f"{gate.stored_units:,}"
                    rows.append(["", gate.name, *_cells(gate, stored)])
        lines = align(rows, right=range(2, len(_HEADINGS)))
        return [
            *lines,
            "",
            f"{self._kinds()} layers: {self.density:.1%} dense, {self.nonzero:,} non-zero weights.",
            f"  bytes     {self.stored_bytes:,} stored, {self.dense_bytes:,} dense"
            f" ({self.dense_bytes / max(1, self.stored_bytes):.2f}x)",
            f"  MAC/step  {self.multiply_accumulates:,} stored, {self.dense_multiply_accumulates:,} dense"
            f" ({self.dense_multiply_accumulates / max(1, self.multiply_accumulates):.2f}x)",
            *self._zeros_lines(),
            *self._picks_lines(),
            *self._half_empty_lines(),
            *self._uneven_lines(),
        ]

    def _kinds(self) -> str:
        kinds = {"Recurrent" if weight.recurrent else "Linear" for weight in self.weights}
        return "Recurrent and linear" if len(kinds) == 2 else kinds.pop()

    def _zeros_lines(self) -> list[str]:
        if not self.stored_zeros:
            return []
        share = self.stored_zeros / self.multiply_accumulates
        return [f"  zeros     {self.stored_zeros:,} among the stored weights ({share:.1%})"]

    def _picks_lines(self) -> list[str]:
        """Say what a picked unit is, once for each kind."""
        found = dict.fromkeys(weight.pattern for weight in self.weights if isinstance(weight.pattern, Picks))
        return [f"{'A ' + pattern.describe()}: {_in_words(pattern)}." for pattern in found]

    def _computed_lines(self) -> list[str]:
        if not self.computed:
            return []
        advice = "report the module, or save it after torch.nn.utils.parametrize.remove_parametrizations"
        return ["", f"Computed by a parametrization, from tensors below: {', '.join(self.computed)}; {advice}."]

    def _half_empty_lines(self) -> list[str]:
        rows = [["weight", "stored", "of all", "bytes", "vector MAC/step"]]
        for weight in self.weights:
            for i, count in enumerate(weight.half_empty or ()):
                name = "  would be" if i else weight.name
                numbers = f"{count.density:.1%}", f"{count.stored_bytes:,}", f"{count.vector_multiply_adds:,}"
                rows.append([name, count.pattern.describe(count.stored_units), *numbers])
        if len(rows) == 1:
            return []
        heading = (
            f"Units take as many vector multiply-adds as those of the next multiple of {VECTOR_ROWS} rows, and blocks "
            "on a GPU as many bytes:"
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


def _cells(part: WeightReport | GateReport, stored: str) -> Sequence[str]:
    return (
        f"{part.shape[0]} x {part.shape[1]}",
        f"{part.density:.1%}",
        f"{part.nonzero:,}",
        stored,
        f"{part.stored_bytes:,}",
        f"{part.multiply_accumulates:,}",
    )


def _in_words(pattern: Picks) -> str:
    rows, weights = f"{pattern.rows} hidden units", "weight" if pattern.columns == 1 else "weights"
    return f"{rows}, {pattern.columns} {weights} of each, from its own out of {pattern.bank} neighbouring columns"
