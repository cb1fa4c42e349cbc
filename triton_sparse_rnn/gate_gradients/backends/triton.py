"""The backward of one direction of an LSTM by Triton kernels: the twin of `reference.direction_gradients` on a GPU.

cuDNN keeps its gates to itself, so they are computed again by two products over all steps and one kernel.
The time loop is one launch; the products behind it are torch's, or skip the blocks that became zero
(kernels/triton/gate_gradients: states.py, loop.py, products.py).

Gates and their gradients are held in the dtype of the layer, as cuDNN does; c, carried gradients and all sums are
float32. Products of float32 may use TF32 where cuDNN's layers may.

With TRITON_INTERPRET=1 in the environment, Triton interprets its kernels, and this backend takes tensors on the CPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from triton_sparse_rnn.gate_gradients.contract import (
    Arriving,
    BackwardDirection,
    Decision,
    Gradients,
    Needed,
    Rule,
    Steps,
)
from triton_sparse_rnn.gate_gradients.states import rows_before
from triton_sparse_rnn.ops.backends import triton
from triton_sparse_rnn.ops.layer_weights import StoredLayer

if TYPE_CHECKING:
    from triton_sparse_rnn.kernels.triton.gate_gradients.products import Kept
    from triton_sparse_rnn.kernels.triton.gate_gradients.step import Saved, Zeroing

# From which share of zeros, in blocks, products that skip them are taken to be faster than torch's dense ones. Guessed
# from the bytes that they read; not yet measured on a GPU.
WEIGHT_PRODUCTS_SKIP_FROM = 0.5
INPUT_PRODUCT_SKIPS_FROM = 0.75

_MOST_ROWS = 64  # of a block, and most units
_setting = threading.Lock()  # torch's setting is the whole process's


def unsupported_reason(direction: BackwardDirection, rule: Rule) -> str | None:
    """Why the kernels cannot run this backward, where Triton can run at all; None if they can."""
    from triton_sparse_rnn.kernels.triton.gate_gradients.through_time import LARGEST_BLOCK

    x = direction.x
    if (reason := triton.unsupported_reason(StoredLayer("LSTM", [], x.dtype, x.device))) is not None:
        return reason
    if direction.mode != "LSTM":
        return f"its kernels are those of an LSTM, and this is a {direction.mode}"
    if direction.weight_hr is not None:
        return "the layer has proj_size, which would take two exchanges between programs at every step, not one"
    if rule.group == "blocks":
        sizes = rule.units, rule.rows
        if any(size > _MOST_ROWS or size & (size - 1) for size in sizes) or rule.units * rule.rows > LARGEST_BLOCK:
            return (
                f"blocks of {rule.units} units x {rule.rows} rows are not those it can run: powers of two up to "
                f"{_MOST_ROWS}, and units x rows up to {LARGEST_BLOCK}"
            )
    return None


def direction_gradients(
    direction: BackwardDirection, arriving: Arriving, needed: Needed, decision: Decision
) -> Gradients:
    """Go back through time; see `contract.BackwardBackend`.

    Raises:
        RuntimeError: in an earlier call a program waited in vain; its gradients were NaN.
    """
    from triton_sparse_rnn.kernels.triton.gate_gradients.products import input_gradients, weight_gradients
    from triton_sparse_rnn.kernels.triton.gate_gradients.through_time import raise_if_failed
    from triton_sparse_rnn.kernels.triton.recurrent_layer import on

    dtype, device = direction.x.dtype, direction.x.device
    raise_if_failed(device)
    with on(device), precision_of_cudnn(direction.x) as precision:
        h_before = rows_before(direction.y, direction.h0, direction.steps)
        saved, found = _through_time(direction, arriving, h_before, decision, precision)
        rows = saved.gates.flatten(1)
        zeros_from_blocks = decision.likely_zeros if _in_blocks(decision) else 0.0
        inputs = [direction.x] * needed.weight_ih + [h_before] * needed.weight_hh
        if zeros_from_blocks >= WEIGHT_PRODUCTS_SKIP_FROM:
            by_weight = weight_gradients(found, inputs, precision)
        else:
            by_weight = [rows.t() @ x for x in inputs]
        grad_x = None
        if needed.x and zeros_from_blocks >= INPUT_PRODUCT_SKIPS_FROM:
            grad_x = input_gradients(found, direction.weight_ih, precision)
        elif needed.x:
            grad_x = rows @ direction.weight_ih
        bias = rows.sum(0) if needed.bias and direction.bias_ih is not None else None
    return Gradients(
        x=grad_x,
        h0=saved.dh.to(dtype),
        c0=saved.dc.to(dtype),
        weight_ih=by_weight[0] if needed.weight_ih else None,
        weight_hh=by_weight[-1] if needed.weight_hh else None,
        bias_ih=bias,
        bias_hh=None if bias is None else bias.clone(),
        weight_hr=None,
        zeros=saved.zeros,
        gates=saved.gates if decision.keep_gates else None,
    )


def _through_time(
    direction: BackwardDirection,
    arriving: Arriving,
    h_before: Tensor,
    decision: Decision,
    precision: str,
) -> tuple[Saved, Kept]:
    """Return gate gradients and those of the first states, and which chunks of them are not zero."""
    from triton_sparse_rnn.kernels.triton.gate_gradients.products import Kept
    from triton_sparse_rnn.kernels.triton.gate_gradients.states import activate_gates
    from triton_sparse_rnn.kernels.triton.gate_gradients.step import Saved
    from triton_sparse_rnn.kernels.triton.gate_gradients.through_time import BackwardLoop, choose_step_tile, new_kept
    from triton_sparse_rnn.kernels.triton.recurrent_layer import dense_product
    from triton_sparse_rnn.kernels.triton.time_loop import device_limits

    assert direction.c0 is not None
    assert arriving.c is not None
    (B, H), (sizes, reverse), device = direction.c0.shape, direction.steps, direction.x.device
    starts, lengths = _ragged(direction.steps, device)
    gates = _linear_gates(direction, h_before).view(-1, 4, H)
    c0 = direction.c0.float().contiguous()
    c = torch.empty(len(gates), H, dtype=torch.float32, device=device)
    activate_gates(gates, c0, c, starts, lengths, len(sizes), reverse=reverse)
    zeroing = _zeroing(decision)
    tile = choose_step_tile(H, B, zeroing, gates.element_size(), device_limits(device).sms)
    dh, dc = (
        state.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for state in (arriving.h, arriving.c)
    )
    saved = Saved(
        gates=gates,
        c=c,
        c0=c0,
        grad_y=arriving.y if arriving.y.stride(1) == 1 else arriving.y.contiguous(),
        dh=dh,
        dc=dc,
        thresholds=decision.thresholds,
        seed=decision.seed,
        zeros=torch.zeros(4, dtype=torch.int64, device=device),
        kept=new_kept(tile, H, B, len(sizes), device),
        starts=starts,
        lengths=lengths,
    )
    loop = BackwardLoop(
        zeroing, tile, skips=_in_blocks(decision), batch_sizes=sizes, reverse=reverse,
        precision=precision, multiply=lambda rows, weight: dense_product(rows, weight.t()),
    )  # fmt: skip
    loop.run(saved, direction.weight_hh)
    return saved, Kept(gates, saved.kept, starts, tile, B)


def _linear_gates(direction: BackwardDirection, h_before: Tensor) -> Tensor:
    """W_ih x + W_hh h_before + biases, [N, 4 H]."""
    bias = None
    if direction.bias_ih is not None and direction.bias_hh is not None:
        bias = direction.bias_ih + direction.bias_hh
    return F.linear(direction.x, direction.weight_ih, bias).addmm_(h_before, direction.weight_hh.t())


def _in_blocks(decision: Decision) -> bool:
    """Whether whole blocks become zero."""
    return decision.rule.group == "blocks" and decision.thresholds is not None


def _zeroing(decision: Decision) -> Zeroing:
    from triton_sparse_rnn.kernels.triton.gate_gradients.step import BLOCKS, DENSE, ELEMENTS, Zeroing

    rule = decision.rule
    if decision.thresholds is None:
        return Zeroing(DENSE.value)
    if rule.group == "elements":
        return Zeroing(ELEMENTS.value, rule.selection == "sample")
    return Zeroing(BLOCKS.value, rule.selection == "sample", rule.units, rule.rows)


def _ragged(steps: Steps, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """The first row of every step [T], int64, and the steps of each row of the batch [B], int32; None for a rectangle.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if not steps.is_ragged:
        return None, None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the backward of a PackedSequence of different lengths cannot be captured in a CUDA graph: every replay "
            "would run with the lengths of the capture. Capture calls with a padded batch"
        )
    counts = {"dtype": torch.int64, "device": "cpu"}
    sizes = torch.tensor(steps.batch_sizes, **counts)
    # Sizes never increase, so row b has as many steps as there are sizes above b.
    ends = len(sizes) - torch.searchsorted(sizes.flip(0), torch.arange(int(sizes[0]), **counts), right=True)
    starts, lengths = torch.tensor(steps.starts, **counts), ends.to(torch.int32)
    if device.type == "cuda":  # a copy from other memory would wait for all that the device still has to do
        starts, lengths = (tensor.pin_memory().to(device, non_blocking=True) for tensor in (starts, lengths))
    return starts, lengths


@contextlib.contextmanager
def precision_of_cudnn(x: Tensor) -> Iterator[str]:
    """Let torch's products of float32 be as exact as cuDNN's recurrent layers; gives that of the kernels' products.

    A layer would else be slower with this backward than without, where a program leaves torch's settings as they are:
    they let cuDNN take TF32, and products not. The setting is that of the process while products are launched.

    Gives "tf32", or "tf32x3": three products of TF32 to one of float32, which the tensor cores do faster.
    """
    of_layers: Any = torch.backends.cudnn.rnn
    tf32 = x.dtype != torch.float32 or of_layers.fp32_precision == "tf32"
    precision = "tf32" if tf32 else "tf32x3"
    if x.device.type != "cuda" or x.dtype != torch.float32:
        yield precision
        return
    setting = torch.backends.cuda.matmul
    with _setting:
        before = setting.fp32_precision
        setting.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            yield precision
        finally:
            setting.fp32_precision = before
