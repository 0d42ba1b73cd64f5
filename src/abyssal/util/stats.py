"""Powers of the depth: straight lines through logarithms, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Slope", "power_of_depth", "student"]


@dataclass(frozen=True)
class Slope:
    """The power of the depth L that a size follows.

    Attributes:
        value: least-squares slope of log size in log L; nan where fewer than two depths have a size.
        low: lower end of its 95 % interval; nan where there are only two points.
        high: upper end.
        at: geometric mean of the depths of all points, where the line passes through `level`.
        level: geometric mean of the sizes.
        points: how many sizes it comes from.
    """

    value: float
    low: float
    high: float
    at: float = math.nan
    level: float = math.nan
    points: int = 0

    def __str__(self) -> str:
        """Return it as a power, such as `L^+0.48 (+0.41 to +0.55)`."""
        return f"L^{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"

    def line(self, depths: Sequence[float]) -> list[float]:
        """Return the fitted sizes at depths."""
        return [self.level * (depth / self.at) ** self.value for depth in depths]


def power_of_depth(depths: Sequence[float], sizes: np.ndarray) -> Slope:
    """Fit `size = c L^p` by least squares in logarithms over all depths and seeds.

    The interval is Student's, with as many degrees of freedom as there are points, less two. The residuals hold the
    spread over seeds and what is not a power of the depth alike.

    Args:
        depths: of the rows. [depths]
        sizes: those that are 0, negative or not finite are left out. [depths, seeds]
    """
    x = np.log(np.repeat(np.asarray(depths, dtype=float)[:, None], sizes.shape[1], axis=1))
    usable = np.isfinite(sizes) & (sizes > 0)
    x, y = x[usable], np.log(sizes[usable])
    if len(np.unique(x)) < 2:
        return Slope(math.nan, math.nan, math.nan)
    dx = x - x.mean()
    value = float(dx @ y / (dx @ dx))
    freedom = len(x) - 2
    half = math.nan
    if freedom > 0:
        residuals = y - y.mean() - value * dx
        half = student(freedom) * math.sqrt(float(residuals @ residuals) / freedom / float(dx @ dx))
    return Slope(value, value - half, value + half, math.exp(x.mean()), math.exp(y.mean()), len(x))


def student(freedom: float, level: float = 0.95) -> float:
    """Return the two-sided quantile of Student's t: what its magnitude stays below with a probability of `level`.

    Args:
        freedom: degrees of freedom, above 0; infinitely many are the normal law.
        level: above 0 and below 1.
    """
    from scipy.special import stdtrit  # here, since it takes long to import

    return float(stdtrit(freedom, (1 + level) / 2))
