"""Keep glibc's heap between steps, so that timing sees the arithmetic and not the page faults.

By default glibc hands large freed blocks back to the system. Plain backprop frees its whole set of
activations in every step and then pays a page fault for every 4 KB of the next one, up to a third of its
time, while checkpointing hardly does: checkpointing seems faster than plain backprop, which is an artefact.
"""

from __future__ import annotations

import ctypes

__all__ = ["keep_heap"]

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_heap() -> bool:
    """Make glibc keep freed memory for the rest of this process.

    The process stays as large as it once was. Memory that was mapped before the call stays as it is, so call
    it early.

    Returns:
        False where the C library has no `mallopt` (macOS, musl, Windows) or refuses: step times are then
        not to be compared.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(_M_MMAP_THRESHOLD, 2**30))
