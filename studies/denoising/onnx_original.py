"""The original in onnxruntime on one thread: over whole sequences as it came, and streamed with its state exposed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from studies.denoising.model import HIDDEN, import_or_say, original_file

INITIAL_STATE, FINAL_STATE = 5, 1  # places among the inputs and the outputs of a GRU in ONNX


class OnnxOriginal:
    """The model of the file as it is; called with features [B, T, BINS], it returns gains."""

    def __init__(self) -> None:
        self._session = _session(str(original_file()))

    def __call__(self, features: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(["output"], {"input": features.numpy()})[0])


class OnnxStream:
    """A stream of frames through a session of `streaming_session`, from a state of zeros."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._states = [np.zeros((1, 1, HIDDEN), np.float32)] * 2

    def frames(self, features: Tensor) -> list[np.ndarray]:
        """Return features [T, BINS] as T frames that `step` takes."""
        return [frame[None, None] for frame in features.numpy()]

    def step(self, frame: np.ndarray) -> np.ndarray:
        """Return the gains of the next frame, [1, 1, BINS]."""
        inputs = {"input": frame, "state_0": self._states[0], "state_1": self._states[1]}
        gains, *self._states = self._session.run(None, inputs)
        return gains


def streaming_session() -> Any:
    """Return the original with state_0, state_1 as inputs and new_state_0, new_state_1 as outputs, [1, B, HIDDEN]."""
    onnx = import_or_say("onnx")
    model = onnx.load(str(original_file()))
    layers = [node for node in model.graph.node if node.op_type == "GRU"]
    for number, layer in enumerate(layers):
        names = f"state_{number}", f"new_state_{number}"
        layer.input[INITIAL_STATE], layer.output[FINAL_STATE] = names
        for values, name in zip((model.graph.input, model.graph.output), names, strict=True):
            shape = [1, "batch_size", HIDDEN]
            values.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    onnx.checker.check_model(model)
    return _session(model.SerializeToString())


def _session(model: str | bytes) -> Any:
    onnxruntime = import_or_say("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # it warns of what the file holds and nobody reads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
