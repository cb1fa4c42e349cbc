"""Tensors are made with a dtype and a device that are stated: what a process has set as its defaults is the user's."""

import ast
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

from triton_sparse_rnn import __file__ as package

PROJECT = Path(package).resolve().parent.parent
FOLDERS = ("triton_sparse_rnn", "kernels")
STATED = {"dtype", "device"}
# What torch makes on the default device, and what takes the default dtype or device by its class alone.
FACTORIES = {function.__name__.removeprefix("fft_") for function in _device_constructors()}
CLASSES = {"Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor"}


def source_files():
    """Every file once: triton_sparse_rnn/kernels is a link to kernels."""
    return sorted({path.resolve() for folder in FOLDERS for path in (PROJECT / folder).rglob("*.py")})


def factory_faults(tree: ast.AST) -> list[str]:
    """The calls of a file that leave dtype or device to the process."""
    faults = []
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func)
        if not name.startswith("torch."):
            continue
        last = name.rpartition(".")[2]
        given = {keyword.arg for keyword in call.keywords}
        if last in CLASSES:
            faults.append(f"line {call.lineno}: {name}() takes the default dtype and device")
        elif last in FACTORIES and None not in given and (missing := STATED - given):
            faults.append(f"line {call.lineno}: {name}() without {' and '.join(sorted(missing))}")
    return faults


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(PROJECT)))
def test_factories_state_dtype_and_device(path):
    assert factory_faults(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.zeros(3)",
        "torch.zeros(3, dtype=torch.float32)",
        "torch.arange(3, device='cpu')",
        "f(1, *[torch.tensor(sizes)])",
        "torch.sparse_bsr_tensor(starts, columns, blocks)",
        "torch.fft.rfftfreq(8)",
        "torch.FloatTensor([1.0])",
    ],
)
def test_a_wrong_line_is_found(line):
    assert factory_faults(ast.parse(line))


@pytest.mark.parametrize(
    "line",
    [
        "torch.zeros(3, dtype=torch.float32, device='cpu')",
        "torch.randn(3, **like)",
        "torch.zeros_like(x)",
        "x.new_zeros(3)",
        "np.zeros(3)",
    ],
)
def test_a_right_line_is_not(line):
    assert factory_faults(ast.parse(line)) == []
