"""The C files that are written for one chain: its sizes, and its weights as an array."""

from __future__ import annotations

from collections.abc import Sequence

from triton_sparse_rnn.export.chain import KINDS, CLayer
from triton_sparse_rnn.export.matrices import BLOCKS, DENSE, PICKS, CMatrix

BANK = 32
_ALIGNMENT_SLACK = 63  # so that a stream may lie anywhere
_KIND_NAMES = {number: name for name, number in KINDS.items()}
_PATTERN_NAMES = {DENSE: "dense", BLOCKS: "blocks of 16x1", PICKS: "picks of 16x1 in 32"}
_PER_LINE = 24


def stream_bytes(layers: Sequence[CLayer]) -> int:
    """Return the memory that a stream of these layers needs, as tsr_open() says too."""
    floats = _padded(layers[0].inputs)
    for layer in layers:
        is_recurrent = layer.kind < KINDS["LINEAR"]
        hidden = (2 if layer.kind == KINDS["LSTM"] else 1) if is_recurrent else 0
        floats += layer.directions * (_padded(layer.outputs) + hidden * _padded(layer.hidden))
    return 4 * floats + _ALIGNMENT_SLACK


def model_header(name: str, layers: Sequence[CLayer], blob: bytes, maker: str, *, is_array: bool) -> bytes:
    """Return NAME.h."""
    sizes = {
        "INPUTS": (layers[0].inputs, "floats of x in a step"),
        "OUTPUTS": (layers[-1].outputs * layers[-1].directions, "floats of y in a step"),
        "STATE_FLOATS": (sum(layer.state_floats for layer in layers), "of tsr_get_state() and tsr_set_state()"),
        "STREAM_BYTES": (stream_bytes(layers), "memory that a stream needs"),
        "BLOB_BYTES": (len(blob), f"of {name}_blob" if is_array else f"of {name}.bin"),
    }
    prefix = name.upper()
    width = max(map(len, sizes)) + len(prefix) + 1
    defined = "".join(
        f"#define {f'{prefix}_{size}':<{width}} {number} /* {meaning} */\n" for size, (number, meaning) in sizes.items()
    )
    array = f"{_BEGIN_C}extern const unsigned char {name}_blob[{prefix}_BLOB_BYTES];\n{_END_C}\n" if is_array else ""
    described = "".join(f" *   {_describe(layer)}\n" for layer in layers)
    text = (
        f"/* A model for tsr_runtime.c:\n *\n{described} *\n{_licence(maker)} */\n"
        f"#ifndef {prefix}_H\n#define {prefix}_H\n\n{defined}\n{array}#endif\n"
    )
    return text.encode()


def array_source(name: str, blob: bytes, maker: str) -> bytes:
    """Return NAME.c, which has the blob of NAME.bin as an array."""
    lines = (",".join(map(str, blob[first : first + _PER_LINE])) for first in range(0, len(blob), _PER_LINE))
    text = (
        f'/* The weights of {name}.h.\n *\n{_licence(maker)} */\n#include <stdalign.h>\n\n#include "{name}.h"\n\n'
        f"alignas(64) const unsigned char {name}_blob[{name.upper()}_BLOB_BYTES] = {{\n"
    )
    return (text + ",\n".join(lines) + "\n};\n").encode()


_BEGIN_C = '#ifdef __cplusplus\nextern "C" {\n#endif\n'
_END_C = "#ifdef __cplusplus\n}\n#endif\n"


def _licence(maker: str) -> str:
    return (
        f" * Written by export_c() of {maker}, which claims nothing in it: this file is as free as the\n"
        " * weights, which belong to whoever trained them.\n"
    )


def _describe(layer: CLayer) -> str:
    """Such as "GRU, 64 -> 256, dense and picks of 16x1 in 32"."""
    directions = ", both directions" if layer.directions > 1 else ""
    stored = dict.fromkeys(map(_stored, layer.matrices))
    described = f"{_KIND_NAMES[layer.kind]}, {layer.inputs} -> {layer.outputs * layer.directions}{directions}"
    return described + (f", {' and '.join(stored)}" if stored else "")


def _stored(matrix: CMatrix) -> str:
    return f"{str(matrix.values.dtype).removeprefix('torch.')} in {_PATTERN_NAMES[matrix.pattern]}".replace(
        "in dense", "dense"
    )


def _padded(floats: int) -> int:
    return -(-floats // BANK) * BANK
