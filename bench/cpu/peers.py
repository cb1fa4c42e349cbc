"""What users would pick instead on a CPU, each as its own documentation says to run a layer on one thread.

They are layers of one direction from states of zeros. A peer that cannot run here is skipped with the reason.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.cpu.onnx_model import onnx_model
from bench.time_loop import run_time_loop
from bench.workloads import Workload


class Peer:
    """What the peers share: their names do not depend on the cell."""

    precision = "float32"
    label: str

    def __str__(self) -> str:
        return self.label

    def name(self, work: Workload) -> str:
        return self.label

    def prepare(self, work: Workload) -> tuple[Workload, Callable[[], Any]]:
        return work, self.ready(work)

    def ready(self, work: Workload) -> Callable[[], Any]:
        """Return the call that is timed."""
        raise NotImplementedError


class TorchInt8(Peer):
    """Dynamic quantisation: int8 weights, activations quantised as they come."""

    label = "torch int8 dynamic"
    precision = "int8"

    def ready(self, work: Workload) -> Callable[[], Any]:
        with warnings.catch_warnings():
            # It is what torch itself offers for int8; what is to replace it (torchao) quantises nn.Linear alone.
            warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(work.layer), {type(work.layer)})
        if type(quantized[0]) is type(work.layer):
            pytest.skip(f"torch does not quantise nn.{work.layer_name}")
        x = work.x
        return lambda: quantized(x)[0]


class TorchCompile(Peer):
    """torch.compile as it is called without options; compiled at the first call, which is not timed.

    torch 2.13 leaves a recurrent layer to eager mode. Unrolled, with torch._dynamo.config.allow_rnn, nn.GRU(256, 256)
    over 20 steps compiled for 27 s on the machine of bench/results and was no faster.
    """

    label = "torch.compile"

    def ready(self, work: Workload) -> Callable[[], Any]:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            pytest.skip("torch.compile needs a C++ compiler: g++, or the one that CXX names")
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.filterwarnings("ignore", ".*script_method. is deprecated", DeprecationWarning)  # torch's own use
            torch.compiler.reset()
            compiled, x = torch.compile(work.layer), work.x
            compiled(x)
        return lambda: compiled(x)[0]


class TorchCSR(Peer):
    """Weights as torch.sparse_csr: one product for the inputs of all steps, then a loop over steps in Python."""

    label = "torch CSR"

    def ready(self, work: Workload) -> Callable[[], Any]:
        dense_ih, dense_hh, bias_ih, bias_hh = work.layer.parameters()
        x = work.x
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state", UserWarning)
            weight_ih, weight_hh = map(_to_csr, (dense_ih, dense_hh))

        def recur(h: Tensor) -> Tensor:
            if len(h) == 1:  # a product with a vector is the faster one
                return torch.addmv(bias_hh, weight_hh, h[0]).unsqueeze(0)
            return torch.addmm(bias_hh.unsqueeze(1), weight_hh, h.t()).t()

        def run() -> Tensor:
            projected = torch.addmm(bias_ih.unsqueeze(1), weight_ih, x.flatten(0, 1).t()).t().contiguous()
            return run_time_loop(work.cell, projected.unflatten(0, x.shape[:2]), recur)

        return run


class OnnxRuntime(Peer):
    """onnxruntime on its CPU provider, float32."""

    label = "onnxruntime"

    def ready(self, work: Workload) -> Callable[[], Any]:
        onnxruntime = _import("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        model = _onnx_model(work)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        inputs = {"x": work.x.numpy()}
        return lambda: session.run(["y"], inputs)[0]


class OpenVINO(Peer):
    """openvino on its CPU device; `precision` is that of the numbers inside the layer, float32 or bfloat16."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.label = f"openvino {precision}"

    def ready(self, work: Workload) -> Callable[[], Any]:
        openvino = _import("openvino")
        core = openvino.Core()
        if self.precision == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            pytest.skip("openvino finds no bfloat16 instructions on this processor")
        options = {
            "INFERENCE_NUM_THREADS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[self.precision],
        }
        request = core.compile_model(core.read_model(_onnx_model(work)), "CPU", options).create_infer_request()
        inputs = {"x": work.x.numpy()}
        return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)["y"]


PEERS = (
    TorchInt8(),
    TorchCompile(),
    TorchCSR(),
    OnnxRuntime(),
    OpenVINO("float32"),
    OpenVINO("bfloat16"),
)


def _to_csr(weight: Tensor) -> Tensor:
    csr = weight.to_sparse_csr()
    # MKL, which multiplies, reads 32-bit indices; others are converted in every product.
    indices = csr.crow_indices().int(), csr.col_indices().int()
    return torch.sparse_csr_tensor(*indices, csr.values(), csr.shape, check_invariants=True)


def _onnx_model(work: Workload) -> bytes:
    _import("onnx")
    return onnx_model(work.layer, work.T, work.B)


def _import(package: str) -> Any:
    return pytest.importorskip(package, reason=f"{package} is not installed; pip install 'triton-sparse-rnn[bench]'")
