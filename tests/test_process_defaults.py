"""What a process has set as its default dtype and device changes no number: each operation gives the same bits.

Whoever runs this package under other defaults makes modules and inputs with a dtype and a device of their own, as these
operations do. New layers follow the defaults, as torch.nn's do.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.optim import SGD

from triton_sparse_rnn import (
    BlockMatrix,
    ConstantMask,
    GateGradientSparsity,
    OneShot,
    PolynomialDecay,
    Pruner,
    SparseGRU,
    SparseLSTM,
    ThresholdRamp,
    forecast,
    group_lasso,
    l1,
    load_sparse,
    save_sparse,
    sparsity_report,
    to_sparse,
)

I, H = 5, 37  # neither fills whole blocks
LIKE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    """As torch.set_default_device, which the `with` of torch.device is too."""
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "with meta": lambda: torch.device("meta"),
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, **LIKE)


def packed_rows(x: Tensor) -> PackedSequence:
    """Sequences of different lengths of x [T, B, features]; torch's own function fails under a default device."""
    with torch.device("cpu"):
        return pack_sequence([x[:, 0], x[:-1, 1], x[:1, 2]])


def prune_columns(layer: nn.RNNBase) -> nn.RNNBase:
    """Numbers of our own in every parameter, and every second column of weights 0."""
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(layer.named_parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=seed) / 6)
            if name.startswith("weight"):
                parameter[:, 1::2] = 0
    return layer


def converted(cell: type[nn.RNNBase], backend: str, options: dict[str, Any], sizes: dict[str, Any]) -> Any:
    layer: Any = cell(I, H, **sizes, **LIKE)  # type: ignore[misc]
    return to_sparse(prune_columns(layer).eval(), storage=(16, 4), backend=backend, **options)


def call_in_every_form(cell: type[nn.RNNBase], backend: str, options: dict[str, Any], **sizes: Any) -> list[Any]:
    fast = converted(cell, backend, options, sizes)
    dtype = fast.dtype
    x = numbers(4, 3, I).to(dtype)
    results = [fast(x), fast(x[:, 0]), fast(packed_rows(x))]
    results.append(fast(x, results[0][1]))
    results.append(fast(x.clone().requires_grad_()))  # by the operator
    if not fast.bidirectional:
        results += [fast.step(x[0]), fast.step(x[0, 0])]
    fast.warm_up()
    return [*results, *fast.to_dense().state_dict().values(), repr(fast), fast.density]


def int8(backend: str, activations: bool) -> list[Any]:
    options = {"weight_dtype": torch.int8, "activation_dtype": torch.int8 if activations else None}
    return call_in_every_form(nn.LSTM, backend, options, proj_size=3)


def narrow_layer(backend: str) -> list[Any]:
    layer = prune_columns(nn.GRU(I, H, **LIKE)).half().eval()
    fast = to_sparse(layer, backend=backend, storage=(16, 1))
    return [fast(numbers(4, 2, I).half()), *fast.to_dense().state_dict().values()]


def save_and_load(tmp_path: Any) -> list[Any]:
    build = lambda: nn.Sequential(SparseGRU(I, H, num_layers=2, **LIKE))  # noqa: E731
    model = build().eval()
    prune_columns(model[0])  # type: ignore[arg-type]
    save_sparse(to_sparse(model, weight_dtype=torch.int8), tmp_path / "model.safetensors")
    loaded = load_sparse(build(), tmp_path / "model.safetensors")
    return [loaded(numbers(4, 2, I)), *loaded.state_dict().values(), str(sparsity_report(loaded))]


SCHEDULES: dict[str, Callable[[nn.Module], Any]] = {
    "PolynomialDecay": lambda _: PolynomialDecay(final_sparsity=0.8, begin_step=0, end_step=4, frequency=1),
    "ThresholdRamp": lambda m: ThresholdRamp.from_weights(m, 0.7, begin_step=0, ramp_step=2, end_step=4, frequency=1),
    "OneShot": lambda _: OneShot(sparsity=0.6, step=2),
    "ConstantMask": lambda _: ConstantMask(),
}


