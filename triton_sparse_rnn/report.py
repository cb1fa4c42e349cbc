"""How sparse the layers of a model are: per weight and gate, with the bytes and products that remain."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from triton_sparse_rnn.names import checked_globs, clean_names, name_matches
from triton_sparse_rnn.nn.computed_weights import join_parts
from triton_sparse_rnn.nn.model_tensors import tensors_by_name
from triton_sparse_rnn.nn.storage_choice import fastest_linear_storage, fastest_storage
from triton_sparse_rnn.recurrent_tensors import NAMES_BY_COUNT, find_gates, is_nonzero, is_recurrent
from triton_sparse_rnn.report_values import GateReport, SparsityReport, TensorReport, UnitCount, WeightReport
from triton_sparse_rnn.sparse.block_matrix import STORAGE_DTYPES, BlockMatrix
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern, PatternLike, as_pattern
from triton_sparse_rnn.sparse.picks import Picks
from triton_sparse_rnn.sparse.row_blocks import UNITS

# Of buffers of a PersistentLayer, and of a PersistentLinear, which has all three.
_PARTS = re.compile(rf".*weight_(ih|hh|hr)_l\d+(_reverse)?_({'|'.join(BlockMatrix.PARTS)})")
_LINEAR_PARTS = ("weight_starts", "weight_columns", "weight_values")


def sparsity_report(
    model: nn.Module | Mapping[str, Any], *, pattern: PatternLike | None = None, include: Iterable[str] = ()
) -> SparsityReport:
    """Count what is zero, and what would be stored and multiplied without it.

    Args:
        model: a module, or a state_dict of one. Layers that `to_sparse` converted are reported as they are stored;
            values of a mapping may be BlockMatrix. Anything but tensors in a mapping is left out. A weight that
            a parametrization or a hook computes is counted by its values; a mapping tells those of weight_norm and
            prune, the functions. Names are reported without what wrappers such as torch.compile put in.
        pattern: in which weights that are not converted are counted; None takes, weight by weight, what `to_sparse`
            would store on this machine: picks, blocks or, for weight_ih and linear layers, an ordinary matrix.
        include: globs of weights of linear layers that are to be counted too, those of `to_sparse(include=...)`.
            Converted ones are in any case.
    Returns:
        A report for every weight_ih, weight_hh and weight_hr (of nn.RNN, nn.GRU, nn.LSTM and their cells) and gate, and
        for every weight of a linear layer that is included or converted.
    Raises:
        TypeError: `model` is neither, or `include` no sequence of globs.
        ValueError: it has no tensors, or some whose numbers cannot be read (on the meta device, nested, of a dtype that
            torch cannot compare), or is the bare state_dict of a converted model, which does not tell sizes; or
            `pattern` is far larger than a weight, or one of `include` matches no matrix.

    >>> layer = nn.GRU(2, 16, bias=False)
    >>> _ = layer.weight_hh_l0.data[:, 4:].zero_()
    >>> print(sparsity_report(layer, pattern=(16, 1)))
    weight        gate    shape  density  non-zero             stored  bytes  MAC/step
    weight_ih_l0  all    48 x 2   100.0%        96   6 blocks of 16x1    424        96
                  r      16 x 2   100.0%        32                  2    136        32
                  z      16 x 2   100.0%        32                  2    136        32
                  n      16 x 2   100.0%        32                  2    136        32
    weight_hh_l0  all   48 x 16    25.0%       192  12 blocks of 16x1    832       192
                  r     16 x 16    25.0%        64                  4    272        64
                  z     16 x 16    25.0%        64                  4    272        64
                  n     16 x 16    25.0%        64                  4    272        64
    <BLANKLINE>
    Recurrent layers: 33.3% dense, 288 non-zero weights.
      bytes     1,256 stored, 3,456 dense (2.75x)
      MAC/step  288 stored, 864 dense (3.00x)
    """
    named = None if pattern is None else as_pattern(pattern)
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
    if parts := [name for name in tensors if _is_part(name, tensors)]:
        raise ValueError(
            f"model has parts of a converted layer's weights without their sizes, such as {parts[0]}: "
            "give the module itself, or save it by save_sparse()"
        )
    recurrent, linear = dict(find_gates(tensors)), _linear_weights(tensors, include)
    gates = {name: recurrent.get(name, 1) for name in tensors if name in recurrent or name in linear}
    return SparsityReport(
        tuple(_report_weight(name, tensors, count, named) for name, count in gates.items()),
        tuple(_report_tensor(name, value) for name, value in tensors.items() if name not in gates),
        computed,
    )


def _is_part(name: str, tensors: Mapping[str, Any]) -> bool:
    prefix, last, rest = name.rpartition(_LINEAR_PARTS[0])
    is_linear = last and not rest and all(prefix + part in tensors for part in _LINEAR_PARTS)
    return bool(is_linear or _PARTS.fullmatch(name))


def _linear_weights(tensors: Mapping[str, Tensor | BlockMatrix], include: Iterable[str]) -> set[str]:
    """The names of matrices of one gate that were converted, or that globs match."""
    found = {name for name, weight in tensors.items() if isinstance(weight, BlockMatrix) and weight.gates == 1}
    matrices = {name for name, weight in tensors.items() if len(weight.shape) >= 2}
    for glob in checked_globs(include):
        matched = {name for name in matrices if name_matches(name, glob)}
        if not matched:
            raise ValueError(f"include has {glob!r}, which matches no tensor of two dimensions or more")
        found |= {name for name in matched if math.prod(tensors[name].shape[2:]) == 1}
    return found


def _report_weight(
    name: str, tensors: Mapping[str, Tensor | BlockMatrix], gates: int, named: Pattern | None
) -> WeightReport:
    weight = tensors[name]
    if isinstance(weight, BlockMatrix):
        everywhere = dataclasses.replace(weight, values=torch.ones_like(weight.values), scales=None).to_dense()
        dense, pattern = weight.to_dense(), weight.pattern
        kept = pattern.kept(everywhere.unflatten(0, (gates, -1)))
        nonzero, dtype = dense.ne(0).unflatten(0, (gates, -1)), weight.values.dtype
        return _report_stored(name, nonzero, pattern, kept, dtype, dense.nbytes)
    nonzero, nbytes = is_nonzero(name, weight).flatten(1), weight.numel() * weight.element_size()
    nonzero = nonzero.unflatten(0, (gates, -1))
    if isinstance(tensors.get(name.replace("weight_ih", "weight_hh")), BlockMatrix):
        return _report_kept_dense(name, nonzero, nbytes)
    if named is not None:
        _, rows, columns = nonzero.shape
        named.check_size(rows, columns, f"each gate of {name}" if gates > 1 else name)
    if is_recurrent(name):
        of_inputs = name.rpartition(".")[2].startswith("weight_ih")
        pattern = named or fastest_storage(
            nonzero, of_inputs=of_inputs, backend=None, activation_dtype=None, may_stay_dense=of_inputs
        )
    else:
        pattern = named or fastest_linear_storage(nonzero, backend=None, activation_dtype=None, may_stay_dense=True)
    if pattern is None:
        return _report_kept_dense(name, nonzero, nbytes)
    dtype = weight.dtype if weight.dtype in STORAGE_DTYPES and weight.is_floating_point() else torch.float32
    return _report_stored(name, nonzero, pattern, pattern.kept(nonzero), dtype, nbytes)


def _report_stored(
    name: str, nonzero: Tensor, pattern: Pattern, kept: Tensor, dtype: torch.dtype, dense_bytes: int
) -> WeightReport:
    """Report a weight that is stored in a pattern, or would be.

    Args:
        name: of the weight.
        nonzero: [G, H, columns], bool.
        pattern: whose units are stored.
        kept: its mask of those.
        dtype: of stored values.
        dense_bytes: of the dense matrix.
    """
    gates, H, columns = nonzero.shape
    parts = tuple(
        GateReport(
            gate, (H, columns), there, units, units * pattern.unit_bytes(dtype.itemsize), units * pattern.products
        )
        for gate, there, units in zip(NAMES_BY_COUNT[gates], _by_gate(nonzero), _by_gate(kept), strict=True)
    )
    count, whole = _count_units(pattern, kept, nonzero, dtype), pattern.in_whole_vectors()
    fuller = () if whole is None else (whole,) if isinstance(whole, Picks) else (whole, Picks())
    return WeightReport(
        name=name,
        shape=(gates * H, columns),
        pattern=pattern,
        gates=parts,
        stored_bytes=count.stored_bytes,
        dense_bytes=dense_bytes,
        half_empty=(count, *(_count_units(one, one.kept(nonzero), nonzero, dtype) for one in fuller))
        if fuller
        else None,
        fullest_group=1.0 if isinstance(pattern, Picks) else _fullest_group(pattern.spread(kept, nonzero)),
        recurrent=is_recurrent(name),
    )


def _report_kept_dense(name: str, nonzero: Tensor, nbytes: int) -> WeightReport:
    gates, H, columns = nonzero.shape
    parts = tuple(
        GateReport(gate, (H, columns), there, 0, nbytes // gates, H * columns)
        for gate, there in zip(NAMES_BY_COUNT[gates], _by_gate(nonzero), strict=True)
    )
    return WeightReport(name, (gates * H, columns), None, parts, nbytes, nbytes, recurrent=is_recurrent(name))


def _count_units(pattern: Pattern, kept: Tensor, nonzero: Tensor, dtype: torch.dtype) -> UnitCount:
    gates, H, columns = nonzero.shape
    units, scales = int(kept.sum()), dtype == torch.int8
    stored_bytes = pattern.stored_bytes(units, gates, H, columns, dtype.itemsize, scales=scales)
    return UnitCount(pattern, units, units / max(1, kept.numel()), stored_bytes, units * pattern.vectors)


def _fullest_group(stored: Tensor) -> float:
    """See WeightReport; of a mask [G, H, columns] of the stored weights."""
    counts = Blocks(UNITS, 1).kept(stored).sum(-1)
    return int(counts.max()) * counts.numel() / int(counts.sum()) if counts.any() else 1.0


def _by_gate(mask: Tensor) -> list[int]:
    return mask.flatten(1).sum(1).tolist()


def _report_tensor(name: str, tensor: Tensor | BlockMatrix) -> TensorReport:
    if isinstance(tensor, Tensor):
        nonzero, itemsize = is_nonzero(name, tensor), tensor.element_size()
    else:
        nonzero, itemsize = tensor.scaled_blocks().ne(0), tensor.scaled_blocks().element_size()
    shape, count = tuple(tensor.shape), math.prod(tensor.shape)
    return TensorReport(name, shape, int(nonzero.sum()), count, count * itemsize)
