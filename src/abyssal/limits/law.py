"""How far a sample is from a law, and which power of the depth an error follows; each with its own error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from abyssal.util.checks import share
from abyssal.util.stats import Interval

__all__ = [
    "Empirical",
    "KolmogorovSmirnov",
    "Law",
    "Moments",
    "Normal",
    "Slope",
    "Wasserstein",
    "kolmogorov_smirnov",
    "moments",
    "root_mean_square",
    "slope",
    "wasserstein",
]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Mean and variance.

    Attributes:
        mean: the mean.
        mean_error: its standard error; 0 where the mean is exact.
        variance: the unbiased variance.
        variance_error: its standard error, from the sample's own fourth moment.
    """

    mean: float
    mean_error: float
    variance: float
    variance_error: float


@final
@dataclass(frozen=True)
class Normal:
    """The normal law, known exactly.

    Attributes:
        mean: of the law.
        variance: of the law, positive.
    """

    mean: float
    variance: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.variance < math.inf):
            raise ValueError(
                f"A normal law needs a finite mean and a positive variance, got {self.mean}, {self.variance}."
            )

    def cdf(self, x: Array) -> Array:
        """Return the distribution function [points]."""
        z = torch.from_numpy((np.asarray(x, dtype=np.float64) - self.mean) / math.sqrt(self.variance))
        return torch.special.ndtr(z).numpy()

    def quantile(self, u: Array) -> Array:
        """Return the quantiles [points]."""
        z = torch.special.ndtri(torch.from_numpy(np.asarray(u, dtype=np.float64))).numpy()
        return self.mean + math.sqrt(self.variance) * z

    @property
    def count(self) -> float:
        """Infinity: the law is known."""
        return math.inf

    @property
    def moments(self) -> Moments:
        """Its mean and variance, exact."""
        return Moments(self.mean, 0.0, self.variance, 0.0)


@final
class Empirical:
    """The law of a sample.

    Args:
        sample: at least two finite numbers. [draws]
    """

    def __init__(self, sample: ArrayLike) -> None:
        self._sorted = np.sort(_checked(sample))

    def cdf(self, x: Array) -> Array:
        """Return the fraction of the sample up to and including each of `x` [points]."""
        return np.searchsorted(self._sorted, x, side="right") / self._sorted.size

    def quantile(self, u: Array) -> Array:
        """Return the order statistics, the left-continuous inverse of `cdf` [points]."""
        # The rounding of u * size must not lift an exact multiple to the next order statistic.
        place = np.ceil(np.asarray(u) * self._sorted.size - 1e-9).astype(int) - 1
        return self._sorted[np.clip(place, 0, self._sorted.size - 1)]

    @property
    def count(self) -> float:
        """Number of draws."""
        return float(self._sorted.size)

    @property
    def moments(self) -> Moments:
        """Mean and variance of the sample."""
        return moments(self._sorted)


Law = Normal | Empirical
"""The law of one number, to compare a sample with."""


@dataclass(frozen=True)
class KolmogorovSmirnov:
    """The largest distance between two distribution functions.

    Attributes:
        statistic: that distance.
        critical: what it exceeds with probability `level` if the two laws are equal.
        level: of the test.
        p_value: the probability of such a statistic or a larger one, if the two laws are equal.
    """

    statistic: float
    critical: float
    level: float
    p_value: float

    @property
    def rejects(self) -> bool:
        """Whether the two laws are seen to differ."""
        return self.statistic > self.critical


@dataclass(frozen=True)
class Wasserstein:
    """The Wasserstein-1 distance: the area between two distribution functions.

    Attributes:
        distance: between the sample and the law, in the units of the number.
        noise: what is expected of it, to leading order in the number of draws, if the two laws are equal.
    """

    distance: float
    noise: float


@dataclass(frozen=True)
class Slope(Interval):
    """A power of the depth, by least squares of the logarithms: `error ~ depth ** value`.

    Attributes:
        level: of confidence.
    """

    level: float = 0.95

    def __str__(self) -> str:
        """Show the slope and its interval."""
        return f"{self.value:.3f} ({self.level:.0%} interval {self.low:.3f} to {self.high:.3f})"


def moments(sample: ArrayLike) -> Moments:
    """Return mean and variance of a sample with their standard errors.

    Args:
        sample: at least two independent draws. [draws]

    Raises:
        ValueError: for fewer than two draws, or values that are not finite.
    """
    x = _checked(sample)
    n = x.size
    centred = x - x.mean()
    variance = float(centred @ centred) / (n - 1)
    fourth = float(np.mean(centred**4))
    variance_of_variance = max(0.0, (fourth - variance**2 * (n - 3) / (n - 1)) / n)
    return Moments(float(x.mean()), math.sqrt(variance / n), variance, math.sqrt(variance_of_variance))