def train_and_prune(schedule: str, score: str, **options: Any) -> list[Any]:
    model = prune_columns(SparseGRU(I, H, **LIKE))
    if schedule != "ConstantMask":
        with torch.no_grad():
            for seed, parameter in enumerate(model.parameters()):
                parameter.copy_(numbers(*parameter.shape, seed=seed))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruned_by = SCHEDULES[schedule](model)
    make = lambda: Pruner(model, pruned_by, score=score, **options)  # noqa: E731
    pruner = make()
    results: list[Any] = [str(forecast(model, pruner))]
    for _ in range(2):
        with pruner.attach(optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                (model(numbers(6, 2, I))[0].square().mean() + 1e-3 * (group_lasso(model) + l1(model))).backward()
                optimizer.step()
        saved, pruner = pruner.state_dict(), make()
        pruner.load_state_dict(saved)
        results += [saved["weights"][name]["mask"] for name in pruner.masks]
    return [*results, *model.parameters(), *pruner.masks.values(), pruner.sparsity, str(sparsity_report(model))]


def train_with_gate_gradients(cell: Any, backend: str | None, packed: bool, **rule: Any) -> list[Any]:
    layer = cell(I, H, bidirectional=True, gate_gradient=GateGradientSparsity(backend=backend, **rule), **LIKE)
    prune_columns(layer)
    results: list[Any] = []
    for seed in range(3):
        x = numbers(6, 3, I, seed=seed)
        y, _ = layer(packed_rows(x) if packed else x)
        (y.data if packed else y).square().sum().backward()
        results += [*(parameter.grad.clone() for parameter in layer.parameters()), repr(layer.gate_gradient_stats)]
    state = layer.gate_gradient_controller.state_dict()
    layer.gate_gradient_controller.load_state_dict(state)
    return [*results, *(value for value in state.values() if isinstance(value, Tensor))]


def bsr() -> list[Any]:
    matrix = BlockMatrix.from_dense(prune_columns(nn.GRU(8, 16, **LIKE)).get_parameter("weight_hh_l0"), (4, 1), gates=3)
    again = BlockMatrix.from_bsr(matrix.to_bsr(), gates=3)
    return [again.to_dense(), again.columns]


ON_CPU = ("reference", "cpu")
OPERATIONS: dict[str, Callable[..., list[Any]]] = {
    "bsr": bsr,
    **{f"{cell.__name__} {backend}": functools.partial(call_in_every_form, cell, backend, {}, num_layers=2)
       for cell in (nn.RNN, nn.GRU, nn.LSTM) for backend in ON_CPU},
    **{f"no bias {backend}": functools.partial(call_in_every_form, nn.GRU, backend, {}, bias=False)
       for backend in ON_CPU},
    **{f"proj_size {backend}": functools.partial(
        call_in_every_form, nn.LSTM, backend, {}, proj_size=3, bidirectional=True) for backend in ON_CPU},
    **{f"int8 {activations} {backend}": functools.partial(int8, backend, activations)
       for activations in (False, True) for backend in ON_CPU},
    **{f"float16 {backend}": functools.partial(narrow_layer, backend) for backend in ON_CPU},
    **{f"{schedule} {score}": functools.partial(train_and_prune, schedule, score)
       for schedule in SCHEDULES for score in (("max", "mean", "l2") if schedule == "OneShot" else ("l2",))},
    "tied": functools.partial(train_and_prune, "OneShot", "mean", tie_gates=True),
    "balanced": functools.partial(train_and_prune, "PolynomialDecay", "l2", balanced=True),
    "by layer": functools.partial(train_and_prune, "PolynomialDecay", "l2", split="layer"),
    **{f"gate gradients {cell.__name__} {backend} {packed} {rule}": functools.partial(
        train_with_gate_gradients, cell, backend, packed, **rule)
       for cell, backend in ((SparseLSTM, "cpu"), (SparseLSTM, "reference"), (SparseGRU, "reference"))
       for packed in (False, True)
       for rule in ({"threshold": 0.1}, {"target": 0.6})},
}  # fmt: skip


def bits(value: Any) -> Any:
    if isinstance(value, PackedSequence):
        return bits(value.data)
    if isinstance(value, (tuple, list)):
        return [bits(part) for part in value]
    if isinstance(value, Tensor):
        tensor = value.detach()
        return tensor.dtype, tensor.device.type, tuple(tensor.shape), tensor.contiguous().cpu().numpy().tobytes()
    return value


ORDINARY: dict[str, Any] = {}


@pytest.mark.filterwarnings("ignore:.*so there is little to skip")  # of the layers here, which are small
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("defaults", DEFAULTS)
@pytest.mark.parametrize("name", [*OPERATIONS, "save and load"])
def test_an_operation_gives_the_same_bits(name, defaults, tmp_path):
    operation = OPERATIONS.get(name, functools.partial(save_and_load, tmp_path))
    if name not in ORDINARY:
        ORDINARY[name] = bits(operation())
    with DEFAULTS[defaults]():
        found = operation()
    assert bits(found) == ORDINARY[name]


def test_new_layers_follow_the_defaults():
    with default_dtype(torch.float64), torch.device("meta"):
        layer = SparseLSTM(I, H, proj_size=3)
    assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())
