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


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack values of `bits` bits.

    Args:
        values: uint8, each below 2^bits; contiguous, a multiple of 8 of them. [count]
        bits: 1, 2, 3, 4, 6 or 8.

    Returns:
        uint8. [count * bits / 8]
    """
    planes = []
    for width in PLANES[bits]:
        last = width == bits  # nothing above this plane to mask off
        planes.append(_fold(values if last else values & ((1 << width) - 1), width))
        if not last:
            values, bits = values >> width, bits - width
    return planes[0] if len(planes) == 1 else torch.cat(planes)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: uint8, as `pack` returned it. [count * bits / 8]
        bits: 1, 2, 3, 4, 6 or 8.

    Returns:
        uint8, each below 2^bits. [count]
    """
    widths = PLANES[bits]
    if len(widths) == 1:
        return _unfold(packed, widths[0])
    low, high = packed.split([packed.numel() * width // bits for width in widths])
    return _unfold(low, widths[0]) | (_unfold(high, widths[1]) << widths[0])


def _fold(values: Tensor, width: int) -> Tensor:
    """Fold values of `width` bits until they fill bytes."""
    while width < 8:
        first, second = values.chunk(2) if values.numel() else (values, values)
        values = first | (second << width)
        width *= 2
    return values


def _unfold(values: Tensor, width: int) -> Tensor:
    """Undo `_fold`."""
    filled = 8
    while filled > width:
        filled //= 2
        values = torch.cat([values & ((1 << filled) - 1), values >> filled])
    return values
