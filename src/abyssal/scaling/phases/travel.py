"""How far columns travel through many layers: exactly, however small or huge the journey.

Columns `h` obey `h <- h + s_c B_l(h)` with one scale `s_c` each and positively homogeneous branches `B_l`. Three
things keep float32 products exact where a plain loop is not:

- The sum of branches since a base, `D`, is kept beside the base: `h = base + s D`. So `h_L - h_0` has the products'
  relative accuracy also where it is 1e-30 of `h_0`, and no scale underflows.
- Where a column has moved by more than an eighth of its base, it becomes the new base: from then on `h_L - h_0` does
  not cancel, and what is kept exactly is `h` itself, also where it falls to a tiny part of `h_0`.
- Columns far from 1 are multiplied by a power of two, which is exact, and the exponent is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Step", "Travel", "travel"]

Step = Callable[[int, Tensor, Tensor], None]  # layer, state [width, columns], sum to which its branch is added
_MOVED = 0.125  # part of the base by which a column has moved when it becomes the base
_FAR = 40  # binary orders of magnitude from 1 at which a column is rescaled
_ROOM = 60  # binary orders of magnitude that a column may grow by between two looks: 40 + 60 < 127
_MOST_STEPS = 32
_LEAST_ACTIVE = -7.0


@dataclass(frozen=True)
class Travel:
    """What became of the columns, as logarithms to base 10.

    Attributes:
        change: log10 of |end - start| / |start|; -inf where they are equal. [scales, starts], float64
        ratio: log10 of |end| / |start|. [scales, starts], float64
        active: log10 of |max(end, 0)| / |max(start, 0)|, no less than -7, below which float32 cannot tell it from 0;
            nan where the start has no positive entry. [scales, starts], float64
    """

    change: Tensor
    ratio: Tensor
    active: Tensor


def travel(starts: Tensor, log_scales: Tensor, layers: int, step: Step, growth: float) -> Travel:
    """Send every start through all layers, once per scale.

    Args:
        starts: the columns to start from. [width, starts], float32
        log_scales: natural logarithms of the scales. [scales], float64
        layers: how many.
        step: adds the branch of a layer, without its scale, to a sum.
        growth: a bound on |B_l(h)| / |h| over all layers.

    Returns:
        How far each start came with each scale.

    Raises:
        OverflowError: if one layer may multiply a column by more than 2^60.
        ArithmeticError: if something is not finite in the end.
    """
    columns = _Columns(starts, log_scales)
    largest = growth * math.exp(min(float(log_scales.max()), 700.0))
    period = min(_MOST_STEPS, int(_ROOM * math.log(2) / math.log1p(largest))) if largest > 0 else _MOST_STEPS
    if period < 1:
        raise OverflowError(
            f"One layer may multiply a state by {largest:.1e}: too much for float32. Take larger betas than "
            f"those whose scale is {math.exp(min(float(log_scales.max()), 700.0)):.1e}."
        )
    for layer in range(layers):
        step(layer, columns.state, columns.sum)
        torch.addcmul(columns.base, columns.scale, columns.sum, out=columns.state)
        if (layer + 1) % period == 0:
            columns.tidy()
    return columns.travelled()


class _Columns:
    """All starts times all scales, side by side: `state = base + scale * sum`, times 2^exponent."""

    def __init__(self, starts: Tensor, log_scales: Tensor) -> None:
        self._starts = starts.shape[1]
        self._scales = len(log_scales)
        self.start = starts.repeat(1, self._scales)
        self.log_scale = log_scales.repeat_interleave(self._starts)
        self.scale = self.log_scale.exp().to(starts.dtype)[None]
        self.base = self.start.clone()
        self.state = self.start.clone()
        self.sum = torch.zeros_like(self.start)
        self.exponent = torch.zeros(len(self.log_scale), dtype=torch.int64)
        self.moved = torch.zeros(len(self.log_scale), dtype=torch.bool)
        self._rescale()

    def tidy(self) -> None:
        """Take new bases where columns have moved, and powers of two where they are far from 1."""
        far = (self.state - self.base).square_().sum(0) > _MOVED**2 * self.base.square().sum(0)
        if far.any():
            torch.where(far, self.state, self.base, out=self.base)
            self.sum.masked_fill_(far, 0.0)
            self.moved |= far
        self._rescale()

    def _rescale(self) -> None:
        _, exponent = torch.frexp(self.state.abs().amax(0))
        away = exponent.abs() > _FAR
        if away.any():
            shift = torch.where(away, exponent, 0)
            for part in (self.state, self.base, self.sum):
                part.copy_(torch.ldexp(part, -shift))
            self.exponent += shift

    def travelled(self) -> Travel:
        """Return how far the columns are from where they started."""
        start, end = self.start.double(), self.state.double()
        # In units of 2^unit neither the end nor the start overflows; the lesser may vanish beside the other.
        unit = self.exponent.clamp(min=0)
        moved = torch.ldexp(end, self.exponent - unit) - torch.ldexp(start, -unit)
        still = self.sum.double()
        log_start = start.norm(dim=0).log2()
        change = torch.where(
            self.moved,
            moved.norm(dim=0).log2() + unit,
            still.norm(dim=0).log2() + self.log_scale / math.log(2) + self.exponent,
        )
        ratio = end.norm(dim=0).log2() + self.exponent
        if change.isnan().any() or ratio.isnan().any() or bool((change == math.inf).any() | (ratio == math.inf).any()):
            raise ArithmeticError("a column is not finite after the last layer: the weights or the starts are not.")
        active = end.clamp(min=0).norm(dim=0).log2() + self.exponent - start.clamp(min=0).norm(dim=0).log2()
        active = active.where(start.amax(0) > 0, math.nan)
        shape, in_tens = (self._scales, self._starts), math.log10(2)
        return Travel(
            change=((change - log_start) * in_tens).view(shape),
            ratio=((ratio - log_start) * in_tens).view(shape),
            active=(active * in_tens).clamp(min=_LEAST_ACTIVE).view(shape),
        )
