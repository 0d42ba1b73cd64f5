"""How alike two kernels are, or a kernel and the targets' own: distances and cosines in the Frobenius norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["aligned", "compare"]


def compare(kernel: Tensor, start: Tensor) -> tuple[float, float, float]:
    """Return `|K - K0| / |K0|`, `<K, K0> / |K| |K0|`, and the latter of centred kernels, in Frobenius norms.

    The second is the kernel alignment of Cristianini et al. 2001, the third that of Cortes, Mohri and Rostamizadeh,
    JMLR 2012: both 1 for a kernel that training only multiplied by a number.
    """
    a, b = kernel.double(), start.double()
    return float((a - b).norm() / b.norm()), *_cosines(a, b)


def aligned(kernel: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return the alignment of a kernel with the targets' own, `Y Y^T`, as it is and centred.

    Args:
        kernel: [n, n], [n, n, k] or [n, n, k, k].
        targets: [n, k].
    """
    ideal = targets @ targets.T
    if kernel.ndim == 3:
        ideal = torch.einsum("ia,ja->ija", targets, targets)
    elif kernel.ndim == 4:
        ideal = torch.einsum("ia,jb->ijab", targets, targets)
    return _cosines(kernel.double(), ideal)


def _cosines(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the cosine of two kernels, and that of the centred ones."""
    return _cosine(a, b), _cosine(_centred(a), _centred(b))


def _cosine(a: Tensor, b: Tensor) -> float:
    norm = float(a.norm() * b.norm())
    return float((a * b).sum()) / norm if norm > 0 else math.nan


def _centred(K: Tensor) -> Tensor:
    """Take the means over samples away, as of features: `H K H` with `H = I - 1/n` ([n, n, ...])."""
    rows = K - K.mean(0, keepdim=True)
    return rows - rows.mean(1, keepdim=True)
