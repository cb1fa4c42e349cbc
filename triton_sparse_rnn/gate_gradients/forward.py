"""The forward of one layer by torch's own operators, so that its results are those of nn.LSTM and nn.GRU.

What they choose among (oneDNN, cuDNN, torch's own loops) they choose here too; on a CPU results are equal to the bit,
for an x whose rows lie one behind the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import _VF, Tensor
from torch.backends.cudnn import rnn as cudnn_rnn

from triton_sparse_rnn.sparse.layer_config import GATES

_ONEDNN_LSTM = 2  # mode of aten::mkldnn_rnn_layer


class Weights(NamedTuple):
    """The weights of one direction."""

    ih: Tensor  # [G H, I]
    hh: Tensor  # [G H, R]
    bias_ih: Tensor | None  # [G H]
    bias_hh: Tensor | None
    hr: Tensor | None  # [R, H], of an LSTM with proj_size


class Forward(NamedTuple):
    """What a layer gives, with the workspace of each direction that oneDNN ran, else None."""

    y: Tensor  # [N, D R]
    h_n: Tensor  # [D, B, R]
    c_n: Tensor | None  # [D, B, H], of an LSTM
    workspaces: list[Tensor | None]


def run_forward(
    x: Tensor, batch_sizes: tuple[int, ...], packed: bool, h0: Tensor, c0: Tensor | None, weights: Sequence[Weights]
) -> Forward:
    """Run all directions of a layer; see `function.run_layer`. An LSTM has c0.

    oneDNN's workspace is [bytes], uint8. Nothing is promised of it, but oneDNN 3.12 puts the gates first: i, f, g, o of
    H units each, activated, as float32 [T, B, ld], ld = 4 H rounded up to 16, and 16 more where that is a multiple of
    256; T in the order in which the direction takes the steps, so a reverse one begins with the last.
    """
    # torch's choice, and whether oneDNN leaves its workspace, depend on the grad mode.
    with torch.enable_grad():
        x, h0, c0 = _detach([x, h0, c0])
        weights = [Weights(*_detach(one)) for one in weights]
        if c0 is not None and not packed and _takes_onednn(x, weights[0]):
            x = x.contiguous().view(len(batch_sizes), batch_sizes[0], x.shape[1])  # it misreads other strides
            return _run_onednn(x, h0, c0, weights)
        return _run_torch(x, batch_sizes, packed, h0, c0, weights)


def _detach(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [None if tensor is None else tensor.detach() for tensor in tensors]


def _takes_onednn(x: Tensor, weights: Weights) -> bool:
    """Whether torch runs this LSTM by oneDNN, in float32."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and weights.hr is None
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
    )


def _run_onednn(x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Weights]) -> Forward:
    """Run each direction by the operator that torch.lstm calls, for its workspace, which torch.lstm does not give."""
    (T, B, _), (D, _, H) = x.shape, h0.shape
    results = []
    for d, one in enumerate(weights):
        biases = [x.new_zeros(4 * H) if bias is None else bias for bias in (one.bias_ih, one.bias_hh)]
        tensors = x, one.ih, one.hh, *biases, h0[d].contiguous(), c0[d].contiguous()
        options = {"has_biases": one.bias_ih is not None, "bidirectional": D == 2, "batch_first": False, "train": True}
        results.append(
            torch.ops.aten.mkldnn_rnn_layer(
                *tensors, reverse=d == 1, batch_sizes=[], mode=_ONEDNN_LSTM, hidden_size=H, num_layers=1, **options
            )
        )
    y, h_n, c_n, workspaces = zip(*results, strict=True)
    h_n, c_n = (torch.stack([end.view(B, H) for end in ends]) for ends in (h_n, c_n))
    return Forward(torch.cat([one.view(T * B, H) for one in y], dim=1), h_n, c_n, list(workspaces))


def _run_torch(
    x: Tensor, batch_sizes: tuple[int, ...], packed: bool, h0: Tensor, c0: Tensor | None, weights: Sequence[Weights]
) -> Forward:
    """Run all directions by the operator that the module calls."""
    D, is_lstm = len(weights), c0 is not None
    parameters = [weight for one in weights for weight in one if weight is not None]
    if x.is_cuda and torch.cudnn_is_acceptable(x):
        parameters = _compact(parameters, "LSTM" if is_lstm else "GRU", weights)
    run: Any
    run, states = (_VF.lstm, (h0, c0)) if is_lstm else (_VF.gru, h0)
    has_biases = weights[0].bias_ih is not None
    options = has_biases, 1, 0.0, True, D == 2  # then layers, dropout, training, bidirectional
    if packed:
        y, *ends = run(x, torch.tensor(batch_sizes, dtype=torch.int64, device="cpu"), states, parameters, *options)
    else:
        y, *ends = run(x.reshape(len(batch_sizes), batch_sizes[0], x.shape[1]), states, parameters, *options, False)
    # What comes from a Function as a view may not be written to; torch.nn's y may.
    y = torch.ops.aten._unsafe_view(y.contiguous(), (x.shape[0], y.shape[-1]))
    return Forward(y, ends[0], ends[1] if is_lstm else None, [None] * D)


def _compact(parameters: list[Tensor], mode: str, weights: Sequence[Weights]) -> list[Tensor]:
    """Return the parameters in one piece of memory, as cuDNN wants them: else torch copies them, with a warning.

    Those of a module of one layer are so already. Of a stack, only all layers together are.
    """
    storage = parameters[0].untyped_storage()
    shared = all(parameter.untyped_storage().data_ptr() == storage.data_ptr() for parameter in parameters)
    if shared and storage.nbytes() == sum(parameter.nbytes for parameter in parameters):
        return parameters
    copies = [parameter.clone() for parameter in parameters]  # they will be views of one tensor
    first = weights[0]
    _VF._cudnn_rnn_flatten_weight(
        copies,
        len(parameters) // len(weights),
        first.ih.shape[1],
        cudnn_rnn.get_cudnn_mode(mode),
        first.ih.shape[0] // GATES[mode],
        0 if first.hr is None else first.hr.shape[0],
        1,  # layers
        False,  # batch_first
        len(weights) == 2,
    )
    return copies
