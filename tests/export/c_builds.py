"""The C runtime as tests run it: built by each compiler and for each processor that is here, and called from Python."""

from __future__ import annotations

import ctypes
import functools
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import triton_sparse_rnn
from triton_sparse_rnn.export.blob import make_blob
from triton_sparse_rnn.export.chain import c_layers

PROJECT = Path(triton_sparse_rnn.__file__).resolve().parent.parent
RUNTIME = PROJECT / "triton_sparse_rnn" / "export" / "c"
STRICT = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic")
OK, MAGIC, ORDER, VERSION, SIZE, CHECKSUM, LAYERS, INDICES, MEMORY, DIRECTIONS = range(10)  # tsr_status


class Build(NamedTuple):
    """A compiler with its flags, and what runs its programs."""

    compiler: str
    flags: tuple[str, ...]
    runner: tuple[str, ...] = ()
    instructions: str = ""  # what tsr_instructions() says; "" for what follows from this processor


BUILDS = {
    "native": Build("cc", ("-O2", "-march=native")),
    "AVX-512": Build("gcc", ("-O2", "-mavx512f"), instructions="AVX-512"),
    "AVX2": Build("gcc", ("-O2", "-mavx2", "-mfma", "-mf16c"), instructions="AVX2"),
    "AVX2 without F16C": Build("gcc", ("-O2", "-mavx2", "-mfma", "-mno-f16c"), instructions="AVX2"),
    "plain": Build("gcc", ("-O2", "-DTSR_PLAIN"), instructions="plain C"),
    "clang": Build("clang", ("-O2", "-march=native")),
    "clang plain": Build("clang", ("-O2", "-DTSR_PLAIN"), instructions="plain C"),
    "clang AVX2": Build("clang", ("-O2", "-mavx2", "-mfma"), instructions="AVX2"),
    "sanitized": Build("gcc", ("-O1", "-g", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover")),
    "sanitized plain": Build(  # neither optimised nor inlined, which takes minutes
        "gcc",
        ("-O0", "-g", "-DTSR_PLAIN", "-Dalways_inline=unused", "-fsanitize=address,undefined", "-fno-sanitize-recover"),
        instructions="plain C",
    ),
    "NEON": Build("aarch64-linux-gnu-gcc", ("-O2", "-static"), ("qemu-aarch64",), "NEON"),
}
_NEEDED = {"AVX-512": ["avx512f"], "AVX2": ["avx2", "fma", "f16c"]}  # of instructions, in /proc/cpuinfo


@functools.cache
def build(name: str, source: Path, *, library: bool = False, more: tuple[str, ...] = ()) -> Path:
    """Compile a program or library with the runtime, or skip the test where that cannot run here."""
    chosen = BUILDS[name]
    for program in (chosen.compiler, *chosen.runner):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if not set(_NEEDED.get(chosen.instructions, [])) <= _processor_flags():
        pytest.skip(f"this processor has no {chosen.instructions}")
    output = _folder() / f"{source.stem}-{name.replace(' ', '-')}{'.so' if library else ''}"
    sources = [source] if source.name == "tsr_runtime.c" else [source, RUNTIME / "tsr_runtime.c"]
    shared = ["-shared", "-fPIC"] if library else []
    command = [
        chosen.compiler,
        *STRICT,
        *chosen.flags,
        *more,
        *shared,
        f"-I{RUNTIME}",
        *map(str, sources),
        "-o",
        output,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return output


def run(
    name: str, program: Path, arguments: Sequence[object], given: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run what `build` made."""
    command = [*BUILDS[name].runner, str(program), *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, timeout=600)


class Model(ctypes.Structure):
    """tsr_model."""

    _fields_ = (
        ("blob", ctypes.c_void_p),
        ("blob_bytes", ctypes.c_size_t),
        ("stream_bytes", ctypes.c_size_t),
        ("inputs", ctypes.c_uint32),
        ("outputs", ctypes.c_uint32),
        ("state_floats", ctypes.c_uint32),
        ("layers", ctypes.c_uint32),
        ("widest", ctypes.c_uint32),
        ("bidirectional", ctypes.c_int),
    )


class Stream(ctypes.Structure):
    """tsr_stream."""

    _fields_ = (("model", ctypes.c_void_p), ("memory", ctypes.c_void_p))


@functools.cache
def library(name: str = "native") -> Any:
    """The runtime, loaded into this process."""
    loaded = ctypes.CDLL(str(build(name, RUNTIME / "tsr_runtime.c", library=True)))
    loaded.tsr_run_bytes.restype = ctypes.c_size_t
    loaded.tsr_instructions.restype = loaded.tsr_message.restype = ctypes.c_char_p
    return loaded


def open_blob(blob: bytes) -> tuple[int, Model]:
    """The status of tsr_open(), and the model; `blob` must be kept."""
    model = Model()
    return library().tsr_open(ctypes.byref(model), blob, ctypes.c_size_t(len(blob))), model


class Running:
    """A stream of a chain of modules in C."""

    def __init__(self, *modules: torch.nn.Module, offset: int = 0, shift: int = 0) -> None:
        """Begin.

        Args:
            offset: of its memory, and
            shift: of its blob, from where either is aligned.
        """
        self.library = library()
        self.layers = c_layers([(type(module).__name__, module) for module in modules])
        blob = make_blob(self.layers)
        self._blob = ctypes.create_string_buffer(b"\0" * shift + blob)
        self.model, self.stream = Model(), Stream()
        address = ctypes.addressof(self._blob) + shift
        size = ctypes.c_size_t(len(blob))
        assert self.library.tsr_open(ctypes.byref(self.model), ctypes.c_void_p(address), size) == OK
        self._memory = ctypes.create_string_buffer(b"\xff" * (self.model.stream_bytes + offset))
        memory = ctypes.c_void_p(ctypes.addressof(self._memory) + offset)
        bytes_given = ctypes.c_size_t(self.model.stream_bytes)
        assert self.library.tsr_init(*self._both(), memory, bytes_given) == OK

    def _both(self) -> tuple[Any, Any]:
        return ctypes.byref(self.stream), ctypes.byref(self.model)

    def step(self, x: Tensor) -> Tensor:
        """X [I] -> y [O]."""
        y = torch.full((self.model.outputs,), torch.nan)
        assert self.library.tsr_step(ctypes.byref(self.stream), *map(pointer, (x, y))) == OK
        return y

    def run(self, x: Tensor) -> Tensor:
        """X [T, I] -> y [T, O]."""
        steps = ctypes.c_size_t(len(x))
        y = torch.full((len(x), self.model.outputs), torch.nan)
        needed = self.library.tsr_run_bytes(ctypes.byref(self.model), steps)
        scratch = ctypes.create_string_buffer(b"\xff" * needed, needed + 1)
        given = ctypes.c_size_t(needed)
        assert self.library.tsr_run(ctypes.byref(self.stream), *map(pointer, (x, y)), steps, scratch, given) == OK
        return y

    def reset(self) -> None:
        self.library.tsr_reset(ctypes.byref(self.stream))

    @property
    def state(self) -> Tensor:
        """[state floats]."""
        state = torch.full((self.model.state_floats,), torch.nan)
        self.library.tsr_get_state(ctypes.byref(self.stream), pointer(state))
        return state

    @state.setter
    def state(self, state: Tensor) -> None:
        self.library.tsr_set_state(ctypes.byref(self.stream), pointer(state))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    assert tensor.dtype == torch.float32
    return ctypes.c_void_p(tensor.data_ptr())


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="tsr-c-"))


@functools.cache
def _processor_flags() -> set[str]:
    information = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not information.exists():
        return set()
    line = next((line for line in information.read_text().splitlines() if line.startswith("flags")), "")
    return set(line.split())
