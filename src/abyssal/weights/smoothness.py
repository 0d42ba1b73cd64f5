"""How given weights change with depth, in plain figures that assume no law."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from abyssal.weights.columns import Columns, Summary, Weights, periodogram, summarise

__all__ = ["Smoothness", "changes", "describe", "profile_share", "smoothness"]

_NEGLIGIBLE = 1e-7  # increments this small against the weights are rounding


@dataclass(frozen=True)
class Smoothness:
    """How given weights change with depth, in figures that assume no law. All are relative to their rms.

    Attributes:
        depth: length of a path.
        columns: number of paths.
        rms: root mean square of the weights, the profile included.
        step: rms of the increment from one block to the next.
        steepest: depth times the largest rms increment between neighbours. It stays bounded in depth where
            weights converge to a differentiable function of it, grows as depth^(1-H) for a path of Hurst index H,
            and as depth for noise.
        variation: mean over entries of the sum of absolute increments; bounded for smooth weights, and growing as
            `steepest` otherwise.
        lag1: correlation of weights at neighbouring depths.
        holder: half the slope of log mean square increment against log lag: 0 for white noise, H for a path of
            Hurst index H, 1 for a smooth one.
        lags: at which increments were taken.
        variogram: mean square increment at these lags.
        profile: share of the mean square change over depth that all entries have in common.
        scale_range: largest over smallest rms of a depth's weights.
    """

    depth: int
    columns: int
    rms: float
    step: float
    steepest: float
    variation: float
    lag1: float
    holder: float
    lags: tuple[int, ...]
    variogram: tuple[float, ...]
    profile: float
    scale_range: float


def smoothness(weights: Weights) -> Smoothness:
    """Describe how given weights change with depth.

    Args:
        weights: as for :func:`hurst_exponent`. [depth, ...]

    Returns:
        The figures.

    Raises:
        ValueError: for fewer than 4 depths or values that are not finite.
        TypeError: for something else than tensors or modules.
    """
    return describe(summarise(Columns.of(weights)))


def describe(summary: Summary) -> Smoothness:
    """Do what :func:`smoothness` does, for paths that were read before."""
    profile_steps = summary.profile.diff() ** 2
    squares = summary.squares + summary.profile**2
    rms = math.sqrt(float(squares.mean()))
    size = rms or 1.0
    steps = summary.steps + profile_steps
    ends = math.sqrt(float(summary.squares[:-1].sum()) * float(summary.squares[1:].sum()))
    return Smoothness(
        depth=summary.depth,
        columns=summary.count,
        rms=rms,
        step=math.sqrt(float(steps.mean())) / size,
        steepest=summary.depth * math.sqrt(float(steps.max())) / size,
        variation=summary.variation / size,
        lag1=summary.neighbours / ends if ends > 0 else 1.0,
        holder=_slope(summary),
        lags=summary.lags,
        variogram=tuple((summary.variogram / size**2).tolist()),
        profile=profile_share(summary),
        scale_range=math.sqrt(float(squares.max()) / max(float(squares.min()), 1e-300)) if rms else 1.0,
    )


def changes(summary: Summary) -> bool:
    """Return whether entries change with depth, by more than rounding and beyond the profile they share."""
    return float(summary.steps.mean()) > _NEGLIGIBLE**2 * float((summary.squares + summary.profile**2).mean())


def profile_share(summary: Summary) -> float:
    """Return the shared profile's share of the mean square change over depth, less what chance gives it."""
    own = float(summary.values.sum())
    shared = float(periodogram(summary.profile[:, None]).sum()) - (own / summary.count if summary.profile.any() else 0)
    return max(0.0, shared) / (own + max(0.0, shared)) if own + shared > 0 else 0.0


def _slope(summary: Summary) -> float:
    """Return half the least-squares slope of log variogram against log lag; NaN with one lag or none positive."""
    if len(summary.lags) < 2 or not float(summary.variogram.min()) > 0:
        return math.nan
    return float(np.polyfit(np.log(summary.lags), summary.variogram.log().numpy(), 1)[0]) / 2
