"""Small whole numbers packed into bytes: 1, 2, 3, 4, 6 or 8 bits each, with none left over.

A byte's fields do not hold neighbours. The tensor is folded: its first half goes into the low bits, its second
half into the high bits, and again until the bytes are full, so that every operation runs over contiguous
memory (packing neighbours took five times as long on a CPU). Widths that do not divide 8 are split into planes
of 2 + 1 or 4 + 2 bits, one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}  # widths of the planes, lowest bits first
MULTIPLE = 8  # of values, so that each plane fills whole bytes


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes `count` values of `bits` bits take; `count` a multiple of 8."""
    return count // MULTIPLE * bits


def pack(values: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Pack values of `bits` bits.

    Args:
        values: uint8, each below 2^bits; contiguous, a multiple of 8 of them. [count]
        bits: 1, 2, 3, 4, 6 or 8.
        out: where to write; None for a new tensor. [count * bits / 8]

    Returns:
        uint8. [count * bits / 8]
    """
    if out is None:
        out = values.new_empty(packed_bytes(values.numel(), bits))
    widths, planes = PLANES[bits], _planes(out, bits)
    for width, plane in zip(widths[:-1], planes, strict=False):
        _fold(values & ((1 << width) - 1), width, plane)
        values = values >> width
    _fold(values, widths[-1], planes[-1])
    return out


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: uint8, as `pack` returned it. [count * bits / 8]
        bits: 1, 2, 3, 4, 6 or 8.

    Returns:
        uint8, each below 2^bits, in a new tensor. [count]
    """
    low, *high = (_unfold(plane, width) for plane, width in zip(_planes(packed, bits), PLANES[bits], strict=True))
    for plane in high:
        low.add_(plane, alpha=1 << PLANES[bits][0])
    return low


def _planes(packed: Tensor, bits: int) -> tuple[Tensor, ...]:
    widths = PLANES[bits]
    return (packed,) if len(widths) == 1 else packed.split([packed.numel() * width // bits for width in widths])


def _fold(values: Tensor, width: int, out: Tensor) -> None:
    """Fold values of `width` bits until they fill bytes."""
    if width == 8:
        out.copy_(values)
    while width < 8:
        first, second = values.view(2, -1)
        # Their bits do not meet.
        values = torch.add(first, second, alpha=1 << width, out=out if width == 4 else None)
        width *= 2


def _unfold(values: Tensor, width: int) -> Tensor:
    """Undo `_fold`, in a new tensor."""
    if width == 8:
        return values.clone()
    filled = 8
    while filled > width:
        filled //= 2
        values = torch.cat([values & ((1 << filled) - 1), values >> filled])
    return values
