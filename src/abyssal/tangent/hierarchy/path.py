"""Outputs, loss and kernel along time: what the hierarchy predicts, or what the flow does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Distance", "TangentPath", "check_times"]


@dataclass(frozen=True)
class Distance:
    """How far one path is from another, at each time.

    Attributes:
        times: [T]
        kernel: `|K - K'| / |K'|`, in the Frobenius norm. [T]
        outputs: `|f - f'| / |f'(0) - y|`: relative to the first residual, since residuals vanish (absolute where
            that is zero). [T]
    """

    times: Tensor
    kernel: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class TangentPath:
    """Outputs, loss and kernel at some times.

    Attributes:
        times: [T]
        outputs: in the model's shape. [T, n] or [T, n, ...]
        loss: `(1 / 2n) sum |f - y|^2`. [T]
        kernel: [T, N, N], N = n k
        first_residual: `|f(0) - y|`.
        order: of the truncation; None for the true flow.
        tolerance: relative, of each step of the integrator.
        error: of the true flow: the largest relative change of a kernel, and of the outputs, against an integration
            with a tolerance a hundred times as large: what that one is wrong by, so in general far above this one's
            own error. None where it was not asked for, and for predictions.
        reached: the last time that the integration reached. Truncated systems can blow up in finite time; what stands
            beyond is NaN.
    """

    times: Tensor
    outputs: Tensor
    loss: Tensor
    kernel: Tensor
    first_residual: float
    order: int | None
    tolerance: float
    error: float | None
    reached: float

    def distance(self, other: TangentPath) -> Distance:
        """Return how far this path is from another, of the same model, samples and times.

        Args:
            other: the reference, usually the true flow.

        Raises:
            ValueError: if times or shapes differ.
        """
        if self.kernel.shape != other.kernel.shape or not torch.equal(self.times, other.times):
            raise ValueError(
                f"Both paths need the same times and outputs: {len(self.times)} times up to {self.times[-1]:g} and a "
                f"kernel {list(self.kernel.shape[1:])} here, {len(other.times)} up to {other.times[-1]:g} and "
                f"{list(other.kernel.shape[1:])} there. Give predict and flow the same times."
            )
        kernel = (self.kernel - other.kernel).flatten(1).norm(dim=1) / other.kernel.flatten(1).norm(dim=1)
        outputs = (self.outputs - other.outputs).flatten(1).norm(dim=1) / (other.first_residual or 1.0)
        return Distance(self.times, kernel, outputs)


def check_times(times: Sequence[float] | Tensor) -> list[float]:
    """Return times as numbers, or raise ValueError or TypeError."""
    try:
        found = [float(t) for t in times]
    except TypeError:
        raise TypeError(f"times has to be a sequence of numbers, got {times!r}.") from None
    if not found or not all(0 <= t < float("inf") for t in found) or any(b <= a for a, b in itertools.pairwise(found)):
        raise ValueError(f"times have to be at least one number, finite, at least 0 and increasing, got {found}.")
    return found
