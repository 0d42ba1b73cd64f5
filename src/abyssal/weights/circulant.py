"""Circulant embedding: the eigenvalues of an autocovariance that is mirrored to a ring."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["circulant_eigenvalues"]


def circulant_eigenvalues(half: Tensor) -> tuple[Tensor, float | None]:
    """Return the eigenvalues of the symmetric circulant matrix whose row is a mirrored autocovariance.

    Args:
        half: autocovariance at lags 0 to P, all of them in the row once more mirrored but the first and last.
            [P + 1], float64

    Returns:
        The 2P eigenvalues with those that are negative by rounding alone set to 0, and the smallest one if
        it is more negative than rounding explains. [2P]
    """
    row = torch.cat([half, half[1:-1].flip(0)])
    half_spectrum = torch.fft.rfft(row).real
    size = len(row)
    # The computed transform is off by at most 8 u log2(size) times its norm, sqrt(size) |row| (Higham, Accuracy
    # and Stability of Numerical Algorithms, theorem 24.2, whose constant is below 8), and the row's own
    # rounding, a few u an entry, by less. eps = 2 u leaves a factor of 2 for the latter.
    bound = 8 * torch.finfo(torch.float64).eps * math.log2(2 * size) * math.sqrt(size) * float(row.norm())
    smallest = float(half_spectrum.min())
    half_spectrum = half_spectrum.clamp(min=0)
    spectrum = torch.cat([half_spectrum, half_spectrum[1:-1].flip(0)])
    return spectrum, smallest if smallest < -bound else None
