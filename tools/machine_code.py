"""Compiling a Triton kernel for GPUs that are not here, and reading the machine code.

    code = compile_for(resident_steps, {"weights_ptr": "*fp32", ..., "H": "i32"}, {"CELL": 2, ..., "B": 1},
                       arch=90, num_warps=8, maxnreg=None, divisible=("H",))
    code.registers, code.spilled_bytes, code.shared_bytes       # a thread, a thread, a program
    len(code.step), code.count("BAR"), code.count("SHFL")       # instructions of the time loop, of one kind
    [access for access in code.accesses if access.in_time_loop and "weights_ptr" in access.arguments]

`uncompilable()` says why that does not work here, if so. Uses Triton's own compiler, ptxas and cuobjdump; no GPU.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tools import sass
from triton_sparse_rnn.errors import BackendUnavailableError
from triton_sparse_rnn.kernels.triton.tiles import TARGETS

ARCHITECTURES = TARGETS


@dataclass(frozen=True)
class MachineCode:
    """What a compiled kernel is made of.

    Attributes:
        arch: 90 for sm_90.
        num_warps: of a program.
        registers: of a thread.
        spilled_bytes: of a thread: its stack, which Triton's kernels use for nothing but registers that did not fit.
        shared_bytes: of a program.
        opcodes: of all instructions.
        step: opcodes of the time loop's body, each waiting loop in it once; empty if the code has no loop. A short loop
            may have been unrolled, so that its body is several steps.
        accesses: all that reads or writes global memory.
        shortest: opcodes of the shortest way through the time loop's body: what a warp issues that waits for nothing.
    """

    arch: int
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    opcodes: tuple[str, ...]
    step: tuple[str, ...]
    accesses: tuple[sass.Access, ...]
    shortest: tuple[str, ...] = ()

    def count(self, *kinds: str) -> int:
        """Instructions in the time loop whose opcodes, without modifiers, are among `kinds`."""
        return sum(opcode.partition(".")[0] in kinds for opcode in self.step)


def uncompilable() -> str | None:
    """Return why kernels cannot be compiled in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it is available for Linux: pip install triton"
    from triton import knobs

    if knobs.runtime.interpret:
        return "TRITON_INTERPRET=1 makes kernels run in the interpreter; run again without it"
    for name in ("ptxas", "cuobjdump"):
        try:
            getattr(knobs.nvidia, name)
        except RuntimeError:
            return f"triton has no {name}, which its own wheels contain; install one of these"
    return None


def compile_for(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    *,
    arch: int,
    num_warps: int,
    maxnreg: int | None = None,
    num_stages: int = 1,
    divisible: Collection[str] = (),
) -> MachineCode:
    """Compile a kernel as a launch would.

    Args:
        kernel: made by triton.jit.
        types: of its arguments, e.g. "*fp32", "i32"; pointers are taken to be divisible by 16, as torch's tensors are.
        constants: values of the others, which are constexpr, or 1, which Triton makes one.
        arch: 90 for sm_90.
        num_warps: of a program.
        maxnreg: the most registers of a thread, or None.
        num_stages: 1, or the pipeliner moves loads.
        divisible: names of integers to be taken as divisible by 16, as Triton finds them at a launch.
    Raises:
        BackendUnavailableError: it cannot be compiled here.
        ValueError: types and constants do not give each argument of the kernel once.
    """
    if reason := uncompilable():
        raise BackendUnavailableError(f"kernels cannot be compiled here: {reason}")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names: list[str] = kernel.arg_names
    if sorted([*types, *constants]) != sorted(names):
        wrong = sorted((set(types) ^ set(constants)) ^ set(names))
        raise ValueError(
            f"types and constants must give each argument of {kernel.__name__} once, which is not so of {wrong}"
        )
    # Triton removes the constants, and numbers the others in the order of the kernel's arguments.
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in divisible]
    source = ASTSource(
        kernel, signature, constexprs=dict(constants), attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    passed = [name for name in names if name not in constants]
    pointers = [i for i, name in enumerate(passed) if types[name].startswith("*")]
    return _read(
        compiled.asm["cubin"],
        compiled.metadata.name,
        {i: passed[i] for i in pointers},
        arch=arch,
        num_warps=num_warps,
        shared_bytes=compiled.metadata.shared,
    )


def _read(
    cubin: bytes, function: str, pointers: Mapping[int, str], *, arch: int, num_warps: int, shared_bytes: int
) -> MachineCode:
    """Take compiled code apart; `pointers` are ordinal -> name of the arguments that are pointers."""
    elf = _cuobjdump("-elf", cubin)
    registers = _attribute(elf, "EIATTR_REGCOUNT", rf"function: {function}\(.*register count: (\d+)")
    stack = _attribute(elf, "EIATTR_MIN_STACK_SIZE", rf"function: {function}\(.*stack size: (0x[0-9a-f]+)")
    first = _attribute(elf, "EIATTR_PARAM_CBANK", r"0x[0-9a-f]+ (0x[0-9a-f]+)") & 0xFFFF
    offsets = {
        int(ordinal, 16): int(offset, 16)
        for ordinal, offset in re.findall(r"Ordinal : (0x[0-9a-f]+)\s+Offset  : (0x[0-9a-f]+)", elf)
    }
    flow = sass.ControlFlow(sass.parse(_cuobjdump("-sass", cubin), function))
    step = sass.time_loop(flow)
    return MachineCode(
        arch=arch,
        num_warps=num_warps,
        registers=registers,
        spilled_bytes=stack,
        shared_bytes=shared_bytes,
        opcodes=tuple(instruction.opcode for instruction in flow.code if instruction.kind != "NOP"),
        step=tuple(flow.code[i].opcode for i in flow.instructions(step)),
        accesses=sass.global_accesses(flow, {first + offsets[i]: name for i, name in pointers.items()}, step),
        shortest=tuple(flow.code[i].opcode for i in sass.shortest_pass(flow, step)),
    )


def _attribute(elf: str, name: str, pattern: str) -> int:
    """Return a number that the compiled code says of itself."""
    found = re.search(rf"Attribute:\s+{name}\s+(?:Format:.*\s+)?Value:\s+{pattern}", elf)
    if not found:
        raise ValueError(f"cuobjdump shows no {name} of this form; a newer triton may print it in another")
    return int(found[1], 0)


def _cuobjdump(flag: str, cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
