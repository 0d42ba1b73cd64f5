"""Numbers with intervals: means over seeds, and powers of the depth by straight lines through logarithms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "Slope", "every", "line", "mean", "power_of_depth", "student"]


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval, whose ends are nan where there are too few values to have one.

    Attributes:
        value: the number.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def above(self, bound: float) -> bool | None:
        """Whether it is above a bound; None where the interval holds the bound, or there is none."""
        return True if self.low > bound else False if self.high < bound else None

    def below(self, bound: float) -> bool | None:
        """Whether it is below a bound; None where the interval holds the bound, or there is none."""
        return True if self.high < bound else False if self.low > bound else None

    def between(self, least: float, most: float) -> bool | None:
        """Whether it is between two bounds; None where the interval reaches across one of them."""
        return every([self.above(least), self.below(most)])

    def show(self, form: str | Callable[[float], str]) -> str:
        """Return "value (low to high)", each as a format or a function writes it."""
        write = (lambda x: format(x, form)) if isinstance(form, str) else form
        return f"{write(self.value)} ({write(self.low)} to {write(self.high)})"


@dataclass(frozen=True)
class Slope(Interval):
    """The power of the depth L that a size follows: the slope of log size in log L, by least squares.

    It is nan where fewer than two depths have a size; so are the ends of its interval where there are only two points.

    Attributes:
        at: geometric mean of the depths of all points, where the line passes through `level`.
        level: geometric mean of the sizes.
        points: how many sizes it comes from.
    """

    at: float = math.nan
    level: float = math.nan
    points: int = 0

    def __str__(self) -> str:
        """Return it as a power, such as `L^+0.48 (+0.41 to +0.55)`."""
        return f"L^{self.show('+.2f')}"

    def line(self, depths: Sequence[float]) -> list[float]:
        """Return the fitted sizes at depths."""
        return [self.level * (depth / self.at) ** self.value for depth in depths]


def every(answers: Iterable[bool | None]) -> bool | None:
    """Return False if any answer is, True if all are, else None."""
    given = list(answers)
    return False if any(a is not None and not a for a in given) else True if all(given) else None


def power_of_depth(depths: Sequence[float], sizes: np.ndarray, *, each_seed: bool = False) -> Slope:
    """Fit `size = c L^p` by least squares in logarithms over all depths and seeds.

    The interval is Student's, with as many degrees of freedom as there are points, less one for the slope and one for
    each constant. The residuals hold the spread over seeds and what is not a power of the depth alike.

    Args:
        depths: of the rows. [depths]
        sizes: those that are 0, negative or not finite are left out. [depths, seeds]
        each_seed: whether every seed has a constant `c` of its own; one with a size that is left out is left out whole.
    """
    usable = np.isfinite(sizes) & (sizes > 0)
    if each_seed:
        usable &= usable.all(axis=0)
    row, seed = np.nonzero(usable)
    x, y = np.log(np.asarray(depths, dtype=float))[row], np.log(sizes[usable])
    if len(np.unique(x)) < 2:
        return Slope(math.nan, math.nan, math.nan)
    _, group = np.unique(seed if each_seed else np.zeros_like(seed), return_inverse=True)
    count = np.bincount(group)
    dx, dy = (values - (np.bincount(group, values) / count)[group] for values in (x, y))
    value = float(dx @ dy / (dx @ dx))
    freedom = len(x) - 1 - len(count)
    half = math.nan
    if freedom > 0:
        residuals = dy - value * dx
        half = student(freedom) * math.sqrt(float(residuals @ residuals) / freedom / float(dx @ dx))
    return Slope(value, value - half, value + half, math.exp(x.mean()), math.exp(y.mean()), len(x))


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Return the least-squares line's slope, its standard error, and r^2 (nan where `y` is constant). [points] each.

    The error comes from what is left over; scipy's linregress takes it from 1 - r^2, which cancels on an exact line.
    """
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx))
    left = dy - slope * dx
    error = math.sqrt(float(left @ left) / max(1, len(x) - 2) / float(dx @ dx))
    total = float(dy @ dy)
    return slope, error, 1 - float(left @ left) / total if total > 0 else math.nan


def mean(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Return the mean of independent values with Student's interval; one that is not finite makes all of it nan."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return Interval(float(x[0]) if len(x) else math.nan, math.nan, math.nan)
    middle, half = float(x.mean()), student(len(x) - 1, level) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(middle, middle - half, middle + half)


def student(freedom: float, level: float = 0.95) -> float:
    """Return the two-sided quantile of Student's t: what its magnitude stays below with a probability of `level`.

    Args:
        freedom: degrees of freedom, above 0; infinitely many are the normal law.
        level: above 0 and below 1.
    """
    from scipy.special import stdtrit  # here, since it takes long to import

    return float(stdtrit(freedom, (1 + level) / 2))