def kolmogorov_smirnov(sample: ArrayLike, law: Law, level: float = 0.01) -> KolmogorovSmirnov:
    """Compare a sample with a law by the Kolmogorov-Smirnov statistic.

    Critical value and p-value are the asymptotic ones, good to a few per cent from 100 draws on; the
    critical value is a little too large for fewer.

    Args:
        sample: independent draws. [draws]
        law: what it is compared with; if itself a sample, this is the two-sample test.
        level: probability of a critical statistic under equal laws.

    Raises:
        ValueError: for a level outside (0, 1), or a bad sample.
    """
    from scipy import special, stats

    share("level", level)
    x = _checked(sample)
    if isinstance(law, Empirical):
        statistic = float(stats.ks_2samp(x, law._sorted, method="asymp").statistic)
    else:
        statistic = float(stats.ks_1samp(x, law.cdf, method="asymp").statistic)
    effective = 1 / (1 / x.size + 1 / law.count)
    critical = math.sqrt(-math.log(level / 2) / (2 * effective))
    p_value = float(special.kolmogorov(math.sqrt(effective) * statistic))
    return KolmogorovSmirnov(statistic, critical, level, p_value)


def wasserstein(sample: ArrayLike, law: Law) -> Wasserstein:
    """Return the Wasserstein-1 distance of a sample from a law, and what sampling alone would give.

    The distance is the mean of `|F_n^-1(u) - F^-1(u)|` over probabilities `u` at the middle of each draw's
    share; for a sample of the same size that is exact. The noise is `sqrt(2 / pi) integral sqrt(F (1 - F))`
    over the root of the effective number of draws, the limit of the mean distance of a sample from its law.

    Args:
        sample: independent draws. [draws]
        law: what it is compared with.

    Raises:
        ValueError: for a bad sample.
    """
    x = np.sort(_checked(sample))
    n = x.size
    distance = float(np.mean(np.abs(x - law.quantile((np.arange(n) + 0.5) / n))))
    below = np.arange(1, n) / n
    area = float(np.sum(np.diff(x) * np.sqrt(below * (1 - below))))
    return Wasserstein(distance, math.sqrt(2 / math.pi * (1 / n + 1 / law.count)) * area)


def root_mean_square(squares: Array) -> tuple[Array, Array]:
    """Return the root of the mean over paths, and its standard error by the delta method.

    Args:
        squares: squared errors of independent paths. [paths, depths]
    """
    mean = squares.mean(axis=0)
    error = squares.std(axis=0, ddof=1) / math.sqrt(len(squares))
    root = np.sqrt(mean)
    return root, error / (2 * np.maximum(root, 1e-300))


def slope(depths: Sequence[int], squares: Array, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Slope:
    """Fit `root mean square error ~ depth ** slope`, with an interval from resampled paths.

    The errors of one path at several depths are dependent (that is what coupling is for), so whole paths are
    drawn again, with replacement.

    Args:
        depths: at least two different ones. [depths]
        squares: squared errors, positive in the mean. [paths, depths]
        level: of confidence.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: for fewer than two depths or paths, or for errors that are zero or not finite.
    """
    if len(set(depths)) < 2 or squares.ndim != 2 or squares.shape[1] != len(depths) or len(squares) < 2:
        raise ValueError(
            f"A slope needs two different depths, two paths and squared errors [paths, depths], got depths "
            f"{list(depths)} and errors of shape {squares.shape}."
        )
    if not (np.isfinite(squares).all() and (squares.mean(axis=0) > 0).all()):
        raise ValueError("A slope needs finite errors that are not zero at any depth.")
    log_depth = np.log(np.asarray(depths, dtype=np.float64))
    weights = (log_depth - log_depth.mean()) / np.sum((log_depth - log_depth.mean()) ** 2)
    draws = np.random.default_rng(seed).integers(len(squares), size=(resamples, len(squares)))
    # A resample may by chance hold only paths without an error at some depth.
    resampled = np.log(np.maximum(squares[draws].mean(axis=1), 1e-300)) @ weights / 2
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Slope(float(np.log(squares.mean(axis=0)) @ weights / 2), float(low), float(high), level)


def _checked(sample: ArrayLike) -> Array:
    x = np.asarray(sample, dtype=np.float64).ravel()
    if x.size < 2:
        raise ValueError(f"A sample needs at least two draws, got {x.size}.")
    if not np.isfinite(x).all():
        raise ValueError(f"A sample has to be finite, got {int((~np.isfinite(x)).sum())} values that are not.")
    return x
