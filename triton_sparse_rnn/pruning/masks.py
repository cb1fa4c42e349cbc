"""Masks over blocks: which to prune, how to spread a mask over weights, apply it, and store it in bits."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_sparse_rnn.sparse.blocks import expand_block_mask

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def prune_to_sparsity(scores: Tensor, kept: Tensor, sparsity: float, *, balanced: bool = False) -> Tensor:
    """Prune the round(sparsity * blocks) blocks with the lowest scores; of equal ones, those that come first.

    Args:
        scores: [block rows, block columns], none negative or NaN.
        kept: the mask so far, bool of the same shape. What it prunes counts as lowest and stays pruned.
        sparsity: in [0, 1).
        balanced: prune round(sparsity * block columns) in every block row.

    Returns:
        The new mask, True = kept.

    >>> prune_to_sparsity(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), torch.ones(2, 2, dtype=torch.bool), 0.25)
    tensor([[ True, False],
            [ True,  True]])
    """
    ranked = scores.masked_fill(~kept, -1.0)
    rows = ranked if balanced else ranked.reshape(1, -1)
    count = round(sparsity * rows.shape[-1])
    if count == 0:
        return kept.clone()
    # The same as a stable sort, in a seventh of the time.
    highest = rows.topk(count, dim=-1, largest=False, sorted=False).values.amax(-1, keepdim=True)
    below, level = rows < highest, rows == highest
    pruned = below | (level & (level.cumsum(-1) <= count - below.sum(-1, keepdim=True)))
    return kept & ~pruned.view_as(kept)


def prune_to_threshold(scores: Tensor, kept: Tensor, threshold: float) -> Tensor:
    """Prune the blocks whose score is at most `threshold`; arguments and result as for `prune_to_sparsity`."""
    return kept & (scores > threshold)


def kept_bits(block_mask: Tensor, block_size: tuple[int, int], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Spread a block mask [G, block rows, block columns] over a weight `shape` of floating-point `dtype`.

    Returns:
        Integers as wide as `dtype`: all bits 1 where a weight is kept, 0 where it is pruned. See `zero_pruned`.
    """
    gates = block_mask.shape[0]
    rows, columns = shape[0] // gates, shape[1:].numel()
    mask = expand_block_mask(block_mask, block_size, rows, columns).view(shape)
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


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack_bits`.

    Raises:
        ValueError: `packed` is no uint8 vector of the right length, or has bits set beyond the last entry.
    """
    count = torch.Size(shape).numel()
    if not _is_vector(packed, -(-count // 8)):
        raise ValueError(f"expected uint8 [{-(-count // 8)}] for {count} blocks, got {_describe(packed)}")
    bits = (packed.to("cpu")[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
    if bits.flatten()[count:].any():
        raise ValueError(f"bits are set beyond the {count} blocks")
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
