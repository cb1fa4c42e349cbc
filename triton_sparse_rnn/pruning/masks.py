"""Masks as bits: to set pruned entries to zero, and to keep in a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def kept_bits(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask, True = kept, into integers as wide as `dtype`: all bits 1 where it is True. See `zero_pruned`."""
    return mask.to(_INTEGERS[dtype.itemsize]).neg_()


def zero_pruned(tensor: Tensor, bits: Tensor) -> None:
    """Set the pruned entries of a floating-point tensor to zero in place, NaN and infinity too; keep all others as is.

    A bitwise `and` takes a tenth of the time of `masked_fill_` on a CPU, and unlike a product makes no NaN of inf * 0.
    """
    integers = _INTEGERS[tensor.itemsize]
    tensor.detach().view(integers).bitwise_and_(bits.to(integers))  # -1 stays -1, all bits 1, in any width


def pack_bits(mask: Tensor) -> Tensor:
    """Store a mask of any shape in bits: uint8 [ceil(n / 8)] on the CPU, the first entry in the lowest bit.

    >>> pack_bits(torch.tensor([True, True, False, True]))
    tensor([11], dtype=torch.uint8)
    """
    flat = mask.flatten().to("cpu", torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: tuple[int, ...], of: str = "units") -> Tensor:
    """Undo `pack_bits`; `of` says what the entries stand for.

    Raises:
        ValueError: `packed` is no uint8 vector of the right length, or has bits set beyond the last entry.
    """
    count = torch.Size(shape).numel()
    if not _is_vector(packed, -(-count // 8)):
        raise ValueError(f"expected uint8 [{-(-count // 8)}] for {count} {of}, got {_describe(packed)}")
    bits = (packed.to("cpu")[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
    if bits.flatten()[count:].any():
        raise ValueError(f"bits are set beyond the {count} {of}")
    return bits.flatten()[:count].to(torch.bool).view(shape)


def _is_vector(value: object, length: int) -> bool:
    """Whether it is uint8 [length] in memory; a nested tensor, which is strided too, has no shape to ask for."""
    if not isinstance(value, Tensor) or value.is_meta or value.is_nested or value.layout != torch.strided:
        return False
    return value.dtype == torch.uint8 and tuple(value.shape) == (length,)


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    place = (
        "" if value.layout == torch.strided and not value.is_meta else f" of layout {value.layout} on {value.device}"
    )
    return f"{value.dtype} {list(value.shape)}{place}"
