"""What is exported: recurrent and linear layers, and functions of single numbers, one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triton_sparse_rnn.export.matrices import DTYPES, CMatrix, by_group, c_matrix
from triton_sparse_rnn.nn.persistent import PersistentLayer
from triton_sparse_rnn.ops.layer_weights import StoredLayer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import GATES
from triton_sparse_rnn.sparse.layer_weights import LayerWeights

KINDS = {"RNN_TANH": 1, "RNN_RELU": 2, "GRU": 3, "LSTM": 4, "LINEAR": 5, "POINTWISE": 6}  # their numbers in a blob
FUNCTIONS: dict[type[nn.Module], int] = {nn.ReLU: 1, nn.Sigmoid: 2, nn.Tanh: 3}
PASSED_OVER = (nn.Identity, nn.Dropout)  # at inference they do nothing
# What makes of a layer's own numbers others when it is called.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_NOT_ROUNDED = (
    "{} has activation_dtype={}, and the C runtime computes with float32 activations: convert it with "
    "activation_dtype=None, which stores the same weights"
)


class CLayer(NamedTuple):
    """A layer as the C runtime has it: one of the stacked ones of a recurrent module.

    Attributes:
        kind: a number of KINDS.
        inputs: floats that it takes.
        hidden: H; of a linear layer its outputs.
        outputs: of one direction, proj_size where there is one.
        directions: D.
        function: a number of FUNCTIONS, or 0.
        matrices: of each direction weight_ih, weight_hh and, with a projection, weight_hr; a linear layer's weight.
        biases: [unit groups, gates, 16] of each direction, float32; tsr_blob.h says of which gates.
    """

    kind: int
    inputs: int
    hidden: int
    outputs: int
    directions: int = 1
    function: int = 0
    matrices: tuple[CMatrix, ...] = ()
    biases: tuple[Any, ...] = ()

    @property
    def state_floats(self) -> int:
        """Numbers of all its states: h and, of an LSTM, c, in every direction."""
        if self.kind >= KINDS["LINEAR"]:
            return 0
        return self.directions * (self.outputs + (self.hidden if self.kind == KINDS["LSTM"] else 0))


def c_layers(modules: Iterable[tuple[str, nn.Module]]) -> list[CLayer]:
    """Return the layers of a chain.

    Args:
        modules: with names for messages: persistent modules, linear layers, and modules of FUNCTIONS and PASSED_OVER.
    Raises:
        TypeError, ValueError: one of them cannot be exported, or does not take what the one before it gives.
    """
    chain: list[CLayer] = []
    for name, module in modules:
        for layer in _layers_of(name, module, chain[-1] if chain else None):
            if chain and layer.inputs != (width := chain[-1].outputs * chain[-1].directions):
                raise ValueError(
                    f"{name}, a {type(module).__name__}, takes {layer.inputs} inputs, but what is before it in the "
                    f"chain gives {width}"
                )
            chain.append(layer)
    if not chain:
        raise ValueError("a chain must hold a layer that computes something")
    return chain


def has_one_weight(module: nn.Module) -> bool:
    """Whether a module is linear: it has one weight, dense or stored, and a bias or None."""
    return isinstance(module, nn.Linear) or isinstance(_only_weight(module), BlockMatrix)


def _layers_of(name: str, module: nn.Module, before: CLayer | None) -> Iterator[CLayer]:
    if type(module) in PASSED_OVER:
        return
    if hooks := [hook for hook in _HOOKS if getattr(module, hook, None)]:
        raise ValueError(
            f"{name}, a {type(module).__name__}, has {hooks[0].strip('_').replace('_', ' ')}, which C cannot run: "
            "remove them, and do what they do in the program that calls the layer"
        )
    if isinstance(module, PersistentLayer):
        yield from _recurrent(name, module)
    elif type(module) in FUNCTIONS:
        if before is None:
            raise ValueError(f"{name}, a {type(module).__name__}, must follow a layer, which says how wide it is")
        width = before.outputs * before.directions
        yield CLayer(KINDS["POINTWISE"], width, width, width, function=FUNCTIONS[type(module)])
    elif has_one_weight(module):
        yield _linear(name, module)
    else:
        way_out = "; convert it with to_sparse()" if isinstance(module, nn.RNNBase) else ""
        raise TypeError(
            f"{name} must be a PersistentRNN, PersistentGRU, PersistentLSTM, a linear layer, "
            f"{', '.join(f'nn.{cls.__name__}' for cls in (*FUNCTIONS, *PASSED_OVER))} to be exported as C, "
            f"got {type(module).__name__}{way_out}"
        )


def _recurrent(name: str, module: PersistentLayer) -> Iterator[CLayer]:
    if module.activation_dtype is not None:
        raise ValueError(_NOT_ROUNDED.format(name, module.activation_dtype))
    _check_dtypes(name, module, module.dtype, module.stored_weights())
    for layer in module._layers():
        yield _stacked_layer(layer)


def _stacked_layer(layer: StoredLayer) -> CLayer:
    gates = GATES[layer.mode]
    matrices = [
        c_matrix(weight, 1 if weight is direction.weight_hr else gates)
        for direction in layer.directions
        for weight in (direction.weight_ih, direction.weight_hh, direction.weight_hr)
        if weight is not None
    ]
    input_matrix, recurrent_matrix = matrices[:2]
    return CLayer(
        KINDS[layer.mode],
        inputs=input_matrix.columns,
        hidden=input_matrix.rows,
        outputs=recurrent_matrix.columns,
        directions=len(layer.directions),
        matrices=tuple(matrices),
        biases=tuple(_biases(layer.mode, direction) for direction in layer.directions),
    )


def _biases(mode: str, direction: LayerWeights) -> Any:
    """[unit groups, 1 or 4, 16]: both biases of a row in one, but apart where r stands between them, in a GRU's n."""
    rows = direction.weight_hh.shape[0]
    bias_ih, bias_hh = (
        torch.zeros(rows, dtype=torch.float32, device="cpu") if bias is None else bias.detach().cpu().float()
        for bias in (direction.bias_ih, direction.bias_hh)
    )
    if mode != "GRU":
        return by_group(bias_ih + bias_hh, GATES[mode])
    both = (bias_ih + bias_hh)[: rows // 3 * 2]
    return by_group(torch.cat([both, bias_ih[len(both) :], bias_hh[len(both) :]]), 4)


def _linear(name: str, module: nn.Module) -> CLayer:
    weight, bias = _only_weight(module), getattr(module, "bias", None)
    assert isinstance(weight, (Tensor, BlockMatrix))
    if getattr(module, "activation_dtype", None) is not None:
        raise ValueError(_NOT_ROUNDED.format(name, module.activation_dtype))
    weights: dict[str, Any] = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    _check_dtypes(name, module, getattr(module, "dtype", torch.float32), weights)
    rows, columns = weight.shape
    biases = by_group(torch.zeros(rows, dtype=torch.float32, device="cpu") if bias is None else bias, 1)
    return CLayer(
        KINDS["LINEAR"], inputs=columns, hidden=rows, outputs=rows, matrices=(c_matrix(weight, 1),), biases=(biases,)
    )


def _only_weight(module: nn.Module) -> Any:
    """The weight of a linear layer, however it holds it: as an attribute, or as persistent modules do."""
    stored: Any = getattr(module, "stored_weights", None)
    return getattr(module, "weight", None) if stored is None else stored().get("weight")


def _check_dtypes(name: str, module: nn.Module, dtype: torch.dtype, weights: dict[str, Any]) -> None:
    """Raise ValueError where C has no numbers of the kind; and where indices are wrong, which somebody wrote into."""
    for weight_name, weight in weights.items():
        if isinstance(weight, BlockMatrix):
            try:
                weight.check()
            except ValueError as error:
                raise ValueError(f"{name} has parts of {weight_name} that do not fit together: {error}") from error
            stored = weight.values
        else:
            stored = weight
        wrong = next((d for d in (dtype, stored.dtype) if d not in DTYPES), None)
        if wrong is not None:
            raise ValueError(
                f"{name}, a {type(module).__name__}, is in {wrong}, and the C runtime computes in float32: convert a "
                "layer of float32, float16 or bfloat16"
            )
        if stored.is_meta:
            raise ValueError(f"{name} is on the meta device: there are no numbers to export")
