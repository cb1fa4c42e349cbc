"""A layer of PyTorch as an ONNX model, for the runtimes that read one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Which of PyTorch's gates stands at each place in ONNX: z r h, i o f c.
GATE_ORDER = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}
ATTRIBUTES = {
    "GRU": {"linear_before_reset": 1},  # PyTorch's GRU: r multiplies W_hn h + b_hn
    "LSTM": {},
    "RNN_TANH": {"activations": ["Tanh"]},
    "RNN_RELU": {"activations": ["Relu"]},
}


def onnx_model(layer: nn.RNNBase, T: int, B: int) -> bytes:
    """Return a model with input x [T, B, I] and output y [T, B, H], float32, for one layer in one direction."""
    from onnx import TensorProto, helper, numpy_helper  # pyright: ignore[reportMissingImports] - it is in the extra "bench"

    weight_ih, weight_hh, bias_ih, bias_hh = (_reorder(p, GATE_ORDER[layer.mode]) for p in layer.parameters())
    constants = {
        "W": weight_ih.unsqueeze(0),  # [1, G * H, I]
        "R": weight_hh.unsqueeze(0),  # [1, G * H, H]
        "bias": torch.cat([bias_ih, bias_hh]).unsqueeze(0),  # [1, 2 * G * H]
        "direction": torch.tensor([1]),
    }
    operator = layer.mode.partition("_")[0]
    nodes = [
        helper.make_node(
            operator, ["x", "W", "R", "bias"], ["Y"], hidden_size=layer.hidden_size, **ATTRIBUTES[layer.mode]
        ),
        helper.make_node("Squeeze", ["Y", "direction"], ["y"]),  # from [T, 1, B, H]
    ]
    graph = helper.make_graph(
        nodes,
        operator,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [T, B, layer.input_size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [T, B, layer.hidden_size])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()],
    )
    # The oldest versions that hold these operators as they are today: every runtime of recent years reads them.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8).SerializeToString()


def _reorder(parameter: Tensor, order: tuple[int, ...]) -> Tensor:
    return torch.cat([parameter.detach().chunk(len(order))[gate] for gate in order])
